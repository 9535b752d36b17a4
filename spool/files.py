"""The names of the files in ``SPOOL_DIR`` and which sinks there are."""

from pathlib import Path

SPOOL_FILE = "spool.db"
BALLAST_FILE = "ballast"
SIDE_SUFFIXES = ("", "-wal", "-shm")
"""A SQLite database in WAL mode is these three files, and moves as these three."""


def spool_path(directory: Path) -> Path:
    """Return the path of the file that only the collector writes."""
    return directory / SPOOL_FILE


def sink_path(directory: Path, sink: str) -> Path:
    """Return the path of the file that only the forwarder of ``sink`` writes."""
    return directory / f"{sink}.db"
