"""A forwarder's own file: its cursor, its dead letters, its gaps, its counters.

The forwarder moves its cursor; the collector looks at it and prunes behind it.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spool.ahead import AheadStep, write_ahead
from spool.beat import FORWARDER_LIMIT_S, OwnerBeat
from spool.conditions import Condition, load_conditions, write_conditions
from spool.connection import format_version, open_owner
from spool.dead_letters import DEAD_LETTER_MAX_BYTES, DeadLetter, DeadLetters
from spool.errors import NewerFormatError, translated
from spool.files import sink_path
from spool.lag import CursorLag
from spool.locks import LockWait, OwnerConnection, begin, commit, vacuum_step
from spool.logwatch import restart_log, wal_bytes
from spool.sinkrecovery import Restored, refuse_emptied, restore

SINK_FORMAT = 5

GAP_ROWS_MAX = 10_000
"""The newest are kept: with drop-oldest each batch can leave one, for as long as the service is
slower than the sensors. The counter ``dropped`` has the sum of all of them."""

PAGE_BYTES = 1024
"""Of a new file. Each commit writes whole pages, and what moves the cursor is some thirty bytes in
each of two: measured, 6.2 KB a commit instead of 12.5; 5.2 with 512. But the work of handing free
pages back grows with the square of their number: 32 MB take 0.7 s instead of 0.14; 4.9 with 512."""

RETURN_STEP_BYTES = 1024 * 1024
"""In one transaction, so that none takes long."""

GAPS_FORGOTTEN = "gaps_forgotten"
"""The counter of rows that the table ``gap`` has given up for newer ones."""

_ADD_COUNTER = (
    "INSERT INTO counter (name, value) VALUES (?, ?) "
    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
)


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

    @property
    def only_moves(self) -> bool:
        """Whether there is nothing to note but how far the cursor has moved."""
        return not (self.dead or self.gaps or self.dead_ahead)


class SinkState:
    """``<sink>.db``, opened by its only writer."""

    def __init__(
        self,
        conn: OwnerConnection,
        path: Path,
        restored: Restored | None = None,
        dead_letter_max_bytes: int = DEAD_LETTER_MAX_BYTES,
    ) -> None:
        self._conn = conn
        self.path = path
        self._conditions = load_conditions(conn)
        self._lag = CursorLag()
        (self._checkpoint_pages,) = conn.execute("PRAGMA wal_autocheckpoint").fetchone()
        self.restored = restored
        """What the file began with, if this opening made it in the place of a damaged one."""
        self.dead_letters = DeadLetters(self, dead_letter_max_bytes)
        self.beat = OwnerBeat(self.transaction, FORWARDER_LIMIT_S)
        """The forwarder's sign of life; goes along where the cursor moves."""
        self.delivered_counter = "delivered"
        """Which counter a delivery adds to: ``logged`` where readings are logged and not sent."""

    @classmethod
    def open(
        cls,
        directory: Path,
        sink: str,
        dead_letter_max_bytes: int = DEAD_LETTER_MAX_BYTES,
        lock_wait: LockWait | None = None,
    ) -> "SinkState":
        """Open the file of ``sink`` in ``directory``; make it where it is missing.

        Args:
            directory: SPOOL_DIR.
            sink: Its name.
            dead_letter_max_bytes: DEAD_LETTER_MAX_BYTES.
            lock_wait: See :func:`spool.connection.open_owner`.

        Raises:
            StorageFaultError: It cannot be opened; CorruptFileError if it is damaged.
            NewerFormatError: A newer release wrote it.
        """
        path = sink_path(directory, sink)
        refuse_emptied(directory, sink)
        conn = open_owner(path, lock_wait=lock_wait, page_bytes=PAGE_BYTES)
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
            state = cls(conn, path, restored, dead_letter_max_bytes)
            state.dead_letters.note_limit()
        except sqlite3.Error as error:
            conn.close()
            raise translated(error, "open", path) from error
        except BaseException:
            conn.close()
            raise
        return state

    def close(self) -> None:
        """Close; what was committed stays."""
        self._conn.close()

    @contextmanager
    def transaction(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Give out the connection within one transaction; durable when the block has ended.

        A step of the cursor that was kept back goes along: nothing newer is durable without it.
        """
        try:
            begin(self._conn)
            self._write_lag(self._conn)
            yield self._conn
            commit(self._conn)
        except sqlite3.Error as error:
            if self._conn.in_transaction:
                self._conn.rollback()
            raise translated(error, operation, self.path) from error
        except BaseException:
            if self._conn.in_transaction:
                self._conn.rollback()
            raise
        self._lag.clear()

    def let_cursor_lag(self, max_s: float, max_rows: float, clock: Callable[[], float]) -> None:
        """Allow that delivered rows are noted later; the caller sees to :meth:`catch_up`.

        Args:
            max_s: By so many seconds at most.
            max_rows: And fewer than so many rows.
            clock: Seconds, monotonic.
        """
        self._lag.allow(max_s, max_rows, clock)

    @property
    def lag_due_in_s(self) -> float | None:
        """In how many seconds to call :meth:`catch_up`; None if everything is noted."""
        return self._lag.due_in_s() if self._lag.epoch else None

    def catch_up(self) -> None:
        """Note durably what was delivered.

        Raises:
            StorageFaultError: The file cannot be written; DiskFullError if there is no room. What
                was delivered is then still to be noted.
        """
        if self._lag.epoch:
            with self.transaction("move the cursor"):
                pass  # what was kept back goes along

    def _write_lag(self, conn: sqlite3.Connection) -> None:
        """Move the cursor as far as was delivered, within a transaction."""
        lag = self._lag
        # Of another epoch than the file's it is where a commit that failed did take place.
        if not lag.epoch or lag.epoch != self.known_epoch():
            return
        passed = lag.seq - self._noted(lag.epoch)
        # None where a commit that failed did take place.
        if passed > 0:
            self._move(conn, lag.epoch, lag.seq, {self.delivered_counter: passed})

    def position(self, epoch: str) -> int:
        """Return the last settled seq in the spool of ``epoch``; 0 for one never met."""
        return self._lag.position(epoch, self._noted(epoch))

    def _noted(self, epoch: str) -> int:
        """Return how far the file's cursor is in the spool of ``epoch``."""
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

    def remembered(self, key: str) -> str:
        """Return what :meth:`remember` has stored under ``key``; empty if nothing."""
        try:
            row = self._conn.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise translated(error, "read meta", self.path) from error
        return str(row[0]) if row else ""

    def remember(self, values: Mapping[str, str]) -> None:
        """Store texts by their keys, durably, all or none."""
        with self.transaction("write meta") as conn:
            conn.executemany(
                "INSERT INTO meta (key, value) VALUES (?, ?) "
                "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                list(values.items()),
            )

    def settle(self, settlement: Settlement, ahead: AheadStep | None = None) -> None:
        """Move the cursor, with everything that explains the move, in one durable step.

        A step over delivered rows alone may be kept back (:meth:`let_cursor_lag`).

        Args:
            settlement: How far, and what became of the rows.
            ahead: What changed behind the cursor, for a sink that delivers some sites ahead of
                others.
        """
        if ahead is None and self._may_wait(settlement):
            self._lag.keep(settlement.epoch, settlement.seq)
            return
        now_us = time.time_ns() // 1000
        s = settlement
        with self.transaction("move the cursor") as conn:
            new = self.dead_letters.add(conn, s.epoch, s.dead, now_us) if s.dead else 0
            if ahead is not None:
                self.dead_letters.add(conn, s.epoch, ahead.dead, now_us)
                write_ahead(conn, s.epoch, s.seq, ahead)
            for gap in s.gaps:
                conn.execute(
                    "INSERT INTO gap (noted_us, epoch, first_seq, last_seq, reason) "
                    "VALUES (?,?,?,?,?)",
                    (now_us, s.epoch, gap.first_seq, gap.last_seq, gap.reason),
                )
            counts = {
                self.delivered_counter: s.delivered,
                "dead_lettered": new + s.dead_ahead,
                "dropped": sum(gap.rows for gap in s.gaps),
                GAPS_FORGOTTEN: _forget_gaps(conn) if s.gaps else 0,
            }
            self._move(conn, s.epoch, s.seq, counts)

    def _may_wait(self, settlement: Settlement) -> bool:
        """Return whether ``settlement`` is a step over delivered rows that may be kept back."""
        s = settlement
        if not s.only_moves or s.epoch != self.known_epoch():
            return False
        noted = self._noted(s.epoch)
        delivered = s.seq - self._lag.position(s.epoch, noted)
        return 0 < delivered == s.delivered and self._lag.may_wait(s.seq - noted)

    def _move(
        self, conn: sqlite3.Connection, epoch: str, seq: int, counts: Mapping[str, int]
    ) -> None:
        """Move the file's cursor and add to the counters, within a transaction."""
        conn.executemany(_ADD_COUNTER, [(n, v) for n, v in counts.items() if v])
        # What the cursor has passed was confirmed, or is settled in another way.
        conn.execute("DELETE FROM append_cut WHERE epoch <> ? OR last_seq <= ?", (epoch, seq))
        conn.execute("DELETE FROM append_left_out WHERE epoch <> ? OR seq <= ?", (epoch, seq))
        conn.execute(
            "INSERT INTO cursor (id, epoch, seq, updated_us) VALUES (1, ?, ?, ?) ON CONFLICT "
            "(id) DO UPDATE SET epoch=excluded.epoch, seq=excluded.seq, "
            "updated_us=excluded.updated_us",
            (epoch, seq, time.time_ns() // 1000),
        )
        self.beat.write_if_due(conn)
        self._lag.moved()

    def set_status(self, state: str, detail: str) -> None:
        """Say what the forwarder is doing, for people and for the collector's snapshot."""
        with self.transaction("write the status") as conn:
            conn.execute(
                "INSERT INTO status (id, state, detail, since_us) VALUES (1, ?, ?, ?) ON CONFLICT "
                "(id) DO UPDATE SET state=excluded.state, detail=excluded.detail, "
                "since_us=iif(status.state = excluded.state, status.since_us, excluded.since_us)",
                (state, detail, time.time_ns() // 1000),
            )

    def return_space(self) -> None:
        """Hand the free pages back to the file system.

        Raises:
            StorageFaultError: The file cannot be written.
        """
        try:
            (free,) = self._conn.execute("PRAGMA freelist_count").fetchone()
            (page_bytes,) = self._conn.execute("PRAGMA page_size").fetchone()
            pages = RETURN_STEP_BYTES // page_bytes
            for _ in range(0, free, pages):
                vacuum_step(self._conn, pages)
        except sqlite3.Error as error:
            raise translated(error, "return free pages", self.path) from error

    def set_conditions(self, conditions: Iterable[Condition]) -> bool:
        """Have ``health`` show these conditions and no others; return whether that was news."""
        wanted = {c.name: c for c in conditions}
        if wanted == self._conditions:
            return False
        with self.transaction("store the conditions") as conn:
            write_conditions(conn, self._conditions, wanted)
        self._conditions = wanted
        return True

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log."""
        return wal_bytes(self.path)

    def restart_log(self) -> bool:
        """Move the write-ahead log into the database as far as readers allow, without waiting.

        Returns:
            Whether it begins again.
        """
        try:
            return restart_log(self._conn)
        except sqlite3.Error as error:
            raise translated(error, "checkpoint", self.path) from error

    def checkpoint_in_commits(self, *, wanted: bool) -> None:
        """Have SQLite make checkpoints within commits, as it does by itself."""
        pages = self._checkpoint_pages if wanted else 0
        self._conn.execute(f"PRAGMA wal_autocheckpoint={pages}")

    def counters(self) -> dict[str, int]:
        """Return the running totals."""
        try:
            self.catch_up()
            return dict(self._conn.execute("SELECT name, value FROM counter"))
        except sqlite3.Error as error:
            raise translated(error, "read the counters", self.path) from error


def _forget_gaps(conn: sqlite3.Connection) -> int:
    """Delete the oldest of too many gaps; return how many."""
    return conn.execute(
        "DELETE FROM gap WHERE id <= (SELECT max(id) FROM gap) - ?", (GAP_ROWS_MAX,)
    ).rowcount
