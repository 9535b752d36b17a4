"""A damaged spool that was set aside: read for what is left.

The rows that can still be read, and that some sink has not had, are copied over into the new spool
in steps between the batches. They get new numbers: a sink that was ahead of the slowest one may
receive some of them twice, with the same event id.

The pages are read without SQLite, because what leads to a row is lost sooner than the row: with
100 bad bytes at the front SQLite gives back nothing. A good first page from a new file would not
do: the schema takes three pages, a migrated file has it elsewhere than a new one, the log may hold
the first page too, and either 10 GB are copied on a disk that is perhaps full, or the evidence is
written to. Each row's checksum tells a whole one from anything else.
"""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from spool.connection import keep_temporary_in_memory
from spool.pages import TABLE_LEAF, PageImages, Value, cells, record_at, rowid_at
from spool.records import READING_COLUMNS, NewReading, Reading, intact

SALVAGE_STEP_ROWS = 1_000
SALVAGE_STEP_BYTES = 1024 * 1024
"""A step gives back whole pages until it has reached one of the two."""

SCAN_STEP_PAGES = 2_000
"""How many pages a step looks through, to find those with readings: 4 MB of a new file's."""

_FACTS_THROUGH_PAGE = 256
"""Where meta and the counters are: they are small, and were made with the file."""

_ROWS_OF_A_PAGE = 100
"""Not so many fit."""

_COLUMNS = len(READING_COLUMNS.split(","))
_VALUE = 6
_EPOCH = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_INDEX = "CREATE TABLE page (seq INTEGER, image INTEGER, PRIMARY KEY (seq, image)) WITHOUT ROWID"
_ADD_PAGE = "INSERT OR IGNORE INTO page VALUES (?, ?)"
_NEXT_PAGE = "SELECT seq, image FROM page WHERE (seq, image) > (?, ?) ORDER BY seq, image LIMIT 1"


@dataclass(slots=True)
class _Progress:
    """How far a salvage is; what :meth:`Salvage.position` stores."""

    after_seq: int
    """Every sink has the rows up to here, or must not have them."""
    page_seq: int = -(2**63)
    page_image: int = -1
    """The last page that was read, in the order in which they are."""
    live: int = 0
    """Rows given back that had not been pruned."""
    bad: int = 0
    highest_seq: int = 0


@dataclass(slots=True)
class _Facts:
    """What the damaged file says of itself, as far as it can be read."""

    meta: dict[str, str]
    counters: dict[str, int]
    last_seq: int

    @property
    def removed(self) -> int:
        """How many rows were pruned or dropped: the first ones, for numbers begin at 1."""
        return self.counters.get("pruned", 0) + self.counters.get("dropped", 0)


class Salvage:
    """Reads the readings of a damaged spool, page by page, in the order of their numbers.

    Args:
        path: The file that was set aside.
        after_seq: Everything up to here is read or not needed.
    """

    def __init__(self, path: Path, after_seq: int) -> None:
        self.path = path
        self._progress = _Progress(after_seq)
        self.readable = 0
        """Rows given back, before an interruption too."""
        self.unreadable = 0
        """Once done: rows that were there, and are not whole."""
        self.done = False
        self._scanned = 0
        self._recent: set[tuple[int, bytes]] = set()
        self._images: PageImages | None = None
        self._facts = _Facts({}, {}, 0)
        try:
            self._images = PageImages(path)
        except OSError:
            self.done = True  # it is not there; the caller reports what was copied
            return
        self._facts = _facts(self._images)
        self._index = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        keep_temporary_in_memory(self._index)
        self._index.execute(_INDEX)
        self.skip_to(self._environment_from(self._facts.last_seq))

    @property
    def epoch(self) -> str:
        """The damaged spool's epoch; empty if it cannot be read."""
        epoch = self.meta("epoch")
        return epoch if _EPOCH.fullmatch(epoch) else ""

    @property
    def app_env(self) -> str:
        """The environment that its readings were taken under; empty if it cannot be read."""
        return self.meta("app_env")

    def meta(self, key: str) -> str:
        """Return what the damaged spool's ``meta`` holds under ``key``; empty if unreadable."""
        return self._facts.meta.get(key, "")

    def earlier(self, key: str) -> str:
        """Return the position of the salvage that the damaged spool itself had under way.

        Args:
            key: Under which ``meta`` has it; empty where it had none, or none that is whole.
        """
        text = self.meta(key)
        with contextlib.suppress(ValueError):
            match json.loads(text or "null"):
                case [str(), int(), *_]:
                    return text
        return ""

    def waiting(self, after_seq: int = 0) -> int:
        """Return how many rows behind ``after_seq`` are perhaps still to be given back."""
        if self.done:
            return 0
        done = max(after_seq, self._progress.after_seq)
        # Without its last number only reading the file shows how many there are.
        most = self._images.count * _ROWS_OF_A_PAGE if self._images else 1
        return min(max(0, self._facts.last_seq - done), most) if self._facts.last_seq else 1

    def skip_to(self, seq: int) -> None:
        """Begin after ``seq``: every sink has what is before. Only before the first step."""
        self._progress.after_seq = max(self._progress.after_seq, seq)

    def step(self) -> list[NewReading]:
        """Return the next rows that are whole; now and then none, before it is :attr:`done`."""
        if self._images is None or self.done or not self._scan(self._images):
            return []
        rows: list[NewReading] = []
        size = 0
        progress = self._progress
        while len(rows) < SALVAGE_STEP_ROWS and size < SALVAGE_STEP_BYTES:
            place = progress.page_seq, progress.page_image
            found = self._index.execute(_NEXT_PAGE, place).fetchone()
            if found is None:
                self._finish()
                break
            progress.page_seq, progress.page_image = found
            for row in self._rows_of(self._images, *found):
                rows.append(row[1:])
                size += len(row[8]) + len(row[9])
        return rows

    def position(self) -> str:
        """Return where this is, for :meth:`resumed`; empty once done."""
        if self.done:
            return ""
        return json.dumps([str(self.path), self.readable, *astuple(self._progress)])

    @classmethod
    def resumed(cls, position: str) -> "Salvage":
        """Return a salvage that goes on at ``position``."""
        path, *numbers = json.loads(position)
        if any(type(number) is not int for number in numbers):
            # An earlier release's: what it had copied from behind the damage comes once more.
            return cls(Path(path), numbers[0])
        readable, *progress = numbers
        salvage = cls(Path(path), 0)
        salvage._progress = _Progress(*progress)
        salvage.readable = readable
        return salvage

    def _scan(self, images: PageImages) -> bool:
        """Look through the next pages for readings; return whether all are known."""
        end = min(self._scanned + SCAN_STEP_PAGES, images.count)
        after_seq = self._progress.after_seq
        for image in range(self._scanned, end):
            bounds = _bounds(images, images.read(image))
            if bounds and max(bounds) > after_seq:
                self._index.execute(_ADD_PAGE, (bounds[0], image))
        self._scanned = end
        if end < images.count:
            return False
        # Again: the last number may be too low, which may be why the file was set aside.
        (highest,) = self._index.execute("SELECT max(seq) FROM page").fetchone()
        self.skip_to(self._environment_from(highest or 0))
        return True

    def _environment_from(self, given: int) -> int:
        """Return the last seq that was taken under another APP_ENV; 0 if none.

        Args:
            given: What is beyond this was never given: it is damaged, and would pass over all.
        """
        text = self.meta("app_env_from_seq")
        return int(text) if text.isdecimal() and int(text) <= given else 0

    def _rows_of(self, images: PageImages, first_seq: int, image: int) -> Iterator[Reading]:
        """Yield the page's whole rows, but for those that another image of it has given."""
        progress = self._progress
        removed = self._facts.removed
        self._recent = {key for key in self._recent if key[0] >= first_seq}
        page = images.read(image)
        for at in cells(page):
            row = _row(images, page, at)
            if row is None:
                progress.bad += 1
                continue
            key = row[0], row[1]
            if row[0] <= progress.after_seq or key in self._recent:
                continue
            self._recent.add(key)
            self.readable += 1
            progress.live += row[0] > removed
            progress.highest_seq = max(progress.highest_seq, row[0])
            yield row

    def _finish(self) -> None:
        progress, facts = self._progress, self._facts
        # What is there may contradict the last number, which may be why the file was set aside.
        highest = progress.highest_seq
        possible = range(highest, highest + self._scanned * _ROWS_OF_A_PAGE + 1)
        last_seq = facts.last_seq if facts.last_seq in possible else highest
        if self.epoch or progress.after_seq:
            # Numbers have no holes, so what is neither pruned nor here is lost.
            gone = max(progress.after_seq, facts.removed)
            self.unreadable = max(0, last_seq - gone - progress.live)
        else:
            self.unreadable = progress.bad  # nobody knows what had been pruned
        self.done = True
        self.close()

    def close(self) -> None:
        """Close the damaged file; it stays where it is."""
        if self._images is not None:
            self._images.close()
            self._images = None
            self._index.close()


def _facts(images: PageImages) -> _Facts:
    facts = _Facts({}, {}, 0)
    for page in images.of_low_pages(_FACTS_THROUGH_PAGE):
        for at in cells(page):
            with contextlib.suppress(ValueError, IndexError):
                _note(facts, record_at(images, page, at)[1], in_table=page[0] == TABLE_LEAF)
    return facts


def _note(facts: _Facts, record: list[Value], *, in_table: bool) -> None:
    """Keep what the record says, if it is of meta, counter or (before format 4) sqlite_sequence."""
    match record:
        case ["reading_row", int(seq)] if in_table:
            facts.last_seq = max(facts.last_seq, seq)
        case [str(key), str(value)] if not in_table:
            facts.meta[key] = value
        case ["last_seq", int(seq)] if not in_table:
            facts.last_seq = max(facts.last_seq, seq)
        case [str(name), int(count)] if not in_table:
            facts.counters[name] = count


def _bounds(images: PageImages, page: bytes) -> tuple[int, int] | None:
    """Return the first and the last number on a page of readings; None for any other page."""
    if page[:1] != bytes((TABLE_LEAF,)):
        return None
    places = cells(page)
    for at in places:
        if (row := _row(images, page, at)) is not None:
            try:
                return row[0], rowid_at(page, places[-1])
            except IndexError:
                return row[0], 2**63 - 1
    return None


def _row(images: PageImages, page: bytes, at: int) -> Reading | None:
    """Return the reading whose cell begins at ``at``; None if there is no whole one."""
    # A log's last image may be torn, or of an overflow page that has another use since.
    for by_log in (True, False):
        with contextlib.suppress(ValueError, IndexError):
            seq, (_, *columns) = record_at(images, page, at, by_log=by_log)
            if len(columns) != _COLUMNS:
                return None
            if isinstance(value := columns[_VALUE], int):
                columns[_VALUE] = float(value)  # SQLite stores 1.0 as 1
            row: Reading = (seq, *columns)  # type: ignore[assignment]
            if intact(row):
                return row
    return None
