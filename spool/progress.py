"""How far each sink is, as the collector reads it from the sinks' own files."""

import sqlite3
import time
from dataclasses import dataclass, replace
from pathlib import Path

from spool.beat import Life, LifeWatch, SeenBeat
from spool.conditions import DatedCondition, dated_conditions
from spool.connection import BUSY_TIMEOUT_S, open_reader
from spool.errors import FileMissingError, SpoolError
from spool.files import sink_path
from spool.texts import shown

SPOOL_DAMAGED = "spool damaged"
"""The state of a forwarder that could not read the spool: asks the collector to look."""

LOGGED = "logged"
"""The counter of what APP_ENV=LOCAL wrote to the log in the place of the service."""

UNDECLARED = "undeclared"
"""The state of a sink whose file lies in SPOOL_DIR, but which this release does not know."""


# What was last seen of a file that cannot be read now is what a new one begins with.
SET_PROGRESS = (
    "INSERT INTO sink_progress (sink, enabled, cursor_seq, delivered, dead_letters, dropped, "
    "logged, state, detail, as_of_us, mode, state_since_us, beat_us, life) "
    "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (sink) DO UPDATE SET "
    "enabled=excluded.enabled, state=excluded.state, detail=excluded.detail, "
    "as_of_us=excluded.as_of_us, mode=excluded.mode, state_since_us=excluded.state_since_us, "
    "beat_us=excluded.beat_us, life=excluded.life, "
    "(cursor_seq, delivered, dead_letters, dropped, logged) = ("
    "SELECT iif(seen, excluded.cursor_seq, cursor_seq), iif(seen, excluded.delivered, delivered), "
    "iif(seen, excluded.dead_letters, dead_letters), iif(seen, excluded.dropped, dropped), "
    "iif(seen, excluded.logged, logged) "
    "FROM (SELECT excluded.state NOT IN ('no file', 'unreadable') AS seen))"
)
"""Takes a :meth:`SinkProgress.row`."""


@dataclass(frozen=True, slots=True)
class SinkProgress:
    """One sink's position at one moment."""

    sink: str
    enabled: bool
    epoch: str = ""
    seq: int = 0
    delivered: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    state: str = "no file"
    detail: str = ""
    as_of_us: int = 0
    declared: bool = True
    logged: int = 0
    """Under APP_ENV=LOCAL: written to the log, and not sent."""
    mode: str = ""
    """The forwarder's APP_ENV."""
    state_since_us: int = 0
    beat_us: int = 0
    """The forwarder's last sign of life; 0 if there is none."""
    life: Life = "running"
    conditions: tuple[DatedCondition, ...] = ()
    """What the forwarder knows to be wrong with its file."""

    def position_in(self, epoch: str) -> int:
        """Return the cursor if it belongs to ``epoch``, else 0: then it has passed nothing."""
        return self.seq if self.epoch == epoch else 0

    def row(self, epoch: str) -> tuple[object, ...]:
        """Return the columns of ``sink_progress`` for the spool of ``epoch``."""
        return (
            self.sink,
            int(self.enabled),
            self.position_in(epoch),
            self.delivered,
            self.dead_lettered,
            self.dropped,
            self.logged,
            self.state,
            self.detail,
            self.as_of_us,
            self.mode,
            self.state_since_us,
            self.beat_us,
            self.life,
        )

    def condition_rows(self) -> list[tuple[object, ...]]:
        """Return the rows of ``sink_condition``."""
        return [
            (self.sink, c.name, c.severity, since_us, c.detail, c.remedy)
            for c, since_us in self.conditions
        ]

    def same_as(self, other: "SinkProgress") -> bool:
        """Return whether nothing but the times of the looks and of the signs of life differ."""
        return replace(self, as_of_us=0, beat_us=0) == replace(other, as_of_us=0, beat_us=0)


class SinkFile:
    """A sink's file as the collector sees it: kept open, opened again when it was replaced.

    Args:
        directory: SPOOL_DIR.
        sink: Whose file it is.
        enabled: Whether readings are kept until this sink has them.
        declared: Whether this release has a sink of that name.
    """

    def __init__(self, directory: Path, sink: str, *, enabled: bool, declared: bool = True) -> None:
        self._path = sink_path(directory, sink)
        self._sink = sink
        self._enabled = enabled
        self._declared = declared
        self._conn: sqlite3.Connection | None = None
        self._inode = 0
        self._watch = LifeWatch()
        self.was_read = False
        """Whether it could be read at least once: then it is a sink's file for certain."""

    def read(self) -> SinkProgress:
        """Return the sink's progress.

        A file that is missing or cannot be read counts as a cursor at 0, so nothing is
        pruned on its account; the state and the detail say so. Never raises for it.
        """
        now_us = time.time_ns() // 1000
        try:
            conn = self._connection()
            cursor = conn.execute("SELECT epoch, seq FROM cursor").fetchone()
            counters = dict(conn.execute("SELECT name, value FROM counter"))
            status = conn.execute("SELECT state, detail, since_us FROM status").fetchone()
            beat = SeenBeat.read(conn)
            conditions = dated_conditions(conn)
        except (SpoolError, sqlite3.Error, OSError) as error:
            self.close()
            missing = isinstance(error, FileMissingError | FileNotFoundError)
            state = "no file" if missing else "unreadable"
            return SinkProgress(
                self._sink,
                self._enabled,
                state=state,
                detail=str(error) if self._declared else f"{self._advice()} {error}",
                as_of_us=now_us,
                declared=self._declared,
                life="silent",
            )
        self.was_read = True
        epoch, seq = cursor or ("", 0)
        state, detail, state_since_us = status or ("starting", "", 0)
        if beat is not None and beat.state == "failed":
            detail = beat.detail
        if not self._declared:
            state, detail = UNDECLARED, f"{self._advice()} Its own state: {state}."
        return SinkProgress(
            sink=self._sink,
            enabled=self._enabled,
            epoch=epoch,
            seq=seq,
            delivered=counters.get("delivered", 0),
            dead_lettered=counters.get("dead_lettered", 0),
            dropped=counters.get("dropped", 0),
            state=state,
            detail=shown(detail),
            as_of_us=now_us,
            declared=self._declared,
            logged=counters.get(LOGGED, 0),
            mode=beat.mode if beat else "",
            state_since_us=state_since_us,
            beat_us=beat.beat_us if beat else 0,
            life=self._life(beat, now_us),
            conditions=conditions if self._declared else (),
        )

    def _life(self, beat: SeenBeat | None, now_us: int) -> Life:
        if beat is None:
            # Its forwarder has not come up since this release was installed.
            return "silent" if self._declared else "running"
        return self._watch.life(beat, now_us)

    def _advice(self) -> str:
        path = self._path
        return (
            f"No sink of this release has the file {path}; the readings behind its cursor are kept "
            f"for it. Install the release that knows it; or, if nothing delivers from it any more, "
            f"move it away: mv {path}* /another/directory."
        )

    def _connection(self) -> sqlite3.Connection:
        inode = self._path.stat().st_ino
        if self._conn is None or inode != self._inode:
            self.close()
            # A sink's file never makes a reader wait; another one may, and the collector's
            # writer must not: a copy in the making is locked for as long as that takes.
            timeout_s = BUSY_TIMEOUT_S if self._declared else 0.0
            self._conn = open_reader(self._path, timeout_s=timeout_s)
            self._inode = inode
        return self._conn

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._conn is not None:
            self._conn.close()
            self._conn = None
