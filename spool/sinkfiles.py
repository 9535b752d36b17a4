"""The files of all sinks in one ``SPOOL_DIR``: the declared ones, and those that no sink declares.

A sink that is added, but that the collector has not been told of (an older release runs, or a line
was forgotten), must not have its readings pruned before it has read them. So every database of
Sluice's that holds a cursor counts as a sink, whatever its name, until it is moved away.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from spool.connection import APPLICATION_ID, open_reader
from spool.errors import FileMissingError, SpoolError
from spool.files import SPOOL_FILE, sink_path
from spool.progress import SinkFile

_SUFFIX = ".db"
"""So neither ``pubsub.db.damaged-…`` nor ``pubsub.db.bak``: no forwarder works on such a name."""

_TABLES = (
    "SELECT count(*), count(*) FILTER (WHERE name IN ('cursor', 'dead_letter')) "
    "FROM sqlite_schema WHERE type = 'table'"
)
_SINK_TABLES = 2

_Stamp = tuple[int, int, int]
"""Inode, size and time of change: a file with the same ones was looked at before."""


class SinkFiles:
    """Iterates over the sinks' files; each iteration looks into the directory.

    Args:
        directory: SPOOL_DIR.
        declared: Every sink of this release, and whether it is enabled.
    """

    def __init__(self, directory: Path, declared: Mapping[str, bool]) -> None:
        self._directory = directory
        self._declared = [SinkFile(directory, s, enabled=on) for s, on in declared.items()]
        self._names = {SPOOL_FILE, *(sink_path(directory, sink).name for sink in declared)}
        self._undeclared: dict[str, SinkFile] = {}
        self._others: dict[str, _Stamp] = {}
        """What is no sink's file, by name."""

    def __iter__(self) -> Iterator[SinkFile]:
        """Yield the declared sinks' files, then those that no sink declares."""
        self._look()
        yield from self._declared
        yield from self._undeclared.values()

    def _look(self) -> None:
        try:
            found = {
                path.name
                for path in self._directory.iterdir()
                # No sink has a name with control characters, or one that is not UTF-8.
                if path.suffix == _SUFFIX and path.name.isprintable()
            }
        except OSError:
            return  # what was known to be a sink's holds on; the next look comes within seconds
        # What could never be read is judged again: it may have been a copy in the making.
        never_read = {name for name, file in self._undeclared.items() if not file.was_read}
        for name in (self._undeclared.keys() - found) | never_read:
            self._undeclared.pop(name).close()
        for name in sorted(found - self._names - self._undeclared.keys()):
            path = self._directory / name
            if self._is_sink(path):
                self._undeclared[name] = SinkFile(
                    self._directory, path.stem, enabled=True, declared=False
                )

    def _is_sink(self, path: Path) -> bool:
        """Return whether the file is a sink's, as far as that can be told.

        A file that cannot be read counts as one, one that is no database does not.
        """
        try:
            status = path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._others.get(path.name) == stamp:
                return False
            application, tables, sinks_tables = _contents(path)
        except (FileNotFoundError, FileMissingError):
            return False  # gone again, or still empty
        except (SpoolError, sqlite3.Error, OSError) as error:
            if not (_no_database(error) or _no_database(error.__cause__)):
                return True
            self._others[path.name] = stamp
            return False
        if application == APPLICATION_ID and sinks_tables == _SINK_TABLES:
            return True
        if tables:  # one without any is being made: its tables come without a change of the file
            self._others[path.name] = stamp
        return False


def _contents(path: Path) -> tuple[int, int, int]:
    """Return application id, number of tables, and how many of those are a sink's."""
    with closing(open_reader(path, timeout_s=0.0)) as conn:
        (application,) = conn.execute("PRAGMA application_id").fetchone()
        tables, sinks_tables = conn.execute(_TABLES).fetchone()
        return application, tables, sinks_tables


def _no_database(error: BaseException | None) -> bool:
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB
