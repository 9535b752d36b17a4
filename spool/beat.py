"""Signs of life: each process writes one into its own file, others judge it.

The thread that does the work writes it, so a sign of life says that the path moves and not only
that a process is there. It rides along with what is committed anyway where that can be.
"""

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from spool.errors import DiskFullError
from spool.texts import shown

BEAT_S = 15.0
"""From one sign of life to the next, where nothing else is committed."""

RIDE_FROM_S = 10.0
"""A commit that takes place anyway takes one along when the last one is so old."""

COLLECTOR_LIMIT_S = 40
"""So long after the last one the collector counts as silent: two, and a slow disk."""

FORWARDER_LIMIT_S = 420
"""A delivery may wait three times for Google's client (45 s each), look for guilty rows (60 s), and
send a last request twice, without a turn of the loop."""

GONE_AFTER_S = 15.0
"""Beyond this age the process itself is looked at: it may be gone, or stopped by a signal."""

End: TypeAlias = Literal["stopped", "failed"]
Life: TypeAlias = Literal["running", "silent", "stopped", "failed"]

_BEGIN = (
    "UPDATE beat SET mode = ?, pid = ?, start_ticks = ?, started_us = ?, beat_us = ?, "
    "limit_s = ?, state = 'running', detail = ''"
)
_STAT_STATE, _STAT_START = 0, 19
"""Of /proc/PID/stat, counted from behind the command's name (proc(5): fields 3 and 22)."""


class OwnerBeat:
    """The sign of life of the process that owns a file.

    Args:
        transaction: Gives out the file's connection within a transaction.
        limit_s: Of this kind of process.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        transaction: Callable[[str], AbstractContextManager[sqlite3.Connection]],
        limit_s: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transaction = transaction
        self._limit_s = limit_s
        self._clock = clock
        self._at = float("-inf")
        self._at_us = 0

    def begin(self, mode: str) -> None:
        """Say that this process has begun, under the APP_ENV ``mode``.

        Raises:
            StorageFaultError: The file cannot be written; DiskFullError if there is no room.
        """
        now_us = time.time_ns() // 1000
        pid = os.getpid()
        stat = _stat(pid)
        ticks = stat[1] if stat else 0
        with self._transaction("write a sign of life") as conn:
            conn.execute(_BEGIN, (mode, pid, ticks, now_us, now_us, self._limit_s))
        self._at, self._at_us = self._clock(), now_us

    def write(self, conn: sqlite3.Connection) -> None:
        """Write one within a transaction that is made anyway."""
        now_us = time.time_ns() // 1000
        conn.execute("UPDATE beat SET beat_us = ?", (now_us,))
        self._at, self._at_us = self._clock(), now_us

    @property
    def due(self) -> bool:
        """Whether the last one is BEAT_S old, or looks older or younger by a clock that was set."""
        age_s = abs(time.time_ns() // 1000 - self._at_us) / 1e6
        return self._clock() - self._at >= BEAT_S or age_s >= 2 * BEAT_S

    def write_if_due(self, conn: sqlite3.Connection) -> None:
        """Write one within a transaction that is made anyway, if one is due."""
        if self.due or self._clock() - self._at >= RIDE_FROM_S:
            self.write(conn)

    def turn(self) -> None:
        """Write one if one is due; on a full disk there is none, and that shows.

        Raises:
            StorageFaultError: The file cannot be written.
        """
        if not self.due:
            return
        # On a full disk as well: it is not tried at each turn.
        self._at, self._at_us = self._clock(), time.time_ns() // 1000
        try:
            with self._transaction("write a sign of life") as conn:
                self.write(conn)
        except DiskFullError:
            return

    def end(self, state: End, detail: str) -> None:
        """Say that the process ends, and why.

        Raises:
            StorageFaultError: The file cannot be written; DiskFullError if there is no room.
        """
        with self._transaction("write the last sign of life") as conn:
            conn.execute(
                "UPDATE beat SET beat_us = ?, state = ?, detail = ?",
                (time.time_ns() // 1000, state, shown(detail)),
            )


@dataclass(frozen=True, slots=True)
class SeenBeat:
    """Another process's last sign of life."""

    mode: str
    pid: int
    start_ticks: int
    beat_us: int
    limit_s: int
    state: str
    detail: str

    @classmethod
    def read(cls, conn: sqlite3.Connection) -> "SeenBeat | None":
        """Return what a file holds; None in one of an older format."""
        try:
            row = conn.execute(
                "SELECT mode, pid, start_ticks, beat_us, limit_s, state, detail FROM beat"
            ).fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None
            raise
        if row is None:
            return None
        return cls(*row)


class LifeWatch:
    """Judges the signs of life of one other process."""

    def __init__(self) -> None:
        self._process = (0, 0)
        self._visible = False
        """Whether /proc shows the process; not where it is in another PID namespace."""

    def life(self, beat: SeenBeat, now_us: int) -> Life:
        """Return what ``beat`` says at ``now_us`` (microseconds since 1970 UTC)."""
        if beat.state in {"stopped", "failed"}:
            return "stopped" if beat.state == "stopped" else "failed"
        age_s = (now_us - beat.beat_us) / 1e6
        process = (beat.pid, beat.start_ticks)
        if abs(age_s) <= GONE_AFTER_S:
            if process != self._process:
                self._process, self._visible = process, _works(*process)
            return "running"
        if age_s > beat.limit_s:
            return "silent"
        # By a clock that was set back, the age of a dead process's last one is below zero.
        known = process != self._process or self._visible
        return "silent" if known and not _works(*process) else "running"


def _works(pid: int, start_ticks: int) -> bool:
    """Return whether it is there still, the same one, and not stopped by a signal."""
    stat = _stat(pid)
    return stat is not None and stat[1] == start_ticks and stat[0] not in "TtZX"


def _stat(pid: int) -> tuple[str, int] | None:
    """Return a process's state and start time in clock ticks; None if there is none."""
    try:
        # The command's name stands in parentheses and may hold any.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = text.rpartition(")")[2].split()
    return found[_STAT_STATE], int(found[_STAT_START])
