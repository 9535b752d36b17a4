"""The product's own counters, read as any operator could: read-only, and in plain SQL."""

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lifecycle import SINKS

_BUSY_TIMEOUT_S = 10.0
_CLI_TIMEOUT_S = 20.0
# A member of the spool's group, who has no other right.
_STRANGER = "nobody"


@dataclass(frozen=True, slots=True)
class SinkFigures:
    """Where one sink stands."""

    delivered: int
    dead_lettered: int
    dropped: int
    pending: int

    @property
    def total(self) -> int:
        """Everything that was ever spooled for it."""
        return self.delivered + self.dead_lettered + self.dropped + self.pending


@dataclass(frozen=True, slots=True)
class Figures:
    """Where every message is."""

    received: int
    spooled: int
    duplicates: int
    rejected: int
    sinks: Mapping[str, SinkFigures]


class Books:
    """What the files in a SPOOL_DIR say."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def figures(self) -> Figures:
        """Return the figures of now; zeros for what does not exist yet.

        First the sinks, then the spool: what was spooled in between counts as pending.
        """
        states = {sink: self._sink(sink) for sink in SINKS}
        with self._reading("spool") as spool:
            counters = _counters(spool)
            epoch = _rows(spool, "SELECT value FROM meta WHERE key = 'epoch'")
            sinks = {}
            for sink, (place, counts) in states.items():
                # A cursor in another spool has passed nothing of this one.
                cursor = place[0][1] if place and [place[0][:1]] == epoch else 0
                pending = _rows(spool, "SELECT count(*) FROM reading_row WHERE seq > ?", cursor)
                sinks[sink] = SinkFigures(
                    # Under APP_ENV=LOCAL the log takes the place of the service.
                    delivered=counts.get("delivered", 0) + counts.get("logged", 0),
                    dead_lettered=counts.get("dead_lettered", 0),
                    dropped=counts.get("dropped", 0),
                    pending=pending[0][0] if pending else 0,
                )
        return Figures(
            received=counters.get("received", 0),
            spooled=counters.get("spooled", 0),
            duplicates=counters.get("duplicates", 0),
            rejected=counters.get("rejected", 0),
            sinks=sinks,
        )

    def rows(self, name: str, statement: str) -> list[tuple[Any, ...]]:
        """Return what ``statement`` yields on the file ``name``.db; nothing while it is missing."""
        with self._reading(name) as connection:
            return _rows(connection, statement)

    def counter(self, name: str) -> int:
        """Return one of the collector's counters."""
        with self._reading("spool") as connection:
            return _counters(connection).get(name, 0)

    def as_operator(self, statement: str, name: str = "spool") -> list[dict[str, Any]]:
        """Return the rows that ``sqlite3 -readonly`` shows to a member of the group."""
        path = str(self.directory / f"{name}.db")
        command = ["sqlite3", "-readonly", "-json", path, statement]
        if os.getuid() == 0:
            group = self.directory.stat().st_gid
            assert group != 0, "the spool's group is one of its own"
            command = [
                "setpriv",
                f"--reuid={_STRANGER}",
                f"--regid={group}",
                "--clear-groups",
                "--",
                *command,
            ]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_CLI_TIMEOUT_S, check=False, cwd="/"
        )
        assert result.returncode == 0, f"{statement}: {result.stderr}"
        rows: list[dict[str, Any]] = json.loads(result.stdout or "[]")
        return rows

    def backlog(self, sink: str) -> dict[str, Any]:
        """Return the sink's line of ``select * from backlog``, as the operator sees it."""
        rows = {row["sink"]: row for row in self.as_operator("select * from backlog")}
        return rows.get(sink, {"pending": 0, "state": "", "detail": ""})

    def _sink(self, sink: str) -> tuple[list[tuple[Any, ...]], dict[str, int]]:
        with self._reading(sink) as connection:
            return _rows(connection, "SELECT epoch, seq FROM cursor"), _counters(connection)

    @contextmanager
    def _reading(self, name: str) -> Iterator[sqlite3.Connection]:
        """Open a file read-only, in one transaction; an empty database where it is missing."""
        path = self.directory / f"{name}.db"
        uri = f"{path.as_uri()}?mode=ro" if path.exists() else "file::memory:"
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        with closing(connection):
            connection.execute("BEGIN")
            yield connection


def _counters(connection: sqlite3.Connection) -> dict[str, int]:
    return {str(name): n for name, n in _rows(connection, "SELECT name, value FROM counter")}


def _rows(connection: sqlite3.Connection, statement: str, *values: int) -> list[tuple[Any, ...]]:
    """Return all rows; none while the table is still to be made."""
    try:
        return connection.execute(statement, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
