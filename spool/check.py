"""What its owner looks at in a spool that may be damaged, where reading would not show it."""

import sqlite3
from pathlib import Path

from spool.errors import CorruptFileError, translated
from spool.records import SELECT_LAST_SEQ

CHECK_ROWS = 20_000
"""More than any sink reads at once."""

_LAST_SEQS = f"SELECT ({SELECT_LAST_SEQ}), (SELECT max(seq) FROM reading_row)"  # noqa: S608 - our own constants
_READ = (
    "SELECT sum(length(hex(payload)) + length(topic)) FROM (SELECT payload, topic "
    "FROM reading_row WHERE seq > ? ORDER BY seq LIMIT ?)"
)
_HOLES = (
    "SELECT count(*) FROM (SELECT seq - lag(seq) OVER (ORDER BY seq) AS step FROM (SELECT seq "
    "FROM reading_row WHERE seq > ? ORDER BY seq LIMIT ?)) WHERE step <> 1"
)


def last_seq_in_order(conn: sqlite3.Connection, path: Path) -> int:
    """Return the highest seq ever given.

    It is counted on another page than that of the last reading, in the same transaction, and
    readings leave from the low end. So where there are any, the two are the same, and a flipped
    bit in either shows. Unnoticed, the next reading would get a number far above it, and whoever
    follows would take the difference for readings that are gone.

    Raises:
        CorruptFileError: They differ.
        sqlite3.Error: They cannot be read.
    """
    counted, highest = conn.execute(_LAST_SEQS).fetchone()
    if highest is not None and highest != counted:
        raise CorruptFileError(
            f"{path} is damaged: its last reading has the number {highest}, and {counted} is the "
            "last number that was given",
            path,
        )
    return int(counted)


def check_readable(conn: sqlite3.Connection, path: Path, after_seq: int) -> None:
    """Read what a forwarder that stands at ``after_seq`` would read next.

    Raises:
        CorruptFileError: It cannot be read; so the file is damaged, and not that process.
    """
    try:
        conn.execute(_READ, (after_seq, CHECK_ROWS)).fetchone()
        (holes,) = conn.execute(_HOLES, (after_seq, CHECK_ROWS)).fetchone()
        last_seq_in_order(conn, path)
    except sqlite3.Error as error:
        raise translated(error, "read", path) from error
    if holes:
        raise CorruptFileError(f"{path} is damaged: numbers are not in order", path)
