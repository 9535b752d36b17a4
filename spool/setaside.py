"""Whether a database is to be set aside, and how: with all its files, never deleted.

Only a corrupt database leads here (CorruptFileError), or one that the disk has not been able to
read for long (UnreadableFileError). A new file with a new epoch takes its place at once, so the
collector is receiving again within seconds; :mod:`spool.recovery` reads the old one.
"""

import contextlib
import os
import time
from pathlib import Path

from spool.errors import CorruptFileError, UnreadableFileError, undone
from spool.files import SIDE_SUFFIXES

SUSPICION_S = 600.0
"""Damage that is met again within this time is believed."""

LASTING_S = 600.0
LASTING_STARTS = 10
"""A file that the disk cannot read is believed to be lost after both, without one good start. The
broker's queue holds for hours, so there is time to let an error pass."""

_MARK_SUFFIX = ".suspected"
_NOTE_SUFFIX = ".unreadable"


def confirmed(damage: CorruptFileError, now_s: float | None = None) -> bool:
    """Return whether the damage of this database was met a while ago already.

    SQLite reports a page that the disk could not read (EIO) as SQLITE_CORRUPT too, and such an
    error may pass: so a file is set aside only when another process, after a restart, has found
    it damaged again. A mark beside the file says that it was found so once.

    Raises:
        StorageFaultError: The mark cannot be made or removed: then nothing is confirmed, for
            what was met once may pass. It tells the damage too.
    """
    mark = damage.path.with_name(damage.path.name + _MARK_SUFFIX)
    now_s = time.time() if now_s is None else now_s
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):
            suspected_s = float(mark.read_text(encoding="ascii"))
            if 0 <= now_s - suspected_s <= SUSPICION_S:
                mark.unlink()
                return True
        mark.write_text(str(now_s), encoding="ascii")
    except OSError as error:
        raise undone(f"{damage}; to note that in {mark}", error, damage.path) from error
    return False


def lasting(fault: UnreadableFileError, now_s: float | None = None) -> bool:
    """Return whether the file could not be read for so long that it is to be set aside.

    Call once in each start that ends by it, and :func:`readable` after one that does not. Only
    LASTING_STARTS in a row over LASTING_S are believed: an outage of the disk's connection passes,
    and a spool that is set aside for it has its rows sent under new numbers. A note beside the
    file counts; it is synced each time, because where the disk takes no writes either, it is the
    disk that is gone, and a new file would not help.

    Raises:
        StorageFaultError: The note cannot be written. It tells the fault too.
    """
    note = fault.path.with_name(fault.path.name + _NOTE_SUFFIX)
    now_s = time.time() if now_s is None else now_s
    first_s, starts = now_s, 1
    try:
        with contextlib.suppress(FileNotFoundError, ValueError):
            first, last, count = note.read_text(encoding="ascii").split()
            # An older note is another fault's; a clock that was set back proves nothing.
            if 0 <= now_s - float(last) <= SUSPICION_S:
                first_s, starts = float(first), int(count) + 1
        with note.open("w", encoding="ascii") as file:
            file.write(f"{first_s} {now_s} {starts}")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise undone(f"{fault}; to note that in {note}", error, fault.path) from error
    return starts >= LASTING_STARTS and now_s - first_s >= LASTING_S


def readable(path: Path) -> None:
    """Forget that ``path`` could not be read: it was opened."""
    # A note that stays is too old to be believed before long.
    with contextlib.suppress(OSError):
        path.with_name(path.name + _NOTE_SUFFIX).unlink(missing_ok=True)


def set_aside(path: Path, now_s: float | None = None) -> Path:
    """Move the database ``path``, with its -wal and -shm, out of the way; return where to.

    Call with no connection of this process open on it.

    Raises:
        StorageFaultError: It cannot be moved.
    """
    try:
        return _moved(path, now_s)
    except OSError as error:
        raise undone(f"set aside {path}", error, path) from error


def _moved(path: Path, now_s: float | None) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    if not path.exists():
        # Only the log is left. Its database, of no bytes, is made first: whoever looks for what
        # was set aside looks for that.
        target.touch(0o640)
    # What was suspected of this file is not to be believed of the next one.
    for suffix in (_MARK_SUFFIX, _NOTE_SUFFIX):
        with contextlib.suppress(OSError):
            path.with_name(path.name + suffix).unlink()
    # The side files first: should this be interrupted, the next start finds the damaged
    # database again, and not a new one beside somebody else's write-ahead log.
    moved: list[tuple[Path, Path]] = []
    try:
        for suffix in reversed(SIDE_SUFFIXES):
            old, new = path.with_name(path.name + suffix), target.with_name(target.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                old.rename(new)
                moved.append((old, new))
    except OSError:
        # A database that stays needs its log: the next start may be able to read both.
        for old, new in moved:
            with contextlib.suppress(OSError):
                new.rename(old)
        raise
    return target
