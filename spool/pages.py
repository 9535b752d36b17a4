"""SQLite's pages, read without SQLite: for files whose header, schema or tree is damaged.

SQLite finds a row by the header, the schema and every page above it; here each page that is whole
gives its cells (https://www.sqlite.org/fileformat2.html, sections 1.6, 2 and 4). Old images of a
page are read as well, in the write-ahead log and on free pages: whoever asks must be able to tell
by the content what is good, because nothing else is checked.
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from spool.files import SIDE_SUFFIXES
from spool.writer import PAGE_BYTES

READ_ATTEMPTS = 2
"""A read error may pass."""

Value: TypeAlias = int | float | str | bytes | None

TABLE_LEAF = 0x0D
INDEX_LEAF = 0x0A
_INDEX_INTERIOR = 0x02

_MAGIC = b"SQLite format 3\0"
_PAGE_SIZE_AT = 16
_SMALLEST_PAGE, _LARGEST_PAGE = 512, 65_536
_SAMPLES, _MANY_SAMPLES = 64, 4_096
"""So many pieces of the database show how large its pages are, where no header does."""

_LOG_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_SALTS = slice(16, 24)
"""Where the log's header has what its current frames repeat at 8."""

_VARINT_BYTES = 9
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_REAL, _ZERO, _ONE, _FIRST_BLOB = 7, 8, 9, 12
_unpack_real = struct.Struct(">d").unpack


class PageImages:
    """Every image of a page that the database ``path`` and its write-ahead log have.

    The images are numbered from 0: first the database's, then the log's in the order in which
    they were written. Only for a file that SQLite has not open in this process: closing it here
    would release SQLite's locks.

    Raises:
        OSError: The database cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC)]
        try:
            log = path.with_name(path.name + SIDE_SUFFIXES[1])
            self._files.append(os.open(log, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            pass
        except OSError:
            self.close()
            raise
        log_header = self._read(1, 0, _LOG_HEADER_BYTES) if len(self._files) > 1 else b""
        self._salts = log_header[_SALTS]
        named = _named_page_bytes(self._read(0, 0, _LOG_HEADER_BYTES), log_header)
        self.page_bytes = named or self._seen_page_bytes()
        self._in_database = os.fstat(self._files[0]).st_size // self.page_bytes
        self.count = self._in_database
        self._in_log: dict[int, list[int]] = {}
        if len(self._files) > 1:
            frames = os.fstat(self._files[1]).st_size - _LOG_HEADER_BYTES
            self.count += max(0, frames) // (_FRAME_HEADER_BYTES + self.page_bytes)
            for image in range(self._in_database, self.count):
                header = self._frame_header(image)
                self._in_log.setdefault(int.from_bytes(header[:4], "big"), []).append(image)

    def _seen_page_bytes(self) -> int:
        """Return the size that most leaves of tables have, in samples of the database.

        Rows whose payloads fill pages of their own leave few leaves: where none is seen, more is
        looked at before a new file's size is taken for this one's.
        """
        pieces = os.fstat(self._files[0]).st_size // _LARGEST_PAGE + 1
        seen: Counter[int] = Counter({_SMALLEST_PAGE: 0})
        for samples in (_SAMPLES, _MANY_SAMPLES):
            step = max(1, pieces // samples)
            for piece in range(0, pieces, step):
                self._count_leaves(self._read(0, piece * _LARGEST_PAGE, _LARGEST_PAGE), seen)
            if seen.total():
                return max(seen, key=lambda size: seen[size])
        return PAGE_BYTES

    def _count_leaves(self, data: bytes, seen: Counter[int]) -> None:
        size = _SMALLEST_PAGE
        while size <= _LARGEST_PAGE:
            pages = (data[at : at + size] for at in range(0, len(data), size))
            seen[size] += sum(map(_is_filled_leaf, pages))
            size *= 2

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def read(self, image: int) -> bytes:
        """Return a page's content; nothing where the disk cannot read it."""
        if image < self._in_database:
            return self._read(0, image * self.page_bytes, self.page_bytes)
        return self._read(1, self._frame_at(image) + _FRAME_HEADER_BYTES, self.page_bytes)

    def of_low_pages(self, through_page: int) -> Iterator[bytes]:
        """Yield the images of the file's first pages; of each page, the newest comes last."""
        for image in range(min(through_page, self._in_database)):
            yield self.read(image)
        for page, images in self._in_log.items():
            if page <= through_page:
                for image in images:
                    if self._frame_header(image)[8:16] == self._salts:
                        yield self.read(image)

    def follow(self, page: int, size: int, *, by_log: bool) -> bytes:
        """Return ``size`` bytes of the overflow pages that begin with ``page``; fewer if cut.

        Args:
            page: Its number, from 1.
            size: In bytes.
            by_log: Whether the write-ahead log's last image of a page goes before the database's.
        """
        content = b""
        while page and len(content) < size:
            logged = self._in_log.get(page) if by_log or page > self._in_database else None
            data = self.read(logged[-1] if logged else page - 1) if self._has(page) else b""
            if not data:
                break
            page = int.from_bytes(data[:4], "big")
            content += data[4:]
        return content[:size]

    def _has(self, page: int) -> bool:
        return page <= self._in_database or page in self._in_log

    def _frame_at(self, image: int) -> int:
        frame = image - self._in_database
        return _LOG_HEADER_BYTES + frame * (_FRAME_HEADER_BYTES + self.page_bytes)

    def _frame_header(self, image: int) -> bytes:
        return self._read(1, self._frame_at(image), _FRAME_HEADER_BYTES)

    def _read(self, file: int, offset: int, size: int) -> bytes:
        for _ in range(READ_ATTEMPTS):
            try:
                return os.pread(self._files[file], size, offset)
            except OSError:
                continue
        return b""  # a bad sector: as good as a page of garbage


def _named_page_bytes(header: bytes, log_header: bytes) -> int:
    """Return the size of pages that a header names; 0 if none does."""
    sizes = [int.from_bytes(log_header[8:12], "big")]
    if header.startswith(_MAGIC):
        size = int.from_bytes(header[_PAGE_SIZE_AT : _PAGE_SIZE_AT + 2], "big")
        sizes.insert(0, _LARGEST_PAGE if size == 1 else size)
    possible = (s for s in sizes if _SMALLEST_PAGE <= s <= _LARGEST_PAGE and s & (s - 1) == 0)
    return next(possible, 0)


def _is_filled_leaf(page: bytes) -> bool:
    """Return whether this may be a whole leaf of a table.

    Cells are laid down from the end of the page: the one nearest to it ends there.
    """
    if page[:1] != bytes((TABLE_LEAF,)):
        return False
    count = int.from_bytes(page[3:5], "big")
    pointers_end = 8 + 2 * count
    if not count or pointers_end > len(page):
        return False
    places = struct.unpack_from(f">{count}H", page, 8)
    last = max(places)
    if min(places) < pointers_end or last >= len(page):
        return False
    try:
        size, at = _varint(page, last)
        _, at = _varint(page, at)
    except IndexError:
        return False
    local = _local_bytes(size, len(page), in_table=True)
    return bool(at + (size if size == local else local + 4) == len(page))


def cells(page: bytes) -> list[int]:
    """Return where the page's cells begin, in their order; none of a page that has none."""
    if not page or page[0] not in {TABLE_LEAF, INDEX_LEAF, _INDEX_INTERIOR}:
        return []
    first = 12 if page[0] == _INDEX_INTERIOR else 8
    count = min(int.from_bytes(page[3:5], "big"), (len(page) - first) // 2)
    # An interior cell begins with the number of the page below it.
    skipped = 4 if page[0] == _INDEX_INTERIOR else 0
    places = struct.unpack_from(f">{count}H", page, first)
    return [place + skipped for place in places if first < place < len(page)]


def rowid_at(page: bytes, at: int) -> int:
    """Return the rowid of the cell of a table's leaf that begins at ``at``.

    Raises:
        IndexError: The cell runs over the end of the page.
    """
    _, at = _varint(page, at)
    return _signed(_varint(page, at)[0])


def record_at(
    images: PageImages, page: bytes, at: int, *, by_log: bool = True
) -> tuple[int, list[Value]]:
    """Return the rowid (0 in an index) and the columns of the cell that begins at ``at``.

    Args:
        images: Where overflow pages are looked up.
        page: A leaf of a table, or a page of an index.
        at: One of :func:`cells`.
        by_log: As :meth:`PageImages.follow` takes it.

    Raises:
        ValueError: It is no whole record.
        IndexError: Nor does it end within the page.
    """
    in_table = page[0] == TABLE_LEAF
    size, at = _varint(page, at)
    rowid = 0
    if in_table:
        rowid, at = _varint(page, at)
    local = _local_bytes(size, images.page_bytes, in_table=in_table)
    if size == local:
        payload = page[at : at + size]
    else:
        overflow = int.from_bytes(page[at + local : at + local + 4], "big")
        payload = page[at : at + local] + images.follow(overflow, size - local, by_log=by_log)
    if len(payload) != size:
        raise ValueError("the record is cut")
    return _signed(rowid), _columns(payload)


def _local_bytes(size: int, usable: int, *, in_table: bool) -> int:
    """Return how much of a record of ``size`` bytes is on the cell's own page (section 1.6)."""
    most = usable - 35 if in_table else (usable - 12) * 64 // 255 - 23
    if size <= most:
        return size
    least = (usable - 12) * 32 // 255 - 23
    local = least + (size - least) % (usable - 4)
    return local if local <= most else least


def _columns(payload: bytes) -> list[Value]:
    header_bytes, at = _varint(payload, 0)
    place = header_bytes
    values: list[Value] = []
    while at < header_bytes:
        kind, at = _varint(payload, at)
        value, place = _value(payload, kind, place)
        values.append(value)
    if place != len(payload):
        raise ValueError("the record's header does not agree with its size")
    return values


def _value(payload: bytes, kind: int, place: int) -> tuple[Value, int]:
    if kind >= _FIRST_BLOB:
        end = place + (kind - _FIRST_BLOB) // 2
        raw = payload[place:end]
        # A damaged text must not pass for a damaged page.
        return (raw.decode("utf-8", "replace") if kind % 2 else raw), end
    if kind in _INTEGER_BYTES:
        end = place + _INTEGER_BYTES[kind]
        return int.from_bytes(payload[place:end], "big", signed=True), end
    if kind == _REAL:
        if place + 8 > len(payload):
            raise ValueError("the record is cut")
        return _unpack_real(payload[place : place + 8])[0], place + 8
    if kind in {0, _ZERO, _ONE}:
        return (None if kind == 0 else kind - _ZERO), place
    raise ValueError("no such type")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = data[at]
    if value < 0x80:  # noqa: PLR2004 - by far the most frequent: one byte
        return value, at + 1
    value &= 0x7F
    for place in range(at + 1, at + _VARINT_BYTES - 1):
        byte = data[place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:  # noqa: PLR2004
            return value, place + 1
    return value << 8 | data[at + _VARINT_BYTES - 1], at + _VARINT_BYTES


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
