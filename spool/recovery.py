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
from spool.records import READING_COLUMNS, NewReading, Reading, intact

SALVAGE_STEP_ROWS = 1_000
_FORWARD = f"SELECT seq, {READING_COLUMNS} FROM reading_row WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608 - our own constants
_BACKWARD = (
    f"SELECT seq, {READING_COLUMNS} FROM reading_row WHERE seq > ? AND seq < ? "  # noqa: S608
    "ORDER BY seq DESC LIMIT ?"
)
_NO_SEQ = 2**62


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
    """Reads a damaged spool around its damage: forwards up to it, then backwards down to it.

    Args:
        path: The file that was set aside.
        after_seq: Forwards, everything up to here is read or not needed.
        before_seq: Backwards, everything from here on is read.
        forward_done: Whether the damage was reached from the front.
    """

    def __init__(
        self, path: Path, after_seq: int, before_seq: int = _NO_SEQ, *, forward_done: bool = False
    ) -> None:
        self.path = path
        self._after_seq = after_seq
        self._before_seq = before_seq
        self._forward_done = forward_done
        self.readable = 0
        """Rows given back by this object."""
        self.unreadable = 0
        """Rows whose checksum was wrong."""
        self.done = False
        self._conn: sqlite3.Connection | None = None
        try:
            self._conn = open_reader(path)
        except SpoolError:
            self.done = True  # not even the header can be read; the caller reports it

    def step(self) -> list[NewReading]:
        """Return the next rows that are whole; empty once :attr:`done`."""
        if self._conn is None or self.done:
            return []
        rows = self._read_backward() if self._forward_done else self._read_forward()
        whole = [row for row in rows if _is_whole(row)]
        self.readable += len(whole)
        self.unreadable += len(rows) - len(whole)
        return [row[1:] for row in whole]

    def position(self) -> str:
        """Return where this is, for :meth:`resumed`; empty once done."""
        if self.done:
            return ""
        return json.dumps([str(self.path), self._after_seq, self._before_seq, self._forward_done])

    @classmethod
    def resumed(cls, position: str) -> "Salvage":
        """Return a salvage that goes on at ``position``."""
        path, after_seq, before_seq, forward_done = json.loads(position)
        return cls(Path(path), after_seq, before_seq, forward_done=forward_done)

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
        if damaged or not rows:
            self._finish()
        return rows[::-1]

    def _read(self, sql: str, parameters: tuple[int, ...]) -> tuple[list[Reading], bool]:
        """Return the rows before the damage, and whether there was any."""
        rows: list[Reading] = []
        if self._conn is None:
            return rows, True
        try:
            for row in self._conn.execute(sql, parameters):
                if not isinstance(row[0], int):
                    return rows, True
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
