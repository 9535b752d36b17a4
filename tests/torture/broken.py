"""``python -m tests.torture.broken CHANGE collector``: the product, changed on purpose.

A suite that finds nothing has to show that it would have found something. Each mutation takes
away one rule that the promise rests on; everything else is the product as it is. One change is
none: `OFTEN` only lets the write-ahead logs be moved into the databases so often that a short
run has many such moments.
"""

import sqlite3
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from collector import __main__ as collector
from collector.store import Store
from forwarder import __main__ as forwarder
from forwarder.drain import Drain
from forwarder.storage import StorageSink
from lifecycle import leave
from spool import (
    AppendJournal,
    Cut,
    Reading,
    Retention,
    Settlement,
    SinkProgress,
    SpoolReader,
    SpoolWriter,
    connection,
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


def _move_the_cursor_first() -> None:
    """The cursor passes rows that no service has confirmed."""
    deliver = Drain._deliver  # noqa: SLF001 - what is to be broken

    def deliver_late(self: Any, reader: SpoolReader, rows: list[Reading]) -> None:  # noqa: ANN401 - stands for a method
        self._state.settle(Settlement(reader.epoch, rows[-1][0], len(rows)))
        self._settle_durably = lambda _: None
        deliver(self, reader, rows)

    _replace(Drain, "_deliver", deliver_late)


def _journal_last() -> None:
    """What an append holds is noted after it was sent."""
    add, append = AppendJournal.add, StorageSink._append  # noqa: SLF001 - what is to be broken
    waiting: list[tuple[AppendJournal, str, list[Cut]]] = []

    def add_later(self: AppendJournal, epoch: str, cuts: Iterable[Cut]) -> None:
        waiting.append((self, epoch, list(cuts)))

    def append_first(*arguments: Any) -> None:  # noqa: ANN401 - stands for a method
        try:
            append(*arguments)
        finally:
            while waiting:
                add(*waiting.pop(0))

    _replace(AppendJournal, "add", add_later)
    _replace(StorageSink, "_append", append_first)


MUTATIONS: dict[str, Callable[[], None]] = {
    "synchronous=NORMAL": _sync_less,
    "PUBACK before COMMIT": _acknowledge_first,
    "prune past the slowest cursor": _prune_past_the_slowest,
    "cursor before confirmation": _move_the_cursor_first,
    "journal after sending": _journal_last,
}


OFTEN = "checkpoints often"
_OFTEN_PAGES = 20


def _checkpoint_often() -> None:
    _replace(connection, "WAL_CHECKPOINT_PAGES", _OFTEN_PAGES)


def _replace(owner: object, name: str, substitute: object) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"{owner!r} no longer has {name}")
    setattr(owner, name, substitute)


if __name__ == "__main__":
    {**MUTATIONS, OFTEN: _checkpoint_often}[sys.argv[1]]()
    program, *arguments = sys.argv[2:]
    leave(collector.main() if program == "collector" else forwarder.main(arguments))
