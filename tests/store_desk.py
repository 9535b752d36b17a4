"""A store with everything around it that is real, as the collector's unit tests have it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from collector.housekeeping import Housekeeping
from collector.inbox import Delivered, Inbox
from collector.packets import Message
from collector.paho_client import Ack
from collector.store import LOOP, Store
from collector.validation import Validator
from lifecycle import StopRequest, Watchdog
from spool import Ballast, Budget, Level, Retention, Salvage, SinkFile, SpoolWriter, spool_path
from tests.collector_parts import MIB, Clock, Script, identity, open_scripted
from tests.test_spool_writer import look, new_reading

FILLER_BYTES = 4096


class Watched(Housekeeping):
    """The real one, that says when it was asked to make room."""

    def __init__(self, *, on_full: Callable[[int], object], **parts: object) -> None:
        super().__init__(**parts)  # type: ignore[arg-type]
        self._on_full = on_full
        self.rounds = 0

    def make_room(
        self, writer: SpoolWriter, *, drop_oldest: bool, stands_still: bool = True
    ) -> bool:
        self.rounds += 1
        self._on_full(self.rounds)
        return super().make_room(writer, drop_oldest=drop_oldest, stands_still=stands_still)


class WatchedInbox(Inbox):
    """The real one, that keeps how long each taking may wait."""

    def __init__(self, on_room: Callable[[], None]) -> None:
        super().__init__(on_room)
        self.waits: list[float] = []

    def take(self, max_messages: int, timeout_s: float, *, gather: bool = True) -> list[Delivered]:
        self.waits.append(timeout_s)
        return super().take(max_messages, timeout_s, gather=gather)


class Desk:
    """A store with everything around it that is real, and what it acknowledged."""

    def __init__(  # noqa: PLR0913 - each is what some test varies
        self,
        directory: Path,
        *,
        max_bytes: int = 64 * MIB,
        drop_oldest: bool = False,
        dedup_window: int = 1000,
        salvage: Salvage | None = None,
        script: Script | None = None,
        on_full: Callable[[int], object] = lambda _: None,
        on_ack: Callable[[], object] = lambda: None,
    ) -> None:
        self.directory = directory
        self.script = script or Script()
        self.stop = StopRequest()
        self.inbox = WatchedInbox(on_room=self.stop.wake)
        self.acked: list[tuple[int, list[Ack]]] = []
        self.budget = Budget(max_bytes)
        self._on_ack = on_ack
        self._begun = False
        self.clock = Clock()
        self.writer = open_scripted(directory, self.script)
        self.house = Watched(
            on_full=on_full,
            sinks=[SinkFile(directory, "pubsub", enabled=True)],
            retention=Retention(10**15),
            budget=self.budget,
            ballast=Ballast(directory, max_bytes),
            salvage=salvage,
            # Time stands still: nothing becomes due but by what a test does.
            clock=Clock(),
        )
        self.store = Store(
            open_writer=lambda: open_scripted(directory, self.script),
            writer=self.writer,
            inbox=self.inbox,
            validator=Validator(),
            housekeeping=self.house,
            dedup_window=dedup_window,
            acknowledge=self._acknowledge,
            drop_oldest=drop_oldest,
            stop=self.stop,
            # The network loop never turns here, so this never ends the test run.
            watchdog=Watchdog([LOOP, "network"], 1e6, self.clock),
        )

    def _acknowledge(self, generation: int, acks: list[Ack]) -> None:
        self._on_ack()
        self.acked.append((generation, acks))

    def begin(self) -> None:
        self._begun = True
        self.store.start()

    def end(self) -> None:
        """Close the inbox and wait for the end; raises what ended the writer thread."""
        self.inbox.close()
        self.store.join()

    def run(self) -> None:
        self.begin()
        self.end()

    def fill(self, *, until_level: Level, incoming_bytes: int) -> None:
        """Spool undelivered readings until so many bytes more would be at this level."""
        number = 0
        while self.budget.level(self.writer, incoming_bytes) < until_level:
            number -= 1
            row = new_reading(number, payload=b"x" * FILLER_BYTES)
            SpoolWriter.append(self.writer, [row], (), {})

    def ids(self) -> list[bytes]:
        return [x for (x,) in self.rows() if isinstance(x, bytes)]

    def rows(self) -> list[tuple[object, ...]]:
        return look(spool_path(self.directory), "SELECT event_id FROM reading_row ORDER BY seq")

    def counters(self) -> dict[str, int]:
        # The highest number that was given is no total.
        found = look(
            spool_path(self.directory), "SELECT name, value FROM counter WHERE name <> 'last_seq'"
        )
        return {str(name): int(str(value)) for name, value in found}

    def assert_adds_up(self) -> None:
        counts = self.counters()
        parts = (counts.get(name, 0) for name in ("spooled", "duplicates", "rejected"))
        assert counts.get("received", 0) == sum(parts)

    def close(self) -> None:
        """End the thread if it still runs, and give everything back."""
        self.stop.request("the test is over")
        self.inbox.close()
        if self._begun:
            self.store._thread.join()  # noqa: SLF001 - join() would raise what ended it
        self.stop.close()
        self.on_disk.close()

    @property
    def on_disk(self) -> SpoolWriter:
        """The writer that the store has now; another one after a fault."""
        return self.store._writer  # noqa: SLF001 - there is no other way to it


@contextmanager
def desks(directory: Path) -> Iterator[Callable[..., Desk]]:
    """Give out a maker of desks; at the end whatever a failed test left running is ended."""
    made: list[Desk] = []

    def make(**options: object) -> Desk:
        made.append(Desk(**{"directory": directory, **options}))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()


def ids(messages: Sequence[Message]) -> list[bytes]:
    return [identity(one) for one in messages]
