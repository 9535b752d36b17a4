"""Which processes read or lock a database right now, as far as the kernel tells.

A read transaction holds a shared lock on one byte of the shared-memory file ``-shm`` for as long as
it lasts (SQLite's os_unix.c and wal.c, "WAL-Index Locking"). ``/proc/locks`` lists the locks of
all processes of this PID namespace with their process ids (proc_locks(5)).

The one write transaction of a database in WAL mode holds a byte of ``-shm`` as well, exclusively. A
connection in rollback mode, or one with ``locking_mode=EXCLUSIVE``, locks bytes of the database
itself (os_unix.c, "PENDING_BYTE").

The file itself must not be opened here: closing any descriptor of it would release the locks that
SQLite holds for this process (POSIX advisory locks, fcntl(2)).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from spool.files import SIDE_SUFFIXES

READ_LOCK_BYTES = range(123, 128)
"""UNIX_SHM_BASE (120) + WAL_READ_LOCK(i) (3 + i), for i from 0 to 4. Byte 128 is the dead man's
switch, which everybody who has the file open holds."""

WRITE_LOCK_BYTES = range(120, 128)
"""WAL_WRITE_LOCK, WAL_CKPT_LOCK, WAL_RECOVER_LOCK, and the read locks that a checkpoint takes
exclusively."""

FILE_LOCK_BYTES = range(0x40000000, 0x40000000 + 512)
"""PENDING_BYTE, RESERVED_BYTE and the 510 SHARED bytes of the database itself."""

COMMAND_MAX_CHARS = 160

_PROC = Path("/proc")
_FIELDS = 8
"""number: POSIX ADVISORY READ pid major:minor:inode first last; a lock that waits has "->" more."""


@dataclass(frozen=True, slots=True)
class LogReader:
    """A process that is within a transaction."""

    pid: int
    command: str = ""
    """Its command line; empty where the kernel does not show it."""

    def __str__(self) -> str:
        """Return it as it stands in messages."""
        return f"process {self.pid} ({self.command or 'its command is not visible'})"


def log_readers(path: Path, proc: Path = _PROC) -> list[LogReader]:
    """Return who is within a read transaction on the database ``path``, but this process.

    Nothing is raised: where the kernel tells nothing, no process is named.

    Args:
        path: The database.
        proc: Where procfs is.
    """
    return _named(
        _holders(path.with_name(path.name + SIDE_SUFFIXES[2]), "READ", READ_LOCK_BYTES, proc), proc
    )


def lock_holders(path: Path, proc: Path = _PROC) -> list[LogReader]:
    """Return who keeps others from writing the database ``path``, but this process.

    Nothing is raised: where the kernel tells nothing, no process is named.

    Args:
        path: The database.
        proc: Where procfs is.
    """
    shm = path.with_name(path.name + SIDE_SUFFIXES[2])
    return _named(
        _holders(shm, "WRITE", WRITE_LOCK_BYTES, proc)
        | _holders(path, "WRITE", FILE_LOCK_BYTES, proc),
        proc,
    )


def _named(pids: set[int], proc: Path) -> list[LogReader]:
    return [LogReader(pid, _command(proc / str(pid))) for pid in sorted(pids - {os.getpid()})]


def _holders(file: Path, mode: str, locked: range, proc: Path) -> set[int]:
    try:
        stat = file.stat()
        lines = (proc / "locks").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    exact: set[int] = set()
    alike: set[int] = set()
    for line in lines:
        words = line.split()
        if len(words) != _FIELDS or words[1] != "POSIX" or words[3] != mode:
            continue
        try:
            pid, first = int(words[4]), int(words[6])
            on, _, number = words[5].rpartition(":")
            if int(number) != stat.st_ino or first not in locked or pid <= 0:
                continue
        except ValueError:
            continue
        (exact if on == device else alike).add(pid)
    # btrfs and overlayfs show another device in stat() than in /proc/locks. An inode number of
    # another file system may be the same by chance, so it counts only where nothing else does.
    return exact or alike


def _command(process: Path) -> str:
    for name in ("cmdline", "comm"):
        try:
            raw = (process / name).read_bytes()
        except OSError:
            continue  # it has ended, or is another user's and hidden (hidepid=)
        text = raw.replace(b"\0", b" ").decode("utf-8", "replace").strip()
        if text:
            shown = "".join(c if c.isprintable() else "?" for c in text)
            return shown[:COMMAND_MAX_CHARS]
    return ""
