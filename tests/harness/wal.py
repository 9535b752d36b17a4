"""Which pages each commit has put into a write-ahead log.

https://www.sqlite.org/fileformat2.html, section 4.
"""

from pathlib import Path

_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24


def commits(database: Path) -> list[list[int]]:
    """Return the numbers of the pages of each commit in the log of ``database``, oldest first.

    Only for a log that was not begun anew since: frames of before are not told from later ones.
    """
    log = database.with_name(f"{database.name}-wal").read_bytes()
    page_bytes = int.from_bytes(log[8:12], "big")
    salts = log[16:24]
    found: list[list[int]] = []
    pages: list[int] = []
    for at in range(_HEADER_BYTES, len(log), _FRAME_HEADER_BYTES + page_bytes):
        header = log[at : at + _FRAME_HEADER_BYTES]
        if header[8:16] != salts:
            break
        pages.append(int.from_bytes(header[:4], "big"))
        if int.from_bytes(header[4:8], "big"):
            found.append(pages)
            pages = []
    return found
