"""The exactly-once sink against a model of the service, with a crash or a fault at any point.

The real thing stands on a socket in test_sink_storage.py and is killed in
test_e2e_exactly_once.py; here is what neither can produce by the thousand: a crash between any
two steps, appends of a broken connection that arrive later than what was sent after them, and
copies of the files that are taken between any two steps, to be put back later or to run as clones.
``SLUICE_MODEL_RUNS`` makes it longer.
"""

import os
import random
import sqlite3
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2, status_pb2  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

import forwarder.appends
from forwarder.appendcalls import IN_FLIGHT_MAX
from forwarder.appends import Append, Refusal
from forwarder.drain import Drain
from forwarder.faults import FaultError
from forwarder.refusals import RefusalRun
from forwarder.sink import Fault, FaultKind
from forwarder.storage import StorageSink
from forwarder.writeapi import CallError
from lifecycle import Watchdog, load_settings
from spool import (
    AheadStep,
    AppendJournal,
    Cut,
    DeadLetter,
    Reading,
    Settlement,
    SinkState,
    SpoolReader,
    SpoolWriter,
    claim_environment,
)
from tests.test_drain import FakeStop
from tests.test_spool_writer import look, new_reading

RUNS = int(os.environ.get("SLUICE_MODEL_RUNS", "40"))
TABLE = "projects/p-1/datasets/d/tables/readings"
ROWS = 60
PORTION = 10
REQUEST_ROWS = 4
BATCH_ROWS = 17
ENOUGH_LIVES = 400
IMAGES_MAX = 3
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - crashes here are exceptions, no sync matters

AppendRowsResponse = types.AppendRowsResponse.pb()
StorageError = types.StorageError.pb()


class CrashError(BaseException):
    """The process is gone; nothing of what it still had in mind happens."""


class Dice:
    """Decides what goes wrong, until it is told to let everything pass."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a test's dice
        self.trouble = self._random.choice([0.02, 0.1, 0.3])
        self.calm = False
        self.cuts_planned = 0
        self.on_step: Callable[[], None] = lambda: None

    def strikes(self, share: float = 1.0) -> bool:
        return not self.calm and self._random.random() < self.trouble * share

    def below(self, bound: int) -> int:
        return self._random.randrange(bound)

    def cut(self) -> bool:
        """Return whether the connection breaks now."""
        if self.cuts_planned and not self.calm:
            self.cuts_planned -= 1
            return True
        return self.strikes(0.5)

    def crash(self) -> None:
        """Stand between two steps of the process: here it may end, and its files be copied."""
        self.on_step()
        if self.strikes(0.4):
            raise CrashError


class Stream:
    """A write stream: rows, and whether it takes more."""

    def __init__(self, *, trial: bool) -> None:
        self.rows: list[int] = []
        self.trial = trial
        self.finalized = False


class Service:
    """What stays when a client crashes: streams, the table, and what is still on its way.

    Args:
        forgets: Whether streams are gone at times, instead of finalized.
        names_rows: Whether it names the rows for which it refuses an append.
        plain: Whether it refuses appends to finalized streams without a StorageError.
    """

    def __init__(self, *, forgets: bool, names_rows: bool, plain: bool) -> None:
        self.poisoned: set[int] = set()
        self.forgets = forgets
        self.streams: dict[str, Stream] = {}
        self.table: list[int] = []
        self.late: deque[tuple[str, int, list[int]]] = deque()
        self._names_rows = names_rows
        self._plain = plain
        self._made = 0

    def create(self, *, trial: bool = False) -> str:
        self._made += 1
        name = f"{TABLE}/streams/s{self._made}"
        self.streams[name] = Stream(trial=trial)
        return name

    def append(self, name: str, offset: int, rows: list[int], dice: Dice) -> Any:  # noqa: ANN401, PLR0911 - an AppendRowsResponse; each refusal
        stream = self.streams.get(name)
        if stream is None:
            return _error("NOT_FOUND", "STREAM_NOT_FOUND", "no such stream")
        if stream.finalized and self._plain:
            return _error("FAILED_PRECONDITION", "", "not open")
        if stream.finalized:
            return _error("INVALID_ARGUMENT", "STREAM_FINALIZED", "finalized")
        end = len(stream.rows)
        offset = end if stream.trial else offset
        if offset < end:
            text = f"The offset is within stream, expected offset {end}, received {offset}"
            return _error("ALREADY_EXISTS", "OFFSET_ALREADY_EXISTS", text)
        if offset > end:
            text = f"The offset is beyond stream, expected offset {end}, received {offset}"
            return _error("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", text)
        bad = [index for index, number in enumerate(rows) if number in self.poisoned]
        if bad and not self._names_rows:
            return _error("INVALID_ARGUMENT", "", "The request cannot be processed")
        if bad:
            answer = _error("INVALID_ARGUMENT", "", "Errors found while processing rows")
            # The list may be incomplete, as the service says.
            for index in bad[: 1 + dice.below(len(bad))]:
                answer.row_errors.add(index=index, code=1, message="no good")
            return answer
        stream.rows += rows
        if not stream.trial:
            self.table += rows
        answer = AppendRowsResponse()
        answer.append_result.offset.value = offset
        return answer

    def arrive_late(self, dice: Dice) -> None:
        """Let some of what broken connections left behind arrive now."""
        while self.late and not dice.below(3):
            self.append(*self.late.popleft(), dice)


def _error(code: str, kind: str, text: str) -> Any:  # noqa: ANN401 - an AppendRowsResponse
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=text)
    if kind:
        detail = StorageError(code=StorageError.StorageErrorCode.Value(kind), error_message=text)
        status.details.add().Pack(detail)
    answer = AppendRowsResponse()
    answer.error.CopyFrom(status)
    return answer


def numbers(rows: Iterable[Reading]) -> list[int]:
    """Return the numbers of readings, which tell them from all others on any machine."""
    return [int(row[9][5:-1] or b"0") for row in rows]


class ModelCalls:
    """In the place of AppendCalls: the same contract, and everything that can go wrong in it."""

    table = TABLE

    def __init__(self, service: Service, dice: Dice) -> None:
        self._service = service
        self._dice = dice
        self.refusals = RefusalRun()
        self.unanswered: deque[Append] = deque()
        self._answers: deque[Any] = deque()
        self._stream = ""

    def close(self) -> None:
        """Hold nothing."""

    disconnect = close

    def prepare(self) -> None:
        if self._dice.strikes(0.2):
            raise FaultError(Fault(FaultKind.TRANSIENT, "the table cannot be read now"))

    def begin(self, delivered_seq: int) -> bool:
        assert delivered_seq >= 0
        self.refusals.begin()
        return False

    def recreated(self) -> bool:
        return False

    def stream_refused(self) -> None:
        """Need no other look at the table."""

    notice = ""

    def out_of_range(
        self, rows: Sequence[Reading], after_seq: int = 0
    ) -> tuple[list[Reading], list[DeadLetter]]:
        """Know some of the bad rows beforehand, and tomorrow others: the date moves on."""
        bad = [
            row
            for row in rows
            if numbers([row])[0] in self._service.poisoned
            and row[0] > after_seq
            and self._dice.below(10) < 4
        ]
        letters = [DeadLetter(row, "partition_range", "long ago") for row in bad]
        return [row for row in rows if row not in bad], letters

    def columns_changed(self) -> bool:
        self.prepare()
        return self._dice.strikes(0.2)

    def blame_rows(self, append: Append, refusal: Refusal, behind: Iterable[Append] = ()) -> None:
        assert append.rows
        assert refusal.rows
        assert append not in behind
        if self._dice.strikes(0.2):
            raise FaultError(Fault(FaultKind.HOLD, "every row is refused"))

    def adapt(self, refusal: Refusal) -> bool:
        assert refusal.code == "INVALID_ARGUMENT"
        return self.columns_changed()

    def refuses_all(self, words: str) -> FaultError:
        return FaultError(Fault(FaultKind.HOLD, words))

    def fault(self, what: str, error: CallError) -> Fault:
        return Fault(FaultKind.TRANSIENT, f"{what}: {error}")

    def create_stream(self, *, trial: bool = False) -> str:
        self._dice.crash()
        if self._dice.strikes(0.3):
            raise FaultError(Fault(FaultKind.TRANSIENT, "no stream now"))
        name = self._service.create(trial=trial)
        self._dice.crash()
        return name

    def finalize_stream(self, name: str) -> int | None:
        self._dice.crash()
        if self._dice.strikes(0.3):
            raise FaultError(Fault(FaultKind.TRANSIENT, "not now"))
        self._service.arrive_late(self._dice)
        stream = self._service.streams.get(name)
        if stream is None:
            return None
        stream.finalized = True
        self._dice.crash()
        return len(stream.rows)

    def send(
        self, stream: str, appends: Sequence[Append], *, with_offsets: bool = True
    ) -> Iterator[tuple[Append, Any]]:
        trial = self._service.streams.get(stream, Stream(trial=not with_offsets)).trial
        assert with_offsets is not trial
        assert not self._answers, "what was on its way before was not drained"
        self.unanswered.clear()
        self._stream = stream
        waiting = deque(appends)
        if self._dice.strikes(0.3):
            self.unanswered.extend(list(appends)[:IN_FLIGHT_MAX])
            raise CallError("UNAVAILABLE", "Connection refused", connected=False)
        while waiting or self.unanswered:
            while waiting and len(self.unanswered) < IN_FLIGHT_MAX:
                self._dice.crash()
                self.unanswered.append(waiting.popleft())
                self._process()
            answer = self._receive()
            yield self.unanswered.popleft(), answer

    def drain(self) -> None:
        while self.unanswered:
            self._receive()
            self.unanswered.popleft()

    def _process(self) -> None:
        """Let the service have the newest request; it may be slow."""
        append = self.unanswered[-1]
        if self._dice.strikes(0.2) and self._service.streams.get(self._stream):
            if self._service.forgets:
                del self._service.streams[self._stream]
            else:
                self._service.streams[self._stream].finalized = True
        self._service.arrive_late(self._dice)
        if self._dice.strikes(0.2):
            self._answers.append(_error("INTERNAL", "", "try again"))
            if self._dice.strikes():
                self._apply(append)  # it says so, and has taken them all the same
            return
        self._answers.append(self._apply(append))

    def _apply(self, append: Append) -> Any:  # noqa: ANN401 - an AppendRowsResponse
        rows = numbers(append.rows)
        assert rows, "an append without rows"
        assert len(rows) == append.cut.rows
        return self._service.append(self._stream, append.cut.offset, rows, self._dice)

    def _receive(self) -> Any:  # noqa: ANN401 - an AppendRowsResponse
        self._dice.crash()
        if self._dice.cut():
            self._answers.clear()
            # Some of it was done, the answers are lost; some was never seen; some comes late.
            for append in self.unanswered:
                if self._dice.strikes():
                    late = (self._stream, append.cut.offset, numbers(append.rows))
                    self._service.late.append(late)
            raise CallError("UNAVAILABLE", "Socket closed")
        return self._answers.popleft()


class CrashingJournal(AppendJournal):
    """Crashes before or after any of its writes."""

    dice: Dice

    def begin_stream(self, name: str, possibly_repeated: int = 0) -> None:
        self.dice.crash()
        super().begin_stream(name, possibly_repeated)
        self.dice.crash()

    def add(
        self,
        epoch: str,
        cuts: Iterable[Cut],
        left_out: Mapping[int, tuple[str, str]] | None = None,
    ) -> None:
        self.dice.crash()
        super().add(epoch, cuts, left_out)
        self.dice.crash()

    def leave_out(self, epoch: str, left_out: Mapping[int, tuple[str, str]]) -> None:
        self.dice.crash()
        super().leave_out(epoch, left_out)
        self.dice.crash()


class CrashingState(SinkState):
    """Crashes before or after the cursor moves, and any of the file's transactions."""

    dice: Dice | None = None

    @contextmanager
    def transaction(self, operation: str) -> Iterator[sqlite3.Connection]:
        if self.dice is not None:
            self.dice.crash()
        with super().transaction(operation) as conn:
            yield conn
        if self.dice is not None:
            self.dice.crash()

    def settle(self, settlement: Settlement, ahead: AheadStep | None = None) -> None:
        assert self.dice is not None
        self.dice.crash()
        super().settle(settlement, ahead)
        self.dice.crash()


SETTINGS = load_settings(
    {
        "APP_ENV": "DEV",
        "GCP_PROJECT_ID": "p-1",
        "BIGQUERY_DATASET": "d",
        "BIGQUERY_TABLE": "readings",
        "PUBSUB_ENABLED": "false",
    },
    "gate-1",
)


@dataclass
class Image:
    """A copy of a machine's files, as it was between two steps."""

    source: "Machine"
    directory: Path
    rows: list[int]
    cursor: int
    repeated: int


class Machine:
    """One spool, and forwarders that live until they crash.

    Args:
        directory: SPOOL_DIR; new, or a copy.
        rows: The numbers of the readings that it holds, by seq.
        repeated: What its counter begins with.
    """

    def __init__(
        self,
        directory: Path,
        service: Service,
        dice: Dice,
        rows: Sequence[int] = (),
        repeated: int = 0,
    ) -> None:
        self.directory = directory
        self.service = service
        self.dice = dice
        self.rows = list(rows)
        self.writer = SpoolWriter.open(directory)
        if not rows:
            claim_environment(self.writer, "DEV", [])
        self._repeated = repeated
        self._state: CrashingState | None = None
        self._sink: StorageSink | None = None

    def receive(self, received: Sequence[int]) -> None:
        """Spool readings with these numbers."""
        self.rows += received
        self.writer.append([new_reading(number) for number in received], [], {})

    def live(self) -> bool:
        """Run the forwarder until all is settled, or it crashes; return whether it is done."""
        if self._sink is None:
            self._start()
        sink, state = self._sink, self._state
        assert sink is not None
        assert state is not None

        def drained() -> bool:
            return state.position(self.writer.epoch) == self.writer.last_seq()

        stop = FakeStop(drained, max_waits=100_000)
        drain = Drain(
            directory=self.directory,
            sink=sink,
            state=state,
            app_env="DEV",
            max_rate=0,
            stop=stop,
            watchdog=Watchdog(["a loop that never turns"], 1.0),
            clock=lambda: stop.now_s,
        )
        try:
            drain.run()
        except CrashError:
            if drain._reader is not None:  # noqa: SLF001 - a process that ends lets go of it
                drain._reader.close()  # noqa: SLF001 - the same
            self.kill()
            return False
        return True

    def _start(self) -> None:
        state = self._state = CrashingState.open(self.directory, "bigquery")  # type: ignore[assignment]
        assert isinstance(state, CrashingState)
        state.dice = self.dice
        journal = CrashingJournal(state)
        journal.dice = self.dice
        calls: Any = ModelCalls(self.service, self.dice)
        self._sink = StorageSink(SETTINGS, state, calls=calls, journal=journal)
        self._sink.max_rows = BATCH_ROWS  # small, so that there are several batches

    def kill(self) -> None:
        """End the process; nothing of what it still had in mind happens."""
        if self._state is not None:
            self._state.close()
        self._state = self._sink = None

    def close(self) -> None:
        """Switch the machine off."""
        self.kill()
        self.writer.close()

    def copy(self, directory: Path) -> Image:
        """Copy the files as they are now."""
        directory.mkdir()
        for name in ("spool.db", "bigquery.db"):
            with (
                closing(sqlite3.connect(self.directory / name)) as source,
                closing(sqlite3.connect(directory / name)) as target,
            ):
                source.backup(target)
        cursor = look(directory / "bigquery.db", "SELECT seq FROM cursor")
        return Image(
            self,
            directory,
            list(self.rows),
            int(str(cursor[0][0])) if cursor else 0,
            counters(directory)["possibly_repeated"],
        )

    @property
    def repeated(self) -> int:
        """How many rows it has counted as possibly repeated itself."""
        return counters(self.directory)["possibly_repeated"] - self._repeated

    def check(self) -> None:
        """Check that each of its readings is in the table or a dead letter, and counted so."""
        good = [number for number in self.rows if number not in self.service.poisoned]
        missing = set(good) - set(self.service.table)
        assert not missing, f"lost: {sorted(missing)}"
        path = self.directory / "bigquery.db"
        dead = [self.rows[int(str(seq)) - 1] for (seq,) in look(path, DEAD)]
        poisoned = [number for number in self.rows if number in self.service.poisoned]
        assert dead == poisoned, "what is refused is a dead letter"
        assert counters(self.directory)["delivered"] == len(good)
        assert counters(self.directory)["dead_lettered"] == len(dead)
        assert look(path, "SELECT count(*) FROM append_cut") == [(0,)]


DEAD = "SELECT seq FROM dead_letter ORDER BY seq"


def counters(directory: Path) -> Counter[str]:
    """Return a sink's counters."""
    rows = look(directory / "bigquery.db", "SELECT name, value FROM counter")
    return Counter({str(name): int(str(value)) for name, value in rows})


class World:
    """The service, and machines that are copied, put back, and cloned."""

    def __init__(self, directory: Path, seed: int, *, forgets: bool, images: int) -> None:
        self.dice = Dice(seed)
        self.service = Service(
            forgets=forgets, names_rows=bool(self.dice.below(3)), plain=not self.dice.below(2)
        )
        self._directory = directory
        self._images_left = images
        self._image_every = 1 + self.dice.below(200)
        self.images: list[Image] = []
        self.allowed: Counter[int] = Counter()
        """How often a reading may be there once more: it was waiting in a copy of the files."""
        self._numbers = 0
        self._poisons = bool(self.dice.below(2))
        self._machines = 0
        self._lives = 0
        first = self._new_directory()
        first.mkdir()
        self.running = [Machine(first, self.service, self.dice)]
        self.gone: list[Machine] = []

    def _new_directory(self) -> Path:
        self._machines += 1
        return self._directory / f"m{self._machines}"

    def readings(self, count: int) -> list[int]:
        """Return the numbers of new readings: some are poisoned, alone or a whole append long."""
        first = self._numbers + 1
        self._numbers += count
        for start in range(first, first + count, REQUEST_ROWS) if self._poisons else ():
            part = range(start, min(start + REQUEST_ROWS, first + count))
            whole = not self.dice.below(6)
            self.service.poisoned |= {n for n in part if whole or not self.dice.below(20)}
        return list(range(first, first + count))

    def settle(self) -> None:
        """Let all machines deliver what they have, by turns, each until it crashes."""
        todo = list(self.running)
        while todo:
            machine = todo[self.dice.below(len(todo))]
            self._lives += 1
            self.dice.calm = self._lives > ENOUGH_LIVES
            self.dice.on_step = lambda machine=machine: self._perhaps_copy(machine)  # type: ignore[misc]
            if machine.live():
                todo.remove(machine)
            self.dice.on_step = lambda: None
        if self._images_left and not self.dice.below(3):
            self._copy(self.running[self.dice.below(len(self.running))])

    def _perhaps_copy(self, machine: Machine) -> None:
        if self._images_left and not self.dice.below(self._image_every):
            self._copy(machine)

    def _copy(self, machine: Machine) -> None:
        self._images_left -= 1
        self.images.append(machine.copy(self._new_directory()))

    def use_an_image(self) -> None:
        """Put a machine back to a copy of its files, or have the copy run as a clone of it."""
        image = self.images.pop(self.dice.below(len(self.images)))
        self.allowed.update(image.rows[image.cursor :])
        if self.dice.below(2):
            old = self.running.pop(self.dice.below(len(self.running)))
            old.close()
            self.gone.append(old)
        copy = Machine(image.directory, self.service, self.dice, image.rows, image.repeated)
        self.running.append(copy)
        # What is most easily confused: as many rows as the other life has put there since, and a
        # connection that breaks before it has told.
        since = len(image.source.rows) - len(image.rows)
        copy.receive(self.readings(since if since and self.dice.below(2) else PORTION))
        self.dice.cuts_planned = self.dice.below(3)

    def finish(self) -> None:
        """Let what is still on its way arrive, and check every machine."""
        self.dice.calm = True
        self.service.arrive_late(self.dice)
        machines = [*self.running, *self.gone]
        for machine in self.running:
            machine.check()
            machine.close()
        times = Counter(self.service.table)
        known = {number for machine in machines for number in machine.rows}
        assert set(times) <= known - self.service.poisoned, "nothing is invented"
        surplus = sum(max(0, n - 1 - self.allowed[number]) for number, n in times.items())
        assert surplus <= sum(machine.repeated for machine in machines), "a repetition is counted"


def run(seed: int, *, forgets: bool, images: int = 0) -> None:
    """Run one world from its seed.

    Raises:
        AssertionError: It breaks a promise.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=MEMORY) as name:
        patch.setattr(forwarder.appends, "REQUEST_MAX_ROWS", REQUEST_ROWS)
        # Nothing waits here, and a kernel has few of what listens.
        patch.setattr(SpoolReader, "listen", lambda _: "")
        world = World(Path(name), seed, forgets=forgets, images=images)
        for _ in range(ROWS // PORTION):
            for machine in world.running:
                machine.receive(world.readings(PORTION))
                if world.dice.strikes(0.4):
                    machine.kill()
            world.settle()
            while world.images and world.dice.below(2):
                world.use_an_image()
                world.settle()
        world.settle()
        world.finish()
        if not images and not forgets:
            assert world.service.table == sorted(world.service.table), "in the order of seq"
            assert world.running[0].repeated == 0


@pytest.mark.parametrize("forgets", [False, True])
@settings(max_examples=RUNS)
@given(seed=st.integers(0, 2**32))
def test_each_reading_is_there_once_and_in_order_whatever_breaks(seed: int, forgets: bool) -> None:  # noqa: FBT001 - hypothesis passes by keyword
    run(seed, forgets=forgets)


@pytest.mark.parametrize("forgets", [False, True])
@settings(max_examples=RUNS)
@given(seed=st.integers(0, 2**32))
def test_copies_that_are_put_back_or_run_as_clones_lose_nothing_and_repeat_what_they_may(
    seed: int,
    forgets: bool,  # noqa: FBT001 - hypothesis passes by keyword
) -> None:
    run(seed, forgets=forgets, images=IMAGES_MAX)
