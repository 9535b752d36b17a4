"""What the spool and the forwarders' files say, read as any operator could read it.

Plain SQL on read-only connections, and on purpose none of Sluice's own code: who checks
the books must not use the bookkeeper's pen. (Only the list of sinks is shared.)

The figures of one moment agree with each other, while everything runs: first each sink's
totals and cursor, in one transaction; then the spool's totals and what lies behind those
cursors, in one transaction. What was spooled in between counts as pending.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifecycle import SINKS

_BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class SinkFigures:
    """Where one sink stands."""

    name: str
    logged: int = 0
    dead_lettered: int = 0
    dropped: int = 0
    pending: int = 0


@dataclass(frozen=True)
class Figures:
    """Where every message is."""

    received: int
    spooled: int
    duplicates: int
    rejected: int
    sinks: tuple[SinkFigures, ...]

    @property
    def pending(self) -> int:
        """What any sink has still to get."""
        return sum(sink.pending for sink in self.sinks)


@dataclass(frozen=True)
class _SinkState:
    counters: dict[str, int]
    cursors: dict[str, int]
    """The position in each epoch of the spool; one entry, or none at first."""


def read_figures(spool_dir: Path) -> Figures:
    """Return the figures of now; zeros for what does not exist yet."""
    states = {name: _read_sink(spool_dir / f"{name}.db") for name in SINKS}
    with _reading(spool_dir / "spool.db") as spool:
        counters = _counters(spool)
        sinks = tuple(
            SinkFigures(
                name=name,
                logged=state.counters.get("logged", 0),
                dead_lettered=state.counters.get("dead_lettered", 0),
                dropped=state.counters.get("dropped", 0),
                pending=_pending(spool, state.cursors),
            )
            for name, state in states.items()
        )
    return Figures(
        received=counters.get("received", 0),
        spooled=counters.get("spooled", 0),
        duplicates=counters.get("duplicates", 0),
        rejected=counters.get("rejected", 0),
        sinks=sinks,
    )


def _read_sink(path: Path) -> _SinkState:
    with _reading(path) as sink:
        cursors = {str(epoch): seq for epoch, seq in _rows(sink, "SELECT epoch, seq FROM cursor")}
        return _SinkState(_counters(sink), cursors)


def _pending(spool: sqlite3.Connection, cursors: dict[str, int]) -> int:
    epochs = _rows(spool, "SELECT value FROM meta WHERE key = 'epoch'")
    # A cursor of another epoch says nothing about this spool.
    cursor = cursors.get(str(epochs[0][0]), 0) if epochs else 0
    counts = _rows(spool, "SELECT count(*) FROM readings WHERE seq > ?", cursor)
    return int(counts[0][0]) if counts else 0


def _counters(connection: sqlite3.Connection) -> dict[str, int]:
    return {str(name): n for name, n in _rows(connection, "SELECT name, value FROM counter")}


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open ``path`` read-only, in one transaction; an empty database where it is missing."""
    name = f"{path.as_uri()}?mode=ro" if path.exists() else "file::memory:"
    connection = sqlite3.connect(name, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    with closing(connection):
        connection.execute("BEGIN")
        yield connection


def _rows(connection: sqlite3.Connection, statement: str, *arguments: int) -> list[tuple[Any, ...]]:
    """Return all rows; none while the table is still to be made."""
    try:
        return connection.execute(statement, arguments).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
