"""``python -m tests.torture.broken CHANGE collector``: the product, changed on purpose.

A suite that finds nothing has to show that it would have found something. Each mutation takes
away one rule that the promise rests on; everything else is the product as it is. One change is
none: `OFTEN` only lets the write-ahead logs be moved into the databases, and delivered rows leave,
so often that a short run has many such moments.
"""

import sqlite3
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from collector import __main__ as collector
from collector.store import Store
from forwarder import __main__ as forwarder
from forwarder.appendstream import AppendStream
from forwarder.batch import Checked
from forwarder.batch_delivery import BatchDelivery, Failed
from forwarder.storage import StorageSink
from lifecycle import leave
from spool import (
    AppendJournal,
    Cut,
    Journal,
    Retention,
    Settlement,
    SinkProgress,
    SpoolReader,
    SpoolWriter,
    connection,
    retention,
)


def _sync_less() -> None:
    """Commits do not wait for the disk: ``synchronous=NORMAL``."""
    configure = connection._configure_owner  # noqa: SLF001 - what is to be broken

    def configure_less(conn: sqlite3.Connection) -> None:
        configure(conn)
        conn.execute("PRAGMA synchronous=NORMAL")

    _replace(connection, "_configure_owner", configure_less)


def _acknowledge_first() -> None:
    """The broker hears "received" before the commit."""
    commit = Store._commit  # noqa: SLF001 - what is to be broken

    def commit_late(self: Any, group: Any) -> bool:  # noqa: ANN401 - stands for a method
        for generation, acks in group.acks:
            self._acknowledge(generation, acks)
        group.acks = []
        return commit(self, group)

    _replace(Store, "_commit", commit_late)


def _prune_past_the_slowest() -> None:
    """One sink is enough for a row to go."""

    def fastest(_: Retention, writer: SpoolWriter, sinks: Sequence[SinkProgress]) -> int:
        return max(p.position_in(writer.epoch) for p in sinks)

    _replace(Retention, "slowest", fastest)
    _prune_often()


def _move_the_cursor_first() -> None:
    """The cursor passes rows that no service has confirmed."""
    deliver = BatchDelivery.deliver

    def deliver_late(self: Any, reader: SpoolReader, batch: Checked) -> Failed | None:  # noqa: ANN401 - stands for a method
        rows = batch.rows
        self._state.settle(Settlement(reader.epoch, rows[-1][0], len(rows)))
        self.settle_durably = lambda _: None
        return deliver(self, reader, batch)

    _replace(BatchDelivery, "deliver", deliver_late)


def _journal_last() -> None:
    """What an append holds is noted after it was sent."""
    add, append = AppendJournal.add, StorageSink._append  # noqa: SLF001 - what is to be broken
    waiting: list[tuple[Any, ...]] = []

    def add_later(self: AppendJournal, epoch: str, cuts: Iterable[Cut], *left_out: Any) -> None:  # noqa: ANN401 - as it comes
        waiting.append((self, epoch, list(cuts), *left_out))

    def append_first(*arguments: Any) -> None:  # noqa: ANN401 - stands for a method
        try:
            append(*arguments)
        finally:
            while waiting:
                add(*waiting.pop(0))

    _replace(AppendJournal, "add", add_later)
    _replace(StorageSink, "_append", append_first)


def _forget_what_was_read() -> None:
    """The append journal is emptied as soon as a new process has it in its memory."""
    load = AppendJournal.load

    def load_once(self: AppendJournal, epoch: str) -> Journal:
        journal = load(self, epoch)
        with self._state.transaction("forget the append journal") as conn:
            conn.execute("DELETE FROM append_cut")
        return journal

    _replace(AppendJournal, "load", load_once)


def _fold_the_log_in_carelessly() -> None:
    """What the last life left in the log is moved into the database at opening, unsynced."""
    configure = connection._configure_owner  # noqa: SLF001 - what is to be broken

    def configure_and_fold(conn: sqlite3.Connection) -> None:
        configure(conn)
        conn.execute("PRAGMA synchronous=OFF")
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        conn.execute("PRAGMA synchronous=FULL")

    _replace(connection, "_configure_owner", configure_and_fold)


def _believe_the_log() -> None:
    """What the last life left in the log counts as durable, because it can be read."""
    _replace(connection, "rewrite_log", lambda *_: None)


MUTATIONS: dict[str, Callable[[], None]] = {
    "synchronous=NORMAL": _sync_less,
    "PUBACK before COMMIT": _acknowledge_first,
    "prune past the slowest cursor": _prune_past_the_slowest,
    "cursor before confirmation": _move_the_cursor_first,
    "journal after sending": _journal_last,
}

OF_THE_SECOND_LIFE: dict[str, Callable[[], None]] = {
    "journal forgotten once read": _forget_what_was_read,
    "log folded in without syncs": _fold_the_log_in_carelessly,
}
"""What does no harm in a first life, whose files are empty: only a power cut during the recovery
from another one can find it."""

OF_A_FAILED_SYNC: dict[str, Callable[[], None]] = {
    "log believed after a failed sync": _believe_the_log,
}
"""What only a sync that failed can show."""


def _take_up_an_earlier_stream() -> None:
    """What an earlier run's stream takes is appended there, as if no other had done so since."""
    _replace(AppendStream, "is_earlier", property(lambda self: not self.left and not self.name))


OF_COPIES: dict[str, Callable[[], None]] = {
    "earlier stream taken up": _take_up_an_earlier_stream,
}
"""What does no harm while there is one machine, and its files are never put back."""

OFTEN = "checkpoints and pruning often"
_OFTEN_PAGES = 5
"""Of 4 KiB: 10 of the spool's own, 20 of a sink's file, where a commit is two to four."""

_OFTEN_ROWS = 50


def _checkpoint_and_prune_often() -> None:
    _replace(connection, "WAL_CHECKPOINT_PAGES", _OFTEN_PAGES)
    _prune_often()


def _prune_often() -> None:
    """Rows leave by the dozen: a short run would end before there are as many as are worth it."""
    _replace(retention, "WORTH_ROWS", _OFTEN_ROWS)


def _replace(owner: object, name: str, substitute: object) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"{owner!r} no longer has {name}")
    setattr(owner, name, substitute)


if __name__ == "__main__":
    changes = MUTATIONS | OF_THE_SECOND_LIFE | OF_A_FAILED_SYNC | OF_COPIES
    {**changes, OFTEN: _checkpoint_and_prune_often}[sys.argv[1]]()
    program, *arguments = sys.argv[2:]
    leave(collector.main() if program == "collector" else forwarder.main(arguments))
