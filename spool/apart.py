"""Making and migrating spool.db in a process of its own, for the memory that it takes."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from spool.files import spool_path
from spool.writer import SPOOL_FORMAT

_USER_VERSION = slice(60, 64)
"""Where a database has the number of its format (SQLite's file format, the header)."""


def prepare_apart(directory: Path, environ: Mapping[str, str]) -> None:
    """Have a short-lived process bring the spool in ``directory`` to the current format.

    sqlite-utils would otherwise stay in the memory of a process that runs for months. Call with
    no connection of this process open on the file. Nothing is raised, and what went wrong is not
    told: the caller opens the file next, meets the same obstacle and says so; had only the
    process failed, the caller migrates for itself.

    Args:
        directory: SPOOL_DIR.
        environ: The environment of that process.
    """
    if _is_current(spool_path(directory)):
        return
    command = [sys.executable, "-m", "spool.migrations", os.fspath(directory)]
    try:
        process = os.posix_spawn(sys.executable, command, environ)
    except OSError:
        return
    os.waitpid(process, 0)


def _is_current(path: Path) -> bool:
    """Return whether the file itself says so; what only its write-ahead log has does not count."""
    try:
        with path.open("rb") as file:
            head = file.read(_USER_VERSION.stop)
    except OSError:
        return False
    return int.from_bytes(head[_USER_VERSION], "big") == SPOOL_FORMAT
