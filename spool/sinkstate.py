"""A forwarder's own file: its cursor, its dead letters, its gaps, its counters.

The forwarder moves its cursor; the collector looks at it and prunes behind it.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spool.ahead import AheadStep, write_ahead
from spool.connection import format_version, open_owner
from spool.errors import NewerFormatError, translated
from spool.files import sink_path
from spool.records import READING_COLUMNS, Reading
from spool.sinkrecovery import Restored, refuse_emptied, restore

SINK_FORMAT = 3

_INSERT_DEAD = (
    f"INSERT INTO dead_letter (died_us, reason, detail, epoch, seq, {READING_COLUMNS}) "  # noqa: S608 - our own constant
    "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (epoch, seq) DO NOTHING"
)
_ADD_COUNTER = (
    "INSERT INTO counter (name, value) VALUES (?, ?) "
    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row that its service refuses for its own sake."""

    row: Reading
    reason: str
    """A code: lower case, underscores."""
    detail: str
    """The service's own words."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Rows that had left the spool before this sink saw them."""

    first_seq: int
    last_seq: int
    reason: str

    @property
    def rows(self) -> int:
        """How many."""
        return self.last_seq - self.first_seq + 1


@dataclass(slots=True)
class Settlement:
    """What is decided about the rows up to ``seq``; written in one transaction."""

    epoch: str
    seq: int
    delivered: int = 0
    dead: list[DeadLetter] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    dead_ahead: int = 0
    """Dead letters that were written while the cursor was before them, and are passed now."""


class SinkState:
    """``<sink>.db``, opened by its only writer."""

    def __init__(
        self, conn: sqlite3.Connection, path: Path, restored: Restored | None = None
    ) -> None:
        self._conn = conn
        self.path = path
        self.restored = restored
        """What the file began with, if this opening made it in the place of a damaged one."""

    @classmethod
    def open(cls, directory: Path, sink: str) -> "SinkState":
        """Open the file of ``sink`` in ``directory``; make it where it is missing.

        Raises:
            StorageFaultError: It cannot be opened; CorruptFileError if it is damaged.
            NewerFormatError: A newer release wrote it.
        """
        path = sink_path(directory, sink)
        refuse_emptied(directory, sink)
        conn = open_owner(path)
        restored: Restored | None = None

        def initialise(conn: sqlite3.Connection) -> None:
            # In the transaction that makes the file: no crash may leave one without its cursor.
            nonlocal restored
            restored = restore(conn, directory, sink) if version == 0 else None

        try:
            version = format_version(conn, path)
            if version > SINK_FORMAT:
                raise NewerFormatError(
                    f"{path} has format {version}, this release knows {SINK_FORMAT}; install the "
                    "release that wrote it"
                )
            if version < SINK_FORMAT:
                from spool.migrations import migrate, sink_migrations  # noqa: PLC0415 - see there

                migrate(conn, sink_migrations, initialise)
        except sqlite3.Error as error:
            conn.close()
            raise translated(error, "open", path) from error
        except BaseException:
            conn.close()
            raise
        return cls(conn, path, restored)

    def close(self) -> None:
        """Close; what was committed stays."""
        self._conn.close()

    @contextmanager
    def transaction(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Give out the connection within one transaction; durable when the block has ended."""
        try:
            self._conn.execute("BEGIN IMMEDIATE")
            yield self._conn
            self._conn.execute("COMMIT")
        except sqlite3.Error as error:
            if self._conn.in_transaction:
                self._conn.rollback()
            raise translated(error, operation, self.path) from error

    def position(self, epoch: str) -> int:
        """Return the last settled seq in the spool of ``epoch``; 0 for one never met."""
        row = self._cursor_row()
        return row[1] if row and row[0] == epoch else 0

    def known_epoch(self) -> str:
        """Return the epoch that the cursor belongs to; empty if there is no cursor yet."""
        row = self._cursor_row()
        return row[0] if row else ""

    def _cursor_row(self) -> tuple[str, int] | None:
        try:
            row = self._conn.execute("SELECT epoch, seq FROM cursor").fetchone()
        except sqlite3.Error as error:
            raise translated(error, "read the cursor", self.path) from error
        return (str(row[0]), int(row[1])) if row else None

    def settle(self, settlement: Settlement, ahead: AheadStep | None = None) -> None:
        """Move the cursor, with everything that explains the move, in one durable step.

        Args:
            settlement: How far, and what became of the rows.
            ahead: What changed behind the cursor, for a sink that delivers some sites ahead of
                others.
        """
        now_us = time.time_ns() // 1000
        s = settlement
        with self.transaction("move the cursor") as conn:
            new = _insert_dead(conn, s.epoch, s.dead, now_us)
            if ahead is not None:
                _insert_dead(conn, s.epoch, ahead.dead, now_us)
                write_ahead(conn, s.epoch, ahead)
            for gap in s.gaps:
                conn.execute(
                    "INSERT INTO gap (noted_us, epoch, first_seq, last_seq, reason) "
                    "VALUES (?,?,?,?,?)",
                    (now_us, s.epoch, gap.first_seq, gap.last_seq, gap.reason),
                )
            counts = {
                "delivered": s.delivered,
                "dead_lettered": new + s.dead_ahead,
                "dropped": sum(gap.rows for gap in s.gaps),
            }
            conn.executemany(_ADD_COUNTER, [(n, v) for n, v in counts.items() if v])
            # What the cursor has passed was confirmed, or is settled in another way.
            conn.execute(
                "DELETE FROM append_cut WHERE epoch <> ? OR last_seq <= ?", (s.epoch, s.seq)
            )
            conn.execute(
                "DELETE FROM append_left_out WHERE epoch <> ? OR seq <= ?", (s.epoch, s.seq)
            )
            conn.execute(
                "INSERT INTO cursor (id, epoch, seq, updated_us) VALUES (1, ?, ?, ?) ON CONFLICT "
                "(id) DO UPDATE SET epoch=excluded.epoch, seq=excluded.seq, "
                "updated_us=excluded.updated_us",
                (s.epoch, s.seq, now_us),
            )

    def set_status(self, state: str, detail: str) -> None:
        """Say what the forwarder is doing, for people and for the collector's snapshot."""
        with self.transaction("write the status") as conn:
            conn.execute(
                "INSERT INTO status (id, state, detail, since_us) VALUES (1, ?, ?, ?) ON CONFLICT "
                "(id) DO UPDATE SET state=excluded.state, detail=excluded.detail, "
                "since_us=iif(status.state = excluded.state, status.since_us, excluded.since_us)",
                (state, detail, time.time_ns() // 1000),
            )

    def note(self, key: str) -> str:
        """Return what was noted under ``key``; empty if nothing is."""
        try:
            row = self._conn.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise translated(error, f"read the note {key}", self.path) from error
        return str(row[0]) if row else ""

    def set_note(self, key: str, value: str) -> None:
        """Note ``value`` under ``key``, durably; an empty one removes the note."""
        with self.transaction(f"write the note {key}") as conn:
            if value:
                conn.execute(
                    "INSERT INTO meta (key, value) VALUES (?, ?) "
                    "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    (key, value),
                )
            else:
                conn.execute("DELETE FROM meta WHERE key = ?", (key,))

    def counters(self) -> dict[str, int]:
        """Return the running totals."""
        try:
            return dict(self._conn.execute("SELECT name, value FROM counter"))
        except sqlite3.Error as error:
            raise translated(error, "read the counters", self.path) from error


def _insert_dead(
    conn: sqlite3.Connection, epoch: str, dead: Sequence[DeadLetter], now_us: int
) -> int:
    """Insert dead letters; return how many were not there yet."""
    new = 0
    for letter in dead:
        seq, *columns = letter.row
        new += conn.execute(
            _INSERT_DEAD, (now_us, letter.reason, letter.detail, epoch, seq, *columns)
        ).rowcount
    return new


def dead_letters(rows: Sequence[Reading], reason: str, detail: str) -> list[DeadLetter]:
    """Return a dead letter for each of ``rows``, with the same reason."""
    return [DeadLetter(row, reason, detail) for row in rows]
