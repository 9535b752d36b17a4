"""What is wrong with a file or its owner at present, kept in the file for people to look at.

The table ``condition`` and the view ``health`` (empty when all is well) are in spool.db and in each
sink's file. Only the file's owner writes them, and only when something changes: the log of the
process says what happened when, this says what holds now.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from spool.errors import DiskFullError
from spool.texts import shown

RETRY_S = 60.0
"""How long a condition that found no room on the disk waits for the next attempt."""

_PUT = (
    "INSERT INTO condition (name, severity, since_us, detail, remedy) VALUES (?,?,?,?,?) "
    "ON CONFLICT (name) DO UPDATE SET severity=excluded.severity, detail=excluded.detail, "
    "remedy=excluded.remedy"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that is wrong now."""

    name: str
    """A code: lower case, underscores."""
    severity: Literal["WARNING", "CRITICAL"]
    """CRITICAL: something stands still."""
    detail: str
    """What it is, with figures."""
    remedy: str
    """What to do: a command, where there is one."""


DatedCondition: TypeAlias = tuple[Condition, int]
"""A condition, and since when it holds, in microseconds since 1970 UTC."""


class ConditionFile(Protocol):
    """A file that has a table ``condition``, opened by its owner."""

    def set_conditions(self, conditions: Iterable[Condition]) -> bool:
        """Have the file hold these and no others; return whether it had to be written."""


class Conditions:
    """What the owner of a file knows to be wrong. Every part of it puts and clears its own.

    Any thread may put and clear; :meth:`store` belongs to the thread that writes the file.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._now: dict[str, Condition] = {}
        self._unsaved = True  # the file may hold what an earlier process left
        self._retry_at = float("-inf")

    def put(self, condition: Condition) -> None:
        """Say that ``condition`` holds, in the place of any of the same name."""
        # People read it in terminals, and it may hold the words of a broker or a service.
        texts = shown(condition.detail), shown(condition.remedy)
        condition = replace(condition, detail=texts[0], remedy=texts[1])
        with self._lock:
            if self._now.get(condition.name) != condition:
                self._now[condition.name] = condition
                self._unsaved = True

    def clear(self, name: str) -> None:
        """Say that the condition ``name`` is over; no matter if it never was."""
        with self._lock:
            if self._now.pop(name, None) is not None:
                self._unsaved = True

    def store(self, file: ConditionFile) -> None:
        """Bring the file up to date, if anything has changed.

        Raises:
            DiskFullError: There is no room; the next call after RETRY_S tries again.
            StorageFaultError: The file cannot be written.
        """
        if not self._unsaved or self._clock() < self._retry_at:
            return
        with self._lock:
            now = list(self._now.values())
            self._unsaved = False  # what is put while the file is written is for the next call
        try:
            file.set_conditions(now)
        except BaseException as error:
            self._unsaved = True
            if isinstance(error, DiskFullError):
                self._retry_at = self._clock() + RETRY_S
            raise


def load_conditions(conn: sqlite3.Connection) -> dict[str, Condition]:
    """Return what the file holds, by name."""
    rows = conn.execute("SELECT name, severity, detail, remedy FROM condition")
    return {name: Condition(name, *rest) for name, *rest in rows}


def dated_conditions(conn: sqlite3.Connection) -> tuple[DatedCondition, ...]:
    """Return what another process's file holds; nothing for one of an older format."""
    try:
        rows = conn.execute("SELECT name, severity, detail, remedy, since_us FROM condition")
        return tuple(
            (Condition(shown(name), severity, shown(detail), shown(remedy)), since_us)
            for name, severity, detail, remedy, since_us in rows
        )
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return ()
        raise


def write_conditions(
    conn: sqlite3.Connection, before: Mapping[str, Condition], after: Mapping[str, Condition]
) -> None:
    """Bring the table from ``before`` to ``after``, within a transaction."""
    now_us = time.time_ns() // 1000
    conn.executemany(
        "DELETE FROM condition WHERE name = ?", [(n,) for n in before if n not in after]
    )
    conn.executemany(
        _PUT,
        [
            (c.name, c.severity, now_us, c.detail, c.remedy)
            for c in after.values()
            if before.get(c.name) != c
        ],
    )
