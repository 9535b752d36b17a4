"""What can go wrong with the files, each with the operation, the file and the next step."""

import errno
import os
import sqlite3
from pathlib import Path

from spool.files import SIDE_SUFFIXES
from spool.readers import lock_holders
from spool.rights import wrong_owner


class SpoolError(Exception):
    """The base of all errors of the spool's files."""


class StorageFaultError(SpoolError):
    """The disk or SQLite failed; whether a commit took place is unknown. Reopen, or restart."""


class DiskFullError(StorageFaultError):
    """SQLite found no room on the disk (SQLITE_FULL). Free some, then go on."""


class FileLockedError(StorageFaultError):
    """Another process holds a lock on the file (SQLITE_BUSY), and waiting for it was given up."""


class CorruptFileError(StorageFaultError):
    """The file is no healthy database of ours (SQLITE_CORRUPT, SQLITE_NOTADB).

    Attributes:
        path: Which file.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class UnreadableFileError(StorageFaultError):
    """The disk could not read what every use of the file begins with; that may pass.

    Attributes:
        path: Which file.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class FileMissingError(SpoolError):
    """The file is not there (yet): its owner has not run, or somebody removed it."""


class WrongEnvironmentError(SpoolError):
    """The spool holds undelivered readings of another ``APP_ENV``."""


class NewerFormatError(SpoolError):
    """The file was written by a newer release than this one."""


class CursorAheadError(SpoolError):
    """A cursor points beyond the spool's last row: the spool has lost rows.

    Nothing may be skipped, so the forwarder stops with an alarm.
    """


_CORRUPT = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

_READ_FAILED = {
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
    sqlite3.SQLITE_IOERR_CORRUPTFS,
}
"""A read of the first page or of the log; one of any later page is told as SQLITE_CORRUPT."""


def translated(error: sqlite3.Error, operation: str, path: Path) -> StorageFaultError:
    """Return our error for SQLite's: two codes mean corruption, one a full disk, two a lock.

    Running out of file descriptors or a permission error must never be taken for corruption:
    setting a healthy spool aside would be a loss made by ourselves.
    """
    code = getattr(error, "sqlite_errorcode", None)
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    primary = code & 0xFF if code is not None else None
    what = f"{operation} on {path} failed: {error} ({name})"
    if primary in _CORRUPT:
        return CorruptFileError(f"{what}; the file is damaged or not ours", path)
    if primary == sqlite3.SQLITE_FULL:
        return DiskFullError(f"{what}; {_room_at(path.parent)}")
    if primary in _LOCKED:
        return FileLockedError(f"{what}; {_who_locks(path)}")
    if code in _READ_FAILED:
        return _unreadable(what, path)
    return StorageFaultError(f"{what}; {_check_the_disk(path)}")


def _unreadable(what: str, path: Path) -> UnreadableFileError:
    return UnreadableFileError(
        f"{what}; the disk cannot read it: dmesg | tail; smartctl -x DEVICE. If that does not "
        "pass, its owner sets the file aside by itself after some minutes of restarts; if its "
        "owner has not met it: supervisorctl restart collector",
        path,
    )


def _who_locks(path: Path) -> str:
    return f"it is locked by {lock_names(path)}; {unlock_remedy(path)}"


def lock_names(path: Path) -> str:
    """Return which processes keep others from writing the database ``path``, for messages."""
    return "; ".join(map(str, lock_holders(path))) or "a process that /proc/locks does not show"


def unlock_remedy(path: Path) -> str:
    """Return how to end the lock that another process holds on the database ``path``."""
    if pids := " ".join(str(holder.pid) for holder in lock_holders(path)):
        return f"end its transaction: COMMIT, or leave the shell, or: kill {pids}"
    return f"find who has it open, and end the transaction there: fuser -v {path}*"


PLENTY_BYTES = 64 * 1024 * 1024
"""More than one commit takes: where so much is free, it is not the disk that is full."""


def _room_at(directory: Path) -> str:
    """Say which file system has no room, how much it reports, and where to look.

    SQLite writes no temporary files (:func:`spool.connection.keep_temporary_in_memory`), so no
    other file system can be meant.
    """
    try:
        mount = next((p for p in (directory, *directory.parents) if p.is_mount()), directory)
        room = os.statvfs(directory)
    except OSError:
        return f"free space on the file system of {directory}: df -h {directory}"
    free_bytes = room.f_bavail * room.f_frsize
    if free_bytes < PLENTY_BYTES:
        return (
            f"the file system at {mount} has {free_bytes} bytes free; free space on it: df -h "
            f"{directory}"
        )
    return (
        f"the file system at {mount} has {free_bytes} bytes free, so a limit may be what is "
        f"reached: a quota (quota -u sluice; repquota {mount}) or the size of a file (ulimit -f)"
    )


def _check_the_disk(path: Path, *others: Path) -> str:
    directory = path.parent
    files = [path.with_name(path.name + suffix) for suffix in SIDE_SUFFIXES]
    if reason := wrong_owner([*others, *files, directory]):
        return reason
    return f"check the disk and its rights: df -h {directory}; ls -la {directory}; dmesg | tail"


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


def file_fault(error: OSError, operation: str, path: Path) -> StorageFaultError:
    """Return our error for a system call that failed on a file of the database ``path``.

    ``stat()`` can fail with EIO like any read: that is a storage fault, which a restart tries
    again, and no bug of the program.

    Args:
        error: What the system call has raised.
        operation: What was to be done: a verb and its object.
        path: The database.
    """
    what = f"{operation} of {path} failed: {error}"
    if error.errno in _NO_ROOM:
        return DiskFullError(f"{what}; {_room_at(path.parent)}")
    named = [Path(os.fsdecode(error.filename))] if isinstance(error.filename, str | bytes) else []
    return StorageFaultError(f"{what}; {_check_the_disk(path, *named)}")


def read_fault(error: OSError, operation: str, path: Path) -> UnreadableFileError:
    """Return our error for a read that failed on a file of the database ``path``.

    Args:
        error: What the system call has raised.
        operation: What was to be done: a verb and its object.
        path: The database.
    """
    return _unreadable(f"{operation} of {path} failed: {error}", path)


def undone(what: str, error: OSError, path: Path) -> StorageFaultError:
    """Return the error for what could not be done about the damaged file ``path``."""
    directory = path.parent
    return StorageFaultError(
        f"{what} failed: {error}; {path} stays where it is, nothing is lost, and the next start "
        f"looks again. Free space, or make the directory writable: df -h {directory}; "
        f"df -i {directory}; findmnt -T {directory}; ls -ld {directory}; dmesg | tail"
    )
