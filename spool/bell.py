"""How a forwarder hears of new rows without looking all the time: the collector rings.

What makes a commit visible to readers is the index of the write-ahead log, which is memory that
the processes share: the kernel has no event for it. The log's own events come too early, before
the sync; whoever looked then would see nothing, and hear nothing afterwards. So the collector
reads one byte of a file made for this after each commit. inotify(7) reports that as an access to
whoever waits for it. Nothing is written, and accesses that a forwarder has not come round to are
one event in its queue, however many there were.

A ring is a hint and no more. A forwarder looks for itself every now and then, and at short
intervals where it cannot hear: the file missing, no inotify instance left for this user, a file
system that reports nothing.
"""

import contextlib
import ctypes
import errno
import os
import select
from pathlib import Path

from spool.errors import file_fault
from spool.files import spool_path

BELL_FILE = "doorbell"
_TEXT = b"The collector reads this after each commit, which wakes the forwarders.\n"

IN_ACCESS = 0x1
"""inotify(7): the file was read."""

_EVENTS_BYTES = 4096


class Bell:
    """The collector's side: it rings."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, directory: Path) -> "Bell":
        """Open the bell in ``directory``; make it where it is missing.

        Without room on the disk there is none, and forwarders that find none look for themselves.

        Raises:
            OSError: It cannot be opened, for another reason.
        """
        path = directory / BELL_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            return cls(None)
        try:
            # Reading nothing is no access.
            if os.fstat(descriptor).st_size < len(_TEXT):
                os.pwrite(descriptor, _TEXT, 0)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return cls(None)
        return cls(descriptor)

    def ring(self) -> None:
        """Wake whoever listens. What was committed must be visible by now."""
        if self._descriptor is not None:
            # The rows are durable; a forwarder that does not hear of them finds them all the same.
            with contextlib.suppress(OSError):
                os.pread(self._descriptor, 1, 0)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def open_bell(directory: Path) -> Bell:
    """Open the bell in ``directory`` (:meth:`Bell.open`).

    Raises:
        StorageFaultError: It cannot be opened.
    """
    try:
        return Bell.open(directory)
    except OSError as error:
        raise file_fault(error, "open the bell", spool_path(directory)) from error


class Listener:
    """A forwarder's side: a descriptor that is readable once the bell has rung."""

    def __init__(self, path: Path, descriptor: int, identity: tuple[int, int]) -> None:
        self._path = path
        self._descriptor = descriptor
        self._identity = identity

    @classmethod
    def open(cls, directory: Path) -> "Listener":
        """Listen to the bell in ``directory``.

        Raises:
            OSError: It cannot be heard here.
        """
        path = directory / BELL_FILE
        descriptor = _new_inotify()
        try:
            identity = _identity(path)
            _add_watch(descriptor, path)
            made = cls(path, descriptor, identity)
            made._try_out()
        except BaseException:
            os.close(descriptor)
            raise
        return made

    def _try_out(self) -> None:
        """Ring, and make sure that it is heard: not every file system reports accesses."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(descriptor, 1, 0)
        finally:
            os.close(descriptor)
        if not select.select([self], [], [], 0)[0]:
            raise OSError(errno.ENOTSUP, "this file system does not report that a file is read")

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._descriptor

    def forget(self) -> None:
        """Forget the rings so far. Call before looking, so that a later one is not forgotten."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._descriptor, _EVENTS_BYTES):
                continue

    def replaced(self) -> bool:
        """Return whether another file has taken the bell's place, or none."""
        try:
            return _identity(self._path) != self._identity
        except OSError:
            return True  # gone, or the disk does not tell: opening it again says which

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


def _identity(path: Path) -> tuple[int, int]:
    """Tell files apart: an inode's number is given again, but not with the same time of change."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _new_inotify() -> int:
    try:
        descriptor: int = _libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    except AttributeError:
        raise OSError(errno.ENOSYS, "this system has no inotify") from None
    if descriptor < 0:
        raise _last_error("inotify_init1")
    return descriptor


def _add_watch(descriptor: int, path: Path) -> None:
    if _libc().inotify_add_watch(descriptor, os.fsencode(path), IN_ACCESS) < 0:
        raise _last_error(f"inotify_add_watch {path}")


def _last_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
