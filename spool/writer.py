"""The collector's side of spool.db: it inserts, counts and deletes; nobody else writes."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

from spool.beat import COLLECTOR_LIMIT_S, OwnerBeat
from spool.bell import Bell, open_bell
from spool.brokerlink import LinkState
from spool.check import check_readable, last_seq_in_order
from spool.conditions import Condition, load_conditions, write_conditions
from spool.connection import format_version, open_owner, refuse_orphaned_log
from spool.deletion import delete_readings
from spool.errors import NewerFormatError, translated
from spool.files import spool_path
from spool.insertion import (
    ADD_COUNTER,
    KEPT_BYTES,
    REJECTED_KEPT_BYTES,
    SET_META,
    insert_readings,
    insert_rejections,
    trim_rejections,
)
from spool.locks import LockWait, OwnerConnection, begin, commit, vacuum_step
from spool.logwatch import restart_log, truncate_log, wal_bytes
from spool.progress import SET_PROGRESS, SinkProgress
from spool.records import PAYLOAD, NewReading, Rejection
from spool.spoolmaking import migrate_spool

SPOOL_FORMAT = 4

PAGE_BYTES = 2048
"""Of a new file. A commit changes some pages whatever it brings (the last page of readings, the
counters, what points to pages), so smaller ones write less where few readings share a commit:
with SQLite's usual 4096, half as much again at 200 readings a second. Still smaller ones cost
processor time at full speed: 1024, another tenth of what storing a reading takes."""

PAGES_OF_A_COMMIT = 6
"""The last page of readings, the counters, what points to pages, the list of free ones."""

BYTES_OF_A_ROW = 160
"""What a reading takes besides its payload."""

ROWS_OF_A_DELETED_PAGE = 8
UNFORESEEN = 1.5
"""So many times later SQLite makes the checkpoint itself, within a commit: the log must not become
much longer than it is meant to be, for on a full disk its room is somebody else's."""

_payload = itemgetter(PAYLOAD - 1)  # of a NewReading


class SpoolWriter:
    """spool.db, opened by its only writer.

    Every method that changes something returns after the change is on the disk, or raises.
    After a StorageFaultError the outcome is unknown: close this writer and open a new one
    before relying on anything.
    """

    def __init__(self, conn: OwnerConnection, path: Path, bell: Bell, *, created: bool) -> None:
        self._conn = conn
        self._bell = bell
        self._along: tuple[int, int] | None = None
        self.path = path
        self.lock_wait = conn.lock_wait
        """How the lock of another process is waited for."""
        self.created = created
        """Whether this opening made the file (and its epoch)."""
        (page_bytes,) = conn.execute("PRAGMA page_size").fetchone()
        self._page_bytes = int(page_bytes)
        (pages,) = conn.execute("PRAGMA wal_autocheckpoint").fetchone()
        self._checkpoint_pages = int(pages)
        self.checkpoint_in_commits(wanted=True)
        self._log_pages = self.wal_bytes() // self._page_bytes
        """About so many have been added to the write-ahead log since the last checkpoint."""
        meta = dict(conn.execute("SELECT key, value FROM meta"))
        self.epoch: str = meta["epoch"]
        self._last_seq = last_seq_in_order(conn, path)
        self._conditions = load_conditions(conn)
        self._sink_conditions: list[tuple[object, ...]] | None = None
        self.beat = OwnerBeat(self._transaction, COLLECTOR_LIMIT_S)
        """The collector's sign of life."""
        self.rejected_max_bytes = REJECTED_KEPT_BYTES
        """The limit of the ring of rejected messages from the next append on."""

    @classmethod
    def open(
        cls, directory: Path, *, synced: bool = False, lock_wait: LockWait | None = None
    ) -> "SpoolWriter":
        """Open the spool in ``directory``; make a new one, with a new epoch, if there is none.

        Args:
            directory: SPOOL_DIR.
            synced: See :func:`spool.connection.open_owner`.
            lock_wait: See there.

        Raises:
            StorageFaultError: It cannot be opened; CorruptFileError if it is damaged.
            NewerFormatError: A newer release wrote it.
        """
        path = spool_path(directory)
        refuse_orphaned_log(path)
        # Before the database: whoever can read a row can also listen.
        bell = open_bell(directory)
        try:
            conn = open_owner(path, synced=synced, lock_wait=lock_wait, page_bytes=PAGE_BYTES)
        except BaseException:
            bell.close()
            raise
        try:
            version = format_version(conn, path)
            if version > SPOOL_FORMAT:
                raise NewerFormatError(
                    f"{path} has format {version}, this release knows {SPOOL_FORMAT}; install the "
                    "release that wrote it, or move the file away once it is drained"
                )
            if version < SPOOL_FORMAT:
                migrate_spool(conn, path)
            return cls(conn, path, bell, created=version == 0)
        except sqlite3.Error as error:
            conn.close()
            bell.close()
            raise translated(error, "open", path) from error
        except BaseException:
            conn.close()
            bell.close()
            raise

    def close(self) -> None:
        """Close without raising; what was committed stays."""
        self._bell.close()
        try:
            self._conn.close()
        except sqlite3.Error:
            return  # the file is left as after a kill, which every opening can handle

    @contextmanager
    def _transaction(self, operation: str) -> "Iterator[sqlite3.Connection]":
        try:
            begin(self._conn)
            yield self._conn
            commit(self._conn)
            self._log_pages += PAGES_OF_A_COMMIT
        except sqlite3.Error as error:
            self._roll_back()
            raise translated(error, operation, self.path) from error
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        self._sink_conditions = None  # what was stored of them is taken back as well
        try:
            if self._conn.in_transaction:
                self._conn.execute("ROLLBACK")
        except sqlite3.Error:
            return  # the first error is the one to report; the caller reopens

    def _value(self, sql: str, parameters: Sequence[object] = ()) -> int:
        try:
            row = self._conn.execute(sql, parameters).fetchone()
        except sqlite3.Error as error:
            raise translated(error, "read", self.path) from error
        return int(row[0]) if row and row[0] is not None else 0

    def append(
        self,
        readings: Sequence[NewReading],
        rejections: Sequence[Rejection],
        counts: Mapping[str, int],
        progress: Sequence[SinkProgress] = (),
        meta: Mapping[str, str] | None = None,
    ) -> None:
        """Make a batch durable: readings, rejected messages and what they add to the counters.

        Args:
            readings: In the order received.
            rejections: Payloads already cut to REJECTED_PAYLOAD_BYTES.
            counts: Added to the counters of these names, in the same transaction.
            progress: A new snapshot of the sinks, if there is one; it rides along.
            meta: What else to remember in the same step.
        """
        along, self._along = self._along, None
        last_seq = self._last_seq
        with self._transaction("append") as conn:
            if along is not None:
                # Before the new rows, which then take the pages that these leave.
                seq, older_than_us = along
                deleted = delete_readings(conn, seq, "pruned", older_than_us)
                self._log_pages += deleted // ROWS_OF_A_DELETED_PAGE
            if readings:
                last_seq = insert_readings(conn, readings, self._last_seq)
            dropped = (
                insert_rejections(conn, rejections, self.rejected_max_bytes) if rejections else 0
            )
            conn.executemany(ADD_COUNTER, [(n, v) for n, v in counts.items() if v])
            if dropped:
                conn.execute(ADD_COUNTER, ("rejected_dropped", dropped))
            if progress:
                self._set_progress(conn, progress)
            if meta:
                conn.executemany(SET_META, list(meta.items()))
        self._last_seq = last_seq
        size = sum(map(len, map(_payload, readings))) + sum(len(r[4]) for r in rejections)
        self._log_pages += (size + BYTES_OF_A_ROW * len(readings)) // self._page_bytes
        if readings:
            self._bell.ring()

    def write_progress(self, progress: Sequence[SinkProgress]) -> None:
        """Store a snapshot of the sinks, and a sign of life if one is due."""
        with self._transaction("store the sinks' progress") as conn:
            self._set_progress(conn, progress)

    def _set_progress(self, conn: sqlite3.Connection, progress: Sequence[SinkProgress]) -> None:
        self.beat.write_if_due(conn)
        conn.execute("UPDATE sink_progress SET enabled = 0")  # what is gone leaves the backlog
        conn.executemany(SET_PROGRESS, [p.row(self.epoch) for p in progress])
        rows = [row for p in progress if p.enabled for row in p.condition_rows()]
        if rows != self._sink_conditions:
            conn.execute("DELETE FROM sink_condition")
            conn.executemany("INSERT INTO sink_condition VALUES (?,?,?,?,?,?)", rows)
            self._sink_conditions = rows

    def delete_through(self, seq: int, counter: str, *, older_than_us: int | None = None) -> int:
        """Delete readings up to ``seq`` and add their number to ``counter``; return it.

        Args:
            seq: The last one to go. The caller knows that nobody needs it any more.
            counter: ``pruned`` or ``dropped``.
            older_than_us: If given, only those received before this time.
        """
        with self._transaction("delete") as conn:
            deleted = delete_readings(conn, seq, counter, older_than_us)
            self._log_pages += deleted // ROWS_OF_A_DELETED_PAGE
            return deleted

    def prune_along(self, seq: int, older_than_us: int) -> None:
        """Have the next :meth:`append` do what :meth:`delete_through` does, in its transaction.

        A page that is freed and filled again in one transaction is written once. Replaces what
        was asked for before; lost with this writer, which is no harm.

        Args:
            seq: The last one to go, at most; 0 for none. The caller knows that nobody needs it
                any more.
            older_than_us: Only those received before this time.
        """
        self._along = (seq, older_than_us) if seq else None

    def first_seq(self) -> int:
        """Return the lowest seq in the spool, or one above the highest ever given."""
        return self._value("SELECT min(seq) FROM reading_row") or self.last_seq() + 1

    def last_seq(self) -> int:
        """Return the highest seq ever given in this epoch; 0 in a new file."""
        return self._last_seq

    def received_us(self, seq: int) -> int:
        """Return when the reading ``seq`` was received; 0 if it is not there."""
        return self._value("SELECT received_us FROM reading_row WHERE seq = ?", (seq,))

    def counter(self, name: str) -> int:
        """Return a counter's value; 0 if it was never touched."""
        return self._value("SELECT value FROM counter WHERE name = ?", (name,))

    def meta(self, key: str) -> str:
        """Return what ``meta`` holds under ``key``; empty if nothing."""
        try:
            row = self._conn.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise translated(error, "read", self.path) from error
        return str(row[0]) if row else ""

    def set_meta(self, key: str, value: str) -> None:
        """Store ``value`` under ``key``."""
        with self._transaction("write meta") as conn:
            conn.execute(SET_META, (key, value))

    def tail_event_ids(self, count: int) -> list[bytes]:
        """Return the ids of the last ``count`` readings, oldest first."""
        try:
            rows = self._conn.execute(
                "SELECT event_id FROM reading_row ORDER BY seq DESC LIMIT ?", (count,)
            ).fetchall()
        except sqlite3.Error as error:
            raise translated(error, "read the last event ids", self.path) from error
        return [row[0] for row in reversed(rows)]

    def check_readable(self, after_seq: int) -> None:
        """Read what a forwarder that stands at ``after_seq`` would read next.

        Raises:
            CorruptFileError: It cannot be read; so the file is damaged, and not that process.
        """
        check_readable(self._conn, self.path, after_seq)

    def used_bytes(self) -> int:
        """Return how many bytes of the database hold something (free pages do not count)."""
        pages = self._value("PRAGMA page_count") - self._value("PRAGMA freelist_count")
        return pages * self._page_bytes

    def free_bytes(self) -> int:
        """Return how many bytes of the database file are free for reuse."""
        return self._value("PRAGMA freelist_count") * self._page_bytes

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log."""
        return wal_bytes(self.path)

    def trim_rejected(self, max_bytes: int) -> int:
        """Drop the oldest rejected messages down to ``max_bytes``; return how many."""
        if self.counter(KEPT_BYTES) <= max_bytes:
            return 0
        with self._transaction("drop rejected messages") as conn:
            dropped = trim_rejections(conn, max_bytes)
            if dropped:
                conn.execute(ADD_COUNTER, ("rejected_dropped", dropped))
            return dropped

    def set_conditions(self, conditions: Iterable[Condition]) -> bool:
        """Have ``health`` show these conditions and no others; return whether that was news."""
        wanted = {c.name: c for c in conditions}
        if wanted == self._conditions:
            return False
        with self._transaction("store the conditions") as conn:
            write_conditions(conn, self._conditions, wanted)
        self._conditions = wanted
        return True

    def set_broker_link(self, state: LinkState) -> None:
        """Store whether the collector is connected to its broker."""
        with self._transaction("store the broker's state") as conn:
            conn.execute(
                "INSERT OR REPLACE INTO broker_link (id, connected, address, detail, since_us) "
                "VALUES (1, ?, ?, ?, ?)",
                (int(state.connected), state.address, state.detail, state.since_us),
            )

    def return_space(self, max_bytes: int) -> None:
        """Hand up to ``max_bytes`` of free pages back to the file system."""
        try:
            vacuum_step(self._conn, pages := max(1, max_bytes // self._page_bytes))
            self._log_pages += pages // 8  # it writes what points to them
        except sqlite3.Error as error:
            raise translated(error, "return free pages", self.path) from error

    def checkpoint_if_due(self) -> None:
        """Move the write-ahead log into the database, as far as readers allow, if it is long.

        SQLite's own checkpoint takes place within a commit, and whoever waits for that commit to
        be acknowledged waits for both. Call it after the acknowledgements.

        Raises:
            StorageFaultError: It did not work. Nothing is lost: what is in the log stays there.
        """
        if self._log_pages < self._checkpoint_pages:
            return
        self._log_pages = 0
        try:
            self._conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            raise translated(error, "checkpoint", self.path) from error

    def checkpoint(self) -> bool:
        """Move the write-ahead log into the database and cut it; return whether it was cut.

        It is not, where a reader stays longer than a moment.
        """
        return self._work_off(truncate_log)

    def restart_log(self) -> bool:
        """Move the write-ahead log into the database as far as readers allow, without waiting.

        Returns:
            Whether it begins again.
        """
        return self._work_off(restart_log)

    def _work_off(self, how: Callable[[sqlite3.Connection], bool]) -> bool:
        try:
            done = how(self._conn)
        except sqlite3.Error as error:
            raise translated(error, "checkpoint", self.path) from error
        self._log_pages = 0
        return done

    def checkpoint_in_commits(self, *, wanted: bool) -> None:
        """Have SQLite make a checkpoint within a commit where the log is unexpectedly long."""
        pages = int(UNFORESEEN * self._checkpoint_pages) if wanted else 0
        self._conn.execute(f"PRAGMA wal_autocheckpoint={pages}")
