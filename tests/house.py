"""Housekeeping over a real spool and real sinks' files, as the unit tests have it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from collector.housekeeping import (
    Housekeeping,
)
from lifecycle import SINKS
from spool import (
    Ballast,
    Budget,
    Level,
    Retention,
    SinkFiles,
    spool_path,
)
from tests.collector_parts import (
    MIB,
    Clock,
    Script,
    ScriptedWriter,
    deliver_through,
    open_scripted,
)
from tests.test_spool_writer import look, new_reading

HOUR_US = 3_600_000_000
ROW_BYTES = 2000


class House:
    """Housekeeping over a real spool and real sinks' files, with a clock that a test moves."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = 64 * MIB,
        keep_us: int = HOUR_US,
        enabled: tuple[str, ...] = SINKS,
    ) -> None:
        self.directory = directory
        self.script = Script()
        self.writer: ScriptedWriter = open_scripted(directory, self.script)
        self.clock = Clock()
        self.now_us = 0
        self.budget = Budget(max_bytes)
        self.keeping = Housekeeping(
            sinks=SinkFiles(directory, {s: s in enabled for s in SINKS}),
            retention=Retention(keep_us),
            budget=self.budget,
            ballast=Ballast(directory, max_bytes),
            clock=self.clock,
            now_us=lambda: self.now_us,
        )

    def turn(self, later_s: float = 0.0) -> None:
        self.clock.now_s += later_s
        self.keeping.turn(self.writer)

    def fill(self, rows: int, received_us: int = 0) -> None:
        first = self.writer.last_seq()
        payload = b"x" * ROW_BYTES
        self.writer.append(
            [new_reading(first + n, payload=payload, received_us=received_us) for n in range(rows)],
            [],
            {},
        )

    def fill_to(self, level: Level) -> None:
        """Spool rows, one at a time, until the spool is at this level."""
        while self.budget.level(self.writer) < level:
            self.fill(1)
        assert self.budget.level(self.writer) is level

    def empty_to(self, level: Level) -> None:
        """Take the oldest rows out, one at a time, until the spool is at this level."""
        while self.budget.level(self.writer) > level:
            self.writer.delete_through(self.writer.first_seq(), "dropped")
        assert self.budget.level(self.writer) is level

    def deliver(self, seq: int, *sinks: str) -> None:
        for sink in sinks or SINKS:
            deliver_through(self.directory, seq, self.writer.epoch, sink)

    @property
    def left(self) -> tuple[int, int]:
        return self.writer.first_seq(), self.writer.last_seq()

    def shown(self) -> dict[object, tuple[object, ...]]:
        rows = look(
            spool_path(self.directory),
            "SELECT sink, enabled, cursor_seq, state FROM sink_progress",
        )
        return {row[0]: row[1:] for row in rows}


@contextmanager
def house_maker(directory: Path) -> Iterator[Callable[..., House]]:
    """Give out a maker of houses, and close what they opened."""
    made: list[House] = []

    def make(**options: object) -> House:
        made.append(House(directory, **options))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.writer.close()
