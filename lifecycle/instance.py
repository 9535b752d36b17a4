"""One process per role and spool: an exclusive lock on a file beside the spool.

supervisord killed with -9 leaves its children running; the next supervisord starts them a
second time, and two collectors with one client id would take the session from each other.
"""

import fcntl
import os
from pathlib import Path


class AlreadyRunningError(Exception):
    """Another process of this role holds the lock on the same spool."""


class InstanceLock:
    """Holds ``<directory>/<role>.lock`` until the process ends, however it ends."""

    def __init__(self, directory: Path, role: str) -> None:
        self._path = directory / f"{role}.lock"
        self._role = role
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            AlreadyRunningError: Another process has it; the message names the process.
            OSError: The file cannot be opened or written.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise AlreadyRunningError(
                f"another {self._role} (process {holder}) works on {self._path.parent}; two at "
                f"once are not allowed. If it is an orphan of a killed supervisord, end it: "
                f"kill {holder}"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor = descriptor
