"""The lock of another process on a file: an owner waits for it, as long as it takes.

A person who writes ``BEGIN IMMEDIATE`` in the sqlite3 shell holds the file's only write lock until
he ends the transaction. That is no fault of the disk, and to end and start again would not help:
nothing is lost while the owner waits, for nothing is acknowledged or passed meanwhile. So the wait
has no limit but the wish to stop, and the log names the process that holds the lock.

Nothing about it can be stored in the file, which is locked.
"""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from spool.errors import lock_names, unlock_remedy
from spool.notices import LogNotice

LOCK_STEP_S = 0.5
"""So long SQLite itself waits; then it is looked whether to stop, and the watchdog is told."""

TELL_AFTER_S = 10.0
"""Another's recovery after a crash, or a statement of a person's, is shorter."""

REMINDER_S = 60.0

PATIENCE_S = 10.0
"""How long is waited where no owner says for how long (:class:`LockWait`, ``asked_to_stop``)."""

STOP_PATIENCE_S = 3.0
"""How long is waited once the owner should stop: most locks last some milliseconds."""

_PAUSE_S = 0.02
"""Between two tries, for the codes for which SQLite does not wait."""

T = TypeVar("T")


class LockWait:
    """Waits while another process holds a lock.

    Args:
        stands_still: Says what stands still meanwhile, for the log.
        asked_to_stop: Whether the owner should end; without it the wait ends after PATIENCE_S.
        tell: Takes what to log.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        stands_still: str = "",
        *,
        asked_to_stop: Callable[[], bool] | None = None,
        tell: Callable[[LogNotice], object] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stands_still = stands_still
        self._asked_to_stop = asked_to_stop
        self._tell = tell
        self._clock = clock
        self._gave_up = False
        self.beat: Callable[[], object] = lambda: None
        """Called at each step: to wait is lawful, so the watchdog must not take it for a fault."""

    def run(self, operation: Callable[[], T], path: Path) -> T:
        """Return what ``operation`` returns, which is tried until no lock is in its way.

        Args:
            operation: Does nothing where it meets a lock, and can be tried again.
            path: The database.

        Raises:
            sqlite3.Error: Its own; SQLITE_BUSY only once waiting was given up.
        """
        begun = self._clock()
        told_at: float | None = None
        while True:
            try:
                result = operation()
            except sqlite3.OperationalError as error:
                if not _passes(error):
                    raise
                now = self._clock()
                if self._gives_up(now - begun):
                    self._gave_up = True
                    raise
                self.beat()
                if now - begun >= TELL_AFTER_S and (told_at is None or now - told_at >= REMINDER_S):
                    told_at = now
                    self._tell(self._waiting(path, now - begun))
                time.sleep(_PAUSE_S)
            else:
                if told_at is not None:
                    waited = {"file": str(path), "waited_s": round(self._clock() - begun)}
                    self._tell(LogNotice("INFO", "file is no longer locked: goes on", waited))
                return result

    def _gives_up(self, waited_s: float) -> bool:
        if self._asked_to_stop is None:
            return waited_s >= PATIENCE_S
        # Once given up, the rest of the farewell does not wait again.
        return self._asked_to_stop() and (self._gave_up or waited_s >= STOP_PATIENCE_S)

    def _waiting(self, path: Path, waited_s: float) -> LogNotice:
        return LogNotice(
            "WARNING",
            f"file is locked by another process: {self._stands_still}",
            {
                "file": str(path),
                "locked_by": lock_names(path),
                "waited_s": round(waited_s),
                "remedy": unlock_remedy(path),
            },
        )


def _passes(error: sqlite3.Error) -> bool:
    """Return whether waiting helps: not against an own statement, nor for an old snapshot."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF == sqlite3.SQLITE_BUSY and code != sqlite3.SQLITE_BUSY_SNAPSHOT


class OwnerConnection(sqlite3.Connection):
    """The connection of a file's only writer (:func:`spool.connection.open_owner`)."""

    path: Path
    lock_wait: LockWait


def begin(conn: OwnerConnection) -> None:
    """Begin a transaction that may write, and wait for whatever lock is in its way.

    Raises:
        sqlite3.Error: It cannot be begun; SQLITE_BUSY once waiting was given up.
    """
    # IMMEDIATE: a transaction that reads and then writes could otherwise fail at once.
    conn.lock_wait.run(lambda: conn.execute("BEGIN IMMEDIATE"), conn.path)


def commit(conn: OwnerConnection) -> None:
    """Commit; after SQLITE_BUSY the transaction is still there, and is committed later.

    Raises:
        sqlite3.Error: Whether it took place is unknown.
    """
    conn.lock_wait.run(lambda: conn.execute("COMMIT"), conn.path)


def vacuum_step(conn: OwnerConnection, pages: int) -> None:
    """Hand up to ``pages`` free pages back to the file system, in a transaction of its own.

    Raises:
        sqlite3.Error: It did not work.
    """
    # It frees one page a step, and execute() makes one step only where no columns come.
    conn.lock_wait.run(lambda: conn.executescript(f"PRAGMA incremental_vacuum({pages})"), conn.path)
