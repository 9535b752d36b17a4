"""The write-ahead log of a file: worked off, or held by a reader that does not end.

A read transaction sees the file as it was when it began, so a checkpoint copies nothing that was
committed later, and the log cannot begin again: it grows with each commit for as long as the
reader lives (https://www.sqlite.org/wal.html, "Avoiding Excessively Large WAL Files"). A pager on
``select`` is enough. What is in the log is as durable as anything, so this is not a fault; but the
disk is finite, and :class:`LogWatch` says when it is enough.

States, by the size of the log: up to WAL_KEPT_BYTES it is working room. Above that, checkpoints are
tried again and again; if one does not get through, the log is *pinned*: its owner is to commit
seldom. At the bound the log is *full*: its owner is to commit nothing until that is over.
"""

import shutil
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from spool.conditions import Condition, Conditions
from spool.connection import WAL_KEPT_BYTES
from spool.errors import file_fault
from spool.files import SIDE_SUFFIXES
from spool.locks import LOCK_STEP_S
from spool.notices import LogNotice
from spool.readers import LogReader, log_readers

LOG_PINNED = "log_pinned"
"""The name of the condition."""

LOOK_INTERVAL_S = 0.5
TRIES_BEFORE_PINNED = 3
"""A forwarder reads for some milliseconds at a time: it is no reader that stays."""

LOOKS_TO_SUSPECT = 3
"""Who is found reading in so many looks in a row is named, and who is found in fewer is not."""

COSTLY_TRY_S = 0.05
COSTLY_TRY_SHARE = 20
"""A reader that began when the log was worked off lets SQLite sort the whole index of the log
before it finds that nothing can be done. Then the tries take at most one part in this many of the
time, unless a reader that was there has left."""

SLOW_DISK_BYTES_PER_S = 1024 * 1024
"""At the least so fast is a log worked off."""

STILL_FULL_SHARE = 0.9

PINNED_REMINDER_S = 900.0
FULL_REMINDER_S = 60.0

CHECKPOINT_WAIT_S = 0.5
"""How long cutting the log waits for short readers. Above it there is one who stays, and waiting
for him would stop the owner."""


class LogOwner(Protocol):
    """The only writer of a file, as :class:`LogWatch` needs it."""

    path: Path

    def wal_bytes(self) -> int:
        """Return the size of the write-ahead log."""

    def restart_log(self) -> bool:
        """Work the log off and let it begin again, without waiting; return whether it does."""

    def checkpoint_in_commits(self, *, wanted: bool) -> None:
        """Let SQLite make checkpoints of its own within commits, or not."""


def log_bound_bytes(max_bytes: int) -> int:
    """Return how large a log may become while a reader pins it.

    Args:
        max_bytes: SPOOL_MAX_BYTES.
    """
    return WAL_KEPT_BYTES + max_bytes


class LogWatch:
    """Watches the write-ahead log of one file, for its owner.

    Args:
        max_bytes: SPOOL_MAX_BYTES; the bound is :func:`log_bound_bytes`. It is lower where the disk
            has less room: what is in the log must go into the database one day, which grows by
            up to as much.
        stands_still: Says what stands still at the bound, for messages.
        before_try: Told before each attempt to work the log off how many seconds it may take.
        clock: Seconds, monotonic.
        free_bytes: Returns the free space where a path is.
        readers: Returns who reads a database.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        max_bytes: int,
        *,
        stands_still: str,
        before_try: Callable[[float], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
        readers: Callable[[Path], Sequence[LogReader]] = log_readers,
    ) -> None:
        self._max_bytes = max_bytes
        self._stands_still = stands_still
        self.before_try = before_try
        self._clock = clock
        self._free_bytes = free_bytes
        self._readers = readers
        self._looked_at = float("-inf")
        self._try_from = float("-inf")
        self._bound = log_bound_bytes(max_bytes)
        self._tries = 0
        self._seen: deque[frozenset[LogReader]] = deque(maxlen=LOOKS_TO_SUSPECT)
        self._told: tuple[bool, frozenset[LogReader]] | None = None
        self._told_at = float("-inf")
        self.pinned = False
        """Whether a reader keeps the log from beginning again: commit seldom."""
        self.full = False
        """Whether the log is at its bound: commit nothing."""
        self.condition: Condition | None = None
        """For the file's table; None while all is well."""

    def look(self, owner: LogOwner) -> LogNotice | None:
        """Look at the log if that is due, try to work it off where it is long; return what to log.

        Call it between transactions, after the acknowledgements, as often as you like.

        Raises:
            StorageFaultError: A checkpoint failed for another reason than a reader.
        """
        now = self._clock()
        if now - self._looked_at < LOOK_INTERVAL_S and not self._reaches_bound(owner):
            return None
        self._looked_at = now
        log_bytes = owner.wal_bytes()
        if log_bytes <= WAL_KEPT_BYTES or self._restarted(owner, log_bytes):
            return self._over(owner)
        if self._tries < TRIES_BEFORE_PINNED:
            return None
        self.pinned = True
        # Within each commit, in vain, they would take longer and longer. Said at each look, for
        # the owner may have opened the file again.
        owner.checkpoint_in_commits(wanted=False)
        self._bound = bound = self._bound_bytes(owner.path, log_bytes)
        # Once it is full, a little room on the disk more or less does not matter.
        self.full = log_bytes >= (STILL_FULL_SHARE * bound if self.full else bound)
        return self._notice(owner.path, log_bytes, bound)

    def _reaches_bound(self, owner: LogOwner) -> bool:
        """Return whether the bound was reached since the last look: a burst does not wait."""
        return self.pinned and not self.full and owner.wal_bytes() >= self._bound

    def _bound_bytes(self, path: Path, log_bytes: int) -> int:
        try:
            free = self._free_bytes(path.parent)
        except OSError as error:
            raise file_fault(error, "look for free space", path) from error
        return min(log_bound_bytes(self._max_bytes), (log_bytes + free) // 2)

    def report_to(self, conditions: Conditions) -> None:
        """Have ``conditions`` say whether the log is pinned."""
        if self.condition is None:
            conditions.clear(LOG_PINNED)
        else:
            conditions.put(self.condition)

    def _restarted(self, owner: LogOwner, log_bytes: int) -> bool:
        now = frozenset(self._readers(owner.path))
        left = bool(self._seen) and bool(self._suspects() - now)
        self._seen.append(now)
        begun = self._clock()
        if begun < self._try_from and not left:
            return False
        self.before_try(log_bytes / SLOW_DISK_BYTES_PER_S)
        if owner.restart_log():
            return True
        self._tries += 1
        took_s = self._clock() - begun
        if took_s >= COSTLY_TRY_S:
            self._try_from = begun + COSTLY_TRY_SHARE * took_s
        return False

    def _suspects(self) -> frozenset[LogReader]:
        """Return who was reading each time: a forwarder that is met once is not to blame."""
        return frozenset.intersection(*self._seen)

    def _over(self, owner: LogOwner) -> LogNotice | None:
        self._tries = 0
        self._seen.clear()
        self._try_from = float("-inf")
        if not self.pinned:
            return None
        self.pinned = self.full = False
        self.condition = None
        self._told = None
        owner.checkpoint_in_commits(wanted=True)
        return LogNotice(
            "INFO",
            "write-ahead log is no longer pinned: it was worked off and begins again",
            {"file": str(owner.path), "log_bytes": owner.wal_bytes()},
        )

    def _notice(self, path: Path, log_bytes: int, bound: int) -> LogNotice | None:
        """Bring the condition up to date, and return a line where one is due."""
        readers = self._suspects()
        told = (self.full, readers)
        now = self._clock()
        due_s = FULL_REMINDER_S if self.full else PINNED_REMINDER_S
        if self._told is not None and self._told[0] == self.full:
            # Who reads may differ at each look, so that alone is told once a minute.
            due_s = min(due_s, FULL_REMINDER_S) if readers != self._told[1] else due_s
            if now - self._told_at < due_s:
                return None
        self._told, self._told_at = told, now
        names = "; ".join(str(r) for r in sorted(readers, key=lambda r: r.pid))
        remedy = _remedy(path, readers)
        detail = f"{path.name}-wal has {log_bytes} bytes; pinned by {names or 'a reader'}; " + (
            f"at its bound of {bound} bytes: {self._stands_still}"
            if self.full
            else f"at {bound} bytes {self._stands_still}"
        )
        self.condition = Condition(
            LOG_PINNED, "CRITICAL" if self.full else "WARNING", detail, remedy
        )
        values: dict[str, object] = {
            "file": str(path),
            "log_bytes": log_bytes,
            "bound_bytes": bound,
            "readers": names or "unknown",
            "remedy": remedy,
        }
        if self.full:
            message = (
                f"write-ahead log is at its bound: {self._stands_still}, until the reader that "
                "pins it has ended"
            )
            return LogNotice("CRITICAL", message, values)
        return LogNotice("WARNING", "write-ahead log is pinned by a reader", values)


def _remedy(path: Path, readers: frozenset[LogReader]) -> str:
    if readers:
        pids = " ".join(str(pid) for pid in sorted(r.pid for r in readers))
        return f"End it: leave the pager or shell, or: kill {pids}"
    return (
        "End what reads it; /proc/locks does not show who it is (another container?): "
        f"fuser -v {path}{SIDE_SUFFIXES[2]}"
    )


# --- what owners do with their connection


def wal_bytes(path: Path) -> int:
    """Return the size of the write-ahead log of the database ``path``.

    Raises:
        StorageFaultError: The file system does not tell.
    """
    try:
        return path.with_name(path.name + SIDE_SUFFIXES[1]).stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise file_fault(error, "look for the write-ahead log", path) from error


def restart_log(conn: sqlite3.Connection) -> bool:
    """Work the log off as far as readers allow; if that is to the end, cut it.

    Returns:
        Whether it begins again.
    """
    _, in_log, done = conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return in_log == done and truncate_log(conn)


def truncate_log(conn: sqlite3.Connection) -> bool:
    """Work the log off and cut it, waiting CHECKPOINT_WAIT_S for readers at most.

    Returns:
        Whether it was cut; not, if a reader stays.
    """
    conn.execute(f"PRAGMA busy_timeout={int(1000 * CHECKPOINT_WAIT_S)}")
    try:
        busy, _, _ = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        conn.execute(f"PRAGMA busy_timeout={int(1000 * LOCK_STEP_S)}")
    return not busy
