"""Makes the write-ahead log durable that the last owner of a database has left.

After an fdatasync that failed, Linux marks the pages that it could not write as clean: they stay
in the page cache, the next sync reports success, and they never reach the disk
(https://wiki.postgresql.org/wiki/Fsync_Errors). SQLite's recovery reads the log through that cache.
A commit whose sync failed is then there again after a restart, and a power cut takes it away,
with every later commit behind it: its frames are missing in the log's chain of checksums. Writing
the same bytes again makes the pages dirty, and the sync behind that means what it says.

So an owner does it whenever it opens its file, before it believes anything that it reads. It needs
no note that a sync has failed: on a disk that fails, a note may be lost as well.
"""

import os
from pathlib import Path

from spool.errors import file_fault, read_fault
from spool.files import SIDE_SUFFIXES
from spool.locks import OwnerConnection, begin

STEP_BYTES = 1024 * 1024

PART_MAX_BYTES = 128 * 1024 * 1024
"""Of a longer log only so much at its begin and at its end is written again. What can be unsynced
is one transaction, the last, which is far smaller: the earlier ones were synced each in its turn. A
log this long was kept from a reset by a reader, so its last frames are at its end; or it has
just been reset, so they are at its begin."""


def rewrite_log(conn: OwnerConnection, path: Path) -> None:
    """Write the log of ``path`` again, byte for byte, and sync it.

    Args:
        conn: The owner's connection. SQLite's write lock is held meanwhile: no other connection
            can append to the log, whose bytes would be overwritten with older ones.
        path: The database.

    Raises:
        StorageFaultError: The log cannot be written or synced (UnreadableFileError: read): what
            it says may be gone after a power cut, so nothing may rely on it.
        sqlite3.Error: The write lock cannot be had.
    """
    log = path.with_name(path.name + SIDE_SUFFIXES[1])
    try:
        if not log.stat().st_size:
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise file_fault(error, "look for the write-ahead log", path) from error
    begin(conn)
    try:
        _rewrite(log, path)
    except OSError as error:
        raise file_fault(error, "sync the write-ahead log", path) from error
    finally:
        conn.execute("ROLLBACK")


def _rewrite(log: Path, path: Path) -> None:
    # Not the database and not its -shm: closing those by hand would take SQLite's POSIX locks
    # away from this process. SQLite has no locks on the log.
    descriptor = os.open(log, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        for begin, end in _parts(size):
            for offset in range(begin, end, STEP_BYTES):
                try:
                    data = os.pread(descriptor, min(STEP_BYTES, end - offset), offset)
                except OSError as error:
                    raise read_fault(error, "read the write-ahead log", path) from error
                _write_all(descriptor, data, offset)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        if not written:
            raise OSError(f"nothing was written at offset {offset}")
        data, offset = data[written:], offset + written


def _parts(size: int) -> list[tuple[int, int]]:
    """Return which parts of a log of ``size`` bytes are written again: begin and end of each."""
    if size <= 2 * PART_MAX_BYTES:
        return [(0, size)]
    return [(0, PART_MAX_BYTES), (size - PART_MAX_BYTES, size)]
