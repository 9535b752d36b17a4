"""What a sink's new file begins with, where a damaged one was set aside.

The cursor comes from the collector's snapshot in spool.db, and not from the damaged file: a
flipped bit in a cursor would skip readings, while a snapshot that is a little old only has some
sent twice. Dead letters are copied as far as they can be read, because the spool has pruned the
originals. The append journal is not copied: a wrong offset could pass rows for appended.
"""

import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from spool.connection import open_reader
from spool.errors import CorruptFileError, SpoolError
from spool.files import SIDE_SUFFIXES, sink_path, spool_path
from spool.progress import LOGGED
from spool.records import READING_COLUMNS, SELECT_LAST_SEQ, lenient_text, presentable

RESTORED = "restored"
"""The counter of how often this sink's file was set aside and begun again."""

_SNAPSHOT = (
    "SELECT m.value, coalesce((SELECT min(seq) FROM reading_row), q.seq + 1), p.cursor_seq, "  # noqa: S608 - our own constant
    "p.delivered, p.dead_letters, p.dropped, p.as_of_us "
    f"FROM sink_progress AS p, meta AS m, ({SELECT_LAST_SEQ} AS seq) AS q "
    "WHERE p.sink = ? AND m.key = 'epoch' AND p.cursor_seq <= q.seq"
)
_LOGGED = "SELECT logged FROM sink_progress WHERE sink = ?"
"""Apart: a spool that its collector has not yet brought to this release's format has none."""

_DEAD = f"SELECT died_us, reason, detail, epoch, seq, {READING_COLUMNS} FROM dead_letter"  # noqa: S608 - our own constant
_INSERT_DEAD = (
    f"INSERT INTO dead_letter (died_us, reason, detail, epoch, seq, {READING_COLUMNS}) "  # noqa: S608
    "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"
)
_INSERT_COUNTER = "INSERT INTO counter (name, value) VALUES (?, ?)"


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of a damaged file."""

    damaged: Path
    """Where it lies now."""
    seq: int
    """Where the cursor begins; 0 if there is no snapshot."""
    dead_letters: int
    """How many were copied."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    epoch: str
    first_seq: int
    """The oldest reading that is still in the spool."""
    seq: int
    delivered: int
    dead_letters: int
    dropped: int
    as_of_us: int
    logged: int = 0


def refuse_emptied(directory: Path, sink: str) -> None:
    """Refuse a file of no bytes that once held something.

    SQLite would take it for a new database, and delete the write-ahead log beside it.

    Raises:
        CorruptFileError: There is a log beside it, or the collector has seen a cursor in it.
    """
    path = sink_path(directory, sink)
    try:
        if path.stat().st_size:
            return
    except OSError:
        return  # missing, or the opening says what is wrong with it
    try:
        log_bytes = path.with_name(path.name + SIDE_SUFFIXES[1]).stat().st_size
    except OSError:
        log_bytes = 0
    if log_bytes or _has_cursor(_snapshot(directory, sink)):
        raise CorruptFileError(f"{path} is damaged: it was emptied", path)


def restore(conn: sqlite3.Connection, directory: Path, sink: str) -> Restored | None:
    """Fill a new file, within the transaction that makes it; None if none was set aside.

    Args:
        conn: The new file's, with its tables.
        directory: SPOOL_DIR.
        sink: Whose file it is.
    """
    aside = sorted(
        path
        for path in directory.glob(f"{sink_path(directory, sink).name}.damaged-*Z*")
        if not path.name.endswith(SIDE_SUFFIXES[1:])
    )
    if not aside:
        return None
    snapshot = _snapshot(directory, sink)
    conn.execute(_INSERT_COUNTER, (RESTORED, len(aside)))
    if snapshot is not None and _has_cursor(snapshot):
        conn.execute(
            "INSERT INTO cursor (id, epoch, seq, updated_us) VALUES (1, ?, ?, ?)",
            (snapshot.epoch, snapshot.seq, snapshot.as_of_us),
        )
        counts = (
            ("delivered", snapshot.delivered),
            ("dead_lettered", snapshot.dead_letters),
            ("dropped", snapshot.dropped),
            (LOGGED, snapshot.logged),
        )
        conn.executemany(_INSERT_COUNTER, counts)
    copied = _copy_dead_letters(conn, aside[-1], snapshot)
    return Restored(aside[-1], snapshot.seq if snapshot else 0, copied)


def _has_cursor(snapshot: _Snapshot | None) -> bool:
    return snapshot is not None and snapshot.seq > 0


def _snapshot(directory: Path, sink: str) -> _Snapshot | None:
    """Return what the collector last saw of the sink, in the present spool's epoch."""
    try:
        with closing(open_reader(spool_path(directory))) as spool:
            row = spool.execute(_SNAPSHOT, (sink,)).fetchone()
            logged = _logged(spool, sink)
    except (SpoolError, sqlite3.Error):
        return None  # no spool, or a damaged one: then everything in the next one is sent
    return replace(_Snapshot(*row), logged=logged) if row else None


def _logged(spool: sqlite3.Connection, sink: str) -> int:
    try:
        row = spool.execute(_LOGGED, (sink,)).fetchone()
    except sqlite3.OperationalError:
        return 0
    return int(row[0]) if row else 0


def _copy_dead_letters(conn: sqlite3.Connection, damaged: Path, snapshot: _Snapshot | None) -> int:
    """Copy what will not be delivered again; what will is refused, and buried, once more."""
    copied = 0
    again_from = max(snapshot.seq + 1, snapshot.first_seq) if snapshot else 0
    try:
        with closing(open_reader(damaged, damaged=True)) as old:
            old.text_factory = lenient_text
            for died_us, reason, detail, epoch, *row in old.execute(_DEAD):
                if snapshot is None or (epoch == snapshot.epoch and row[0] >= again_from):
                    continue
                seq, *columns = presentable((row[0], *row[1:]))
                conn.execute(_INSERT_DEAD, (died_us, reason, detail, epoch, seq, *columns))
                copied += 1
    except (SpoolError, sqlite3.Error, TypeError):
        return copied  # the damage itself: the old file stays for whoever wants to look
    return copied
