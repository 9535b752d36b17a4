"""The one place that opens database files. Each pragma carries its reason."""

import os
import sqlite3
from pathlib import Path

from spool.errors import (
    CorruptFileError,
    DiskFullError,
    FileMissingError,
    StorageFaultError,
    file_fault,
    translated,
)
from spool.files import SIDE_SUFFIXES
from spool.locks import LOCK_STEP_S, LockWait, OwnerConnection
from spool.log_sync import rewrite_log

BUSY_TIMEOUT_S = 10.0
"""How long a reader waits: another's recovery after a crash, or a person in the sqlite3 shell."""

WAL_KEPT_BYTES = 64 * 1024 * 1024
"""A write-ahead log that a long reader made grow is cut back to this."""

WAL_CHECKPOINT_PAGES = 1000
"""Of USUAL_PAGE_BYTES each; of smaller ones as many more."""

USUAL_PAGE_BYTES = 4096
"""SQLite's, where nothing else is asked for."""

FILE_MODE = 0o640

_never_closed: list[sqlite3.Connection] = []
"""Connections that must live until the process ends: see :func:`open_owner`."""

APPLICATION_ID = 0x536C7563
"""'Sluc': tells our files from another program's (SQLite's file format, offset 68)."""


def refuse_orphaned_log(path: Path) -> None:
    """Refuse to begin a database beside the write-ahead log of one that is gone.

    SQLite would take the file for a new one, and delete the log with the rows in it.

    Raises:
        CorruptFileError: There is such a log.
    """
    try:
        if path.stat().st_size:
            return
    except FileNotFoundError:
        pass
    except OSError:
        return  # the opening says what is wrong with it
    try:
        log_bytes = path.with_name(path.name + SIDE_SUFFIXES[1]).stat().st_size
    except OSError:
        return
    if log_bytes:
        raise CorruptFileError(f"{path} is damaged: it is gone or empty, and its log is not", path)


def open_owner(
    path: Path,
    *,
    synced: bool = False,
    lock_wait: LockWait | None = None,
    page_bytes: int = USUAL_PAGE_BYTES,
) -> OwnerConnection:
    """Open ``path`` as its only writer, and create it where it is missing.

    What its write-ahead log holds is on the disk when this returns (:mod:`spool.log_sync`).

    Args:
        path: The database.
        synced: Whether this very process has synced all that the log holds, and no sync has
            failed: then the log is not written again. On a full disk a file is opened twice a
            second.
        lock_wait: How the lock of another process is waited for, now and by
            :func:`spool.locks.begin`; by default some seconds.
        page_bytes: The size of a new file's pages; one that is there keeps its own.

    Raises:
        StorageFaultError: It cannot be opened, or its log cannot be synced; CorruptFileError if
            it is no database.
    """
    try:
        # SQLite gives -wal and -shm the mode of the database, so the mode is set before the
        # first byte is written.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
        conn = sqlite3.connect(
            path,
            timeout=LOCK_STEP_S,
            isolation_level=None,
            check_same_thread=False,
            factory=OwnerConnection,
        )
    except sqlite3.Error as error:
        raise translated(error, "open", path) from error
    except OSError as error:
        raise file_fault(error, "open", path) from error
    conn.path = path
    conn.lock_wait = lock_wait or LockWait()
    try:
        # First of all: already some of the settings are a commit, which stands behind the others.
        if not synced:
            rewrite_log(conn, path)
        conn.execute(f"PRAGMA page_size={page_bytes}")
        conn.lock_wait.run(lambda: _configure_owner(conn), path)
    except sqlite3.Error as error:
        conn.close()
        raise translated(error, "open", path) from error
    except DiskFullError:
        conn.close()
        raise
    except StorageFaultError:
        # The last connection to close moves the log into the database and deletes it. Of a log
        # that is not whole on the disk, a power cut could then bring back the beginning, whose
        # pages are older than the database's.
        _never_closed.append(conn)
        raise
    return conn


def _configure_owner(conn: sqlite3.Connection) -> None:
    # Given before the first table, it lets a spool that was once large return its space.
    conn.execute("PRAGMA auto_vacuum=INCREMENTAL")
    # Readers never block the writer, and one sync makes a commit durable.
    conn.execute("PRAGMA journal_mode=WAL")
    # A commit returns after its fdatasync. With NORMAL the last commits may be gone after a
    # power cut, although the broker heard "received".
    conn.execute("PRAGMA synchronous=FULL")
    conn.execute(f"PRAGMA journal_size_limit={WAL_KEPT_BYTES}")
    (page_bytes,) = conn.execute("PRAGMA page_size").fetchone()
    pages = WAL_CHECKPOINT_PAGES * USUAL_PAGE_BYTES // page_bytes
    conn.execute(f"PRAGMA wal_autocheckpoint={pages}")
    # Debian's SQLite overwrites what is deleted with zeros, and so writes pages that are free.
    conn.execute("PRAGMA secure_delete=OFF")
    # What a person might have left behind in the schema must not run code.
    conn.execute("PRAGMA trusted_schema=OFF")
    # 2 MiB of page cache: rows are appended and read in order, so more does not help.
    conn.execute("PRAGMA cache_size=-2048")
    keep_temporary_in_memory(conn)


def keep_temporary_in_memory(conn: sqlite3.Connection) -> None:
    """Have SQLite write no temporary file.

    An INSERT of several rows keeps a statement journal. Beyond 64 KiB it spills to a file in
    SQLite's temporary directory (SQLITE_TMPDIR, TMPDIR, /var/tmp, /tmp), and a full or read-only
    file system there would fail a commit although the spool's own disk has room
    (https://www.sqlite.org/tempfiles.html, sections 2.6 and 3). A statement journal holds the
    pages that one statement changes, so the memory is bounded by a batch.
    """
    conn.execute("PRAGMA temp_store=MEMORY")


def open_reader(
    path: Path, *, damaged: bool = False, timeout_s: float = BUSY_TIMEOUT_S
) -> sqlite3.Connection:
    """Open ``path`` read-only, as everybody but its owner does.

    Never ``immutable=1``: that promises that nobody writes, and gives wrong answers when
    somebody does.

    Args:
        path: The database.
        damaged: Whether to go as far as possible where the file is known to be damaged.
        timeout_s: How long to wait for a lock.

    Raises:
        FileMissingError: There is no such file, or it is still empty.
        StorageFaultError: It cannot be opened.
    """
    try:
        if path.stat().st_size == 0:
            raise FileMissingError(f"{path} is empty: its owner has not begun it yet")
        conn = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro",
            uri=True,
            timeout=timeout_s,
            isolation_level=None,
            check_same_thread=False,
        )
    except FileNotFoundError as error:
        raise FileMissingError(f"{path} does not exist: its owner has not run yet") from error
    except sqlite3.Error as error:
        raise translated(error, "open for reading", path) from error
    except OSError as error:
        raise file_fault(error, "open", path) from error
    try:
        conn.execute("PRAGMA query_only=ON")
        if damaged:
            # Of no use to a reader but for this: a file that is shorter than its header says
            # is then read as far as it goes (lockBtree in SQLite's btree.c).
            conn.execute("PRAGMA writable_schema=ON")
        conn.execute("PRAGMA cache_size=-2048")
        keep_temporary_in_memory(conn)
        conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        conn.close()
        raise translated(error, "open for reading", path) from error
    return conn


def format_version(conn: sqlite3.Connection, path: Path) -> int:
    """Return the format that the file has; 0 for one that holds nothing yet.

    Raises:
        CorruptFileError: It is a database, but another program's.
    """
    try:
        (version,) = conn.execute("PRAGMA user_version").fetchone()
        (application,) = conn.execute("PRAGMA application_id").fetchone()
        (objects,) = conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        raise translated(error, "read the format", path) from error
    if objects and application != APPLICATION_ID:
        raise CorruptFileError(f"{path} is a database, but not one of Sluice's", path)
    return int(version) if objects else 0
