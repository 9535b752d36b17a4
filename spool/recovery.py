"""A damaged spool: set aside with all its files, never deleted, and read for what is left.

Only a corrupt database leads here (CorruptFileError). A new file with a new epoch takes its
place at once, so the collector is receiving again within seconds; the rows that can still be
read, and that some sink has not had, are copied over in steps between the batches. They get
new numbers: a sink that was ahead of the slowest one may receive some of them twice, with the
same event id.
"""

import contextlib
import json
import sqlite3
import time
from pathlib import Path

from spool.connection import open_reader
from spool.errors import SpoolError
from spool.files import SIDE_SUFFIXES
from spool.records import READING_COLUMNS, NewReading, Reading, intact, lenient_text

SALVAGE_STEP_ROWS = 1_000
SUSPICION_S = 600.0
"""Damage that is met again within this time is believed."""

_FORWARD = f"SELECT seq, {READING_COLUMNS} FROM reading_row WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608 - our own constants
_BACKWARD = (
    f"SELECT seq, {READING_COLUMNS} FROM reading_row WHERE seq > ? AND seq < ? "  # noqa: S608
    "ORDER BY seq DESC LIMIT ?"
)
_ONE = f"SELECT seq, {READING_COLUMNS} FROM reading_row WHERE seq = ?"  # noqa: S608
_LAST_SEQ = "SELECT seq FROM sqlite_sequence WHERE name = 'reading_row'"
_NO_SEQ = 2**62


def confirmed(path: Path, now_s: float | None = None) -> bool:
    """Return whether damage of the database ``path`` was met a while ago already.

    SQLite reports a page that the disk could not read (EIO) as SQLITE_CORRUPT too, and such an
    error may pass: so a file is set aside only when another process, after a restart, has found
    it damaged again. A mark beside the file says that it was found so once.

    Raises:
        OSError: The mark cannot be made.
    """
    mark = path.with_name(f"{path.name}.suspected")
    now_s = time.time() if now_s is None else now_s
    with contextlib.suppress(FileNotFoundError, ValueError):
        suspected_s = float(mark.read_text(encoding="ascii"))
        if 0 <= now_s - suspected_s <= SUSPICION_S:
            mark.unlink()
            return True
    mark.write_text(str(now_s), encoding="ascii")
    return False


def set_aside(path: Path, now_s: float | None = None) -> Path:
    """Move the database ``path``, with its -wal and -shm, out of the way; return where to.

    Call with no connection of this process open on it.

    Raises:
        OSError: It cannot be moved.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    # The side files first: should this be interrupted, the next start finds the damaged
    # database again, and not a new one beside somebody else's write-ahead log.
    for suffix in reversed(SIDE_SUFFIXES):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
    return target


class Salvage:
    """Reads a damaged spool around its damage.

    Forwards up to it, then backwards down to it; what lies between two damaged places is
    looked up number by number, which finds every row on a page that is whole.

    Args:
        path: The file that was set aside.
        after_seq: Forwards, everything up to here is read or not needed.
        before_seq: Backwards, everything from here on is read.
        forward_done: Whether the damage was reached from the front.
        backward_done: Whether it was reached from the end as well.
    """

    def __init__(
        self,
        path: Path,
        after_seq: int,
        before_seq: int = _NO_SEQ,
        *,
        forward_done: bool = False,
        backward_done: bool = False,
    ) -> None:
        self.path = path
        self._after_seq = after_seq
        self._before_seq = before_seq
        self._forward_done = forward_done
        self._backward_done = backward_done
        self.readable = 0
        """Rows given back by this object."""
        self.unreadable = 0
        """Rows that are there, but not whole."""
        self.done = False
        self._conn: sqlite3.Connection | None = None
        try:
            self._conn = open_reader(path, damaged=True)
            # A flipped bit in a text must not pass for a damaged page.
            self._conn.text_factory = lenient_text
        except SpoolError:
            self.done = True  # not even the header can be read; the caller reports it

    @property
    def epoch(self) -> str:
        """The damaged spool's epoch; empty if it cannot be read."""
        if self._conn is None:
            return ""
        try:
            row = self._conn.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
        except sqlite3.Error:
            return ""
        return str(row[0]) if row else ""

    def skip_to(self, seq: int) -> None:
        """Begin after ``seq``: every sink has what is before."""
        self._after_seq = max(self._after_seq, seq)

    def step(self) -> list[NewReading]:
        """Return the next rows that are whole; empty once :attr:`done`."""
        if self._conn is None or self.done:
            return []
        if not self._forward_done:
            rows = self._read_forward()
        else:
            rows = self._read_between() if self._backward_done else self._read_backward()
        whole = [row for row in rows if _is_whole(row)]
        self.readable += len(whole)
        self.unreadable += len(rows) - len(whole)
        return [row[1:] for row in whole]

    def position(self) -> str:
        """Return where this is, for :meth:`resumed`; empty once done."""
        if self.done:
            return ""
        done = [self._forward_done, self._backward_done]
        return json.dumps([str(self.path), self._after_seq, self._before_seq, *done])

    @classmethod
    def resumed(cls, position: str) -> "Salvage":
        """Return a salvage that goes on at ``position``."""
        path, after_seq, before_seq, forward_done, backward_done = json.loads(position)
        return cls(
            Path(path),
            after_seq,
            before_seq,
            forward_done=forward_done,
            backward_done=backward_done,
        )

    def _read_forward(self) -> list[Reading]:
        rows, damaged = self._read(_FORWARD, (self._after_seq, SALVAGE_STEP_ROWS))
        if rows:
            self._after_seq = rows[-1][0]
        if damaged:
            self._forward_done = True
        elif not rows:
            self._finish()
        return rows

    def _read_backward(self) -> list[Reading]:
        rows, damaged = self._read(
            _BACKWARD, (self._after_seq, self._before_seq, SALVAGE_STEP_ROWS)
        )
        if rows:
            self._before_seq = rows[-1][0]
        if damaged:
            self._backward_done = True
        elif not rows:
            self._finish()
        return rows[::-1]

    def _read_between(self) -> list[Reading]:
        last = self._before_seq - 1 if self._before_seq < _NO_SEQ else self._last_seq()
        through = min(last, self._after_seq + SALVAGE_STEP_ROWS)
        rows: list[Reading] = []
        failed = 0
        for seq in range(self._after_seq + 1, through + 1):
            found, damaged = self._read(_ONE, (seq,))
            rows += found
            failed += damaged
        self._after_seq = max(through, self._after_seq)
        self.unreadable += failed
        # Numbers have no holes, so a stretch with neither rows nor damage is the end too.
        if through >= last or not (rows or failed):
            self._finish()
        return rows

    def _last_seq(self) -> int:
        try:
            row = self._conn.execute(_LAST_SEQ).fetchone() if self._conn is not None else None
        except sqlite3.Error:
            row = None
        return row[0] if row and isinstance(row[0], int) else 0

    def _read(self, sql: str, parameters: tuple[int, ...]) -> tuple[list[Reading], bool]:
        """Return the rows before the damage, and whether there was any."""
        rows: list[Reading] = []
        if self._conn is None:
            return rows, True
        try:
            for row in self._conn.execute(sql, parameters):
                if rows and abs(row[0] - rows[-1][0]) != 1:
                    return rows, True  # numbers have no holes: this one is damaged
                rows.append(row)
        except (sqlite3.Error, UnicodeDecodeError):
            return rows, True  # the damage itself: what lies behind is read from the other end
        return rows, False

    def _finish(self) -> None:
        self.done = True
        self.close()

    def close(self) -> None:
        """Close the damaged file; it stays where it is."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None


def _is_whole(row: Reading) -> bool:
    try:
        return intact(row)
    except (TypeError, ValueError, AttributeError):
        return False  # the damage changed a type
