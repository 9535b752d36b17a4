"""The exactly-once sink against a model of the service, with a crash or a fault at any point.

The real thing stands on a socket in test_sink_storage.py and is killed in
test_e2e_exactly_once.py; here is what neither can produce by the thousand: a crash between any
two steps, and appends of a broken connection that arrive later than what was sent after them.
``SLUICE_MODEL_RUNS`` makes it longer.
"""

import os
import random
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    SpoolWriter,
    claim_environment,
)
from tests.test_drain import FakeStop
from tests.test_spool_writer import look, new_reading

RUNS = int(os.environ.get("SLUICE_MODEL_RUNS", "40"))
TABLE = "projects/p-1/datasets/d/tables/readings"
ROWS = 60
REQUEST_ROWS = 4
BATCH_ROWS = 17
ENOUGH_LIVES = 400

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

    def strikes(self, share: float = 1.0) -> bool:
        return not self.calm and self._random.random() < self.trouble * share

    def below(self, bound: int) -> int:
        return self._random.randrange(bound)

    def crash(self) -> None:
        if self.strikes(0.4):
            raise CrashError


class Stream:
    """A write stream: rows, and whether it takes more."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.finalized = False


class Service:
    """What stays when a client crashes: streams, the table, and what is still on its way."""

    def __init__(self, poisoned: set[int], *, forgets: bool) -> None:
        self.poisoned = poisoned
        self.forgets = forgets
        self.streams: dict[str, Stream] = {}
        self.table: list[int] = []
        self.late: deque[tuple[str, int, list[int]]] = deque()
        self._made = 0

    def create(self) -> str:
        self._made += 1
        name = f"{TABLE}/streams/s{self._made}"
        self.streams[name] = Stream()
        return name

    def append(self, name: str, offset: int, rows: list[int], dice: Dice) -> Any:  # noqa: ANN401 - an AppendRowsResponse
        stream = self.streams.get(name)
        if stream is None:
            return _error("NOT_FOUND", "STREAM_NOT_FOUND", "no such stream")
        if stream.finalized:
            return _error("INVALID_ARGUMENT", "STREAM_FINALIZED", "finalized")
        end = len(stream.rows)
        if offset < end:
            text = f"The offset is within stream, expected offset {end}, received {offset}"
            return _error("ALREADY_EXISTS", "OFFSET_ALREADY_EXISTS", text)
        if offset > end:
            text = f"The offset is beyond stream, expected offset {end}, received {offset}"
            return _error("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", text)
        bad = [index for index, seq in enumerate(rows) if seq in self.poisoned]
        if bad:
            answer = _error("INVALID_ARGUMENT", "", "Errors found while processing rows")
            # The list may be incomplete, as the service says.
            for index in bad[: 1 + dice.below(len(bad))]:
                answer.row_errors.add(index=index, code=1, message="no good")
            return answer
        stream.rows += rows
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
            if row[0] in self._service.poisoned and row[0] > after_seq and self._dice.below(10) < 4
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

    def adapt(self, refusal: Refusal) -> None:
        raise AssertionError(f"no schema error was planned: {refusal}")

    def fault(self, what: str, error: CallError) -> Fault:
        return Fault(FaultKind.TRANSIENT, f"{what}: {error}")

    def create_stream(self) -> str:
        self._dice.crash()
        if self._dice.strikes(0.3):
            raise FaultError(Fault(FaultKind.TRANSIENT, "no stream now"))
        name = self._service.create()
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
        assert with_offsets
        assert not self._answers, "what was on its way before was not drained"
        self.unanswered.clear()
        self._stream = stream
        waiting = deque(appends)
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
        rows = [row[0] for row in append.rows]
        assert rows, "an append without rows"
        assert len(rows) == append.cut.rows
        return self._service.append(self._stream, append.cut.offset, rows, self._dice)

    def _receive(self) -> Any:  # noqa: ANN401 - an AppendRowsResponse
        self._dice.crash()
        if self._dice.strikes(0.5):
            self._answers.clear()
            # Some of it was done, the answers are lost; some was never seen; some comes late.
            for append in self.unanswered:
                if self._dice.strikes():
                    rows = [row[0] for row in append.rows]
                    self._service.late.append((self._stream, append.cut.offset, rows))
            raise CallError("UNAVAILABLE", "Socket closed")
        return self._answers.popleft()


class CrashingJournal(AppendJournal):
    """Crashes before or after any of its writes."""

    dice: Dice

    def begin_stream(self, name: str, possibly_repeated: int = 0) -> None:
        self.dice.crash()
        super().begin_stream(name, possibly_repeated)
        self.dice.crash()

    def add(self, epoch: str, cuts: Iterable[Cut]) -> None:
        self.dice.crash()
        super().add(epoch, cuts)
        self.dice.crash()

    def recut(
        self,
        epoch: str,
        from_offset: int,
        cuts: Iterable[Cut],
        left_out: Mapping[int, tuple[str, str]],
    ) -> None:
        self.dice.crash()
        super().recut(epoch, from_offset, cuts, left_out)
        self.dice.crash()


class CrashingState(SinkState):
    """Crashes before or after the cursor moves."""

    dice: Dice

    def settle(self, settlement: Settlement, ahead: AheadStep | None = None) -> None:
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


class World:
    """One spool, one service, and forwarders that live until they crash."""

    def __init__(self, directory: Path, seed: int, *, forgets: bool) -> None:
        self.directory = directory
        self.dice = Dice(seed)
        # Single ones, and runs: an append that loses all its rows makes room for another's.
        poisoned = {seq for seq in range(1, ROWS + 1) if not self.dice.below(20)}
        for first in range(1, ROWS, REQUEST_ROWS):
            if not self.dice.below(6):
                poisoned |= set(range(first, min(first + REQUEST_ROWS, ROWS + 1)))
        self.service = Service(poisoned, forgets=forgets)
        self.writer = SpoolWriter.open(directory)
        claim_environment(self.writer, "DEV", [])
        self.lives = 0

    def live(self) -> bool:
        """Run one forwarder until all is settled, or it crashes; return whether it is done."""
        self.lives += 1
        self.dice.calm = self.lives > ENOUGH_LIVES
        state = CrashingState.open(self.directory, "bigquery")
        assert isinstance(state, CrashingState)
        state.dice = self.dice
        sink = StorageSink(SETTINGS, state)
        sink.max_rows = BATCH_ROWS  # small, so that there are several batches
        sink._calls = ModelCalls(self.service, self.dice)  # type: ignore[assignment] # noqa: SLF001 - the seam
        journal = CrashingJournal(state)
        journal.dice = self.dice
        sink._journal = journal  # noqa: SLF001 - the seam

        def drained() -> bool:
            return state.position(self.writer.epoch) == self.writer.last_seq()

        stop = FakeStop(drained, max_waits=100_000)
        try:
            Drain(
                directory=self.directory,
                sink=sink,
                state=state,
                app_env="DEV",
                max_rate=0,
                stop=stop,
                watchdog=Watchdog(["a loop that never turns"], 1.0),
                clock=lambda: stop.now_s,
            ).run()
        except CrashError:
            return False
        finally:
            state.close()
        return True


@pytest.mark.parametrize("forgets", [False, True])
@settings(max_examples=RUNS, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_each_reading_is_there_once_and_in_order_whatever_breaks(seed: int, forgets: bool) -> None:  # noqa: FBT001 - hypothesis passes by keyword
    size = forwarder.appends.REQUEST_MAX_ROWS
    forwarder.appends.REQUEST_MAX_ROWS = REQUEST_ROWS
    try:
        with tempfile.TemporaryDirectory() as directory:
            check(World(Path(directory), seed, forgets=forgets))
    finally:
        forwarder.appends.REQUEST_MAX_ROWS = size


def check(world: World) -> None:
    for first in range(0, ROWS, 20):
        world.writer.append([new_reading(first + n) for n in range(20)], [], {})
        while not world.live():
            pass
    world.dice.calm = True
    world.service.arrive_late(world.dice)
    path = world.directory / "bigquery.db"
    counters = {n: int(str(v)) for n, v in look(path, "SELECT name, value FROM counter")}
    repeated = counters.get("possibly_repeated", 0)
    good = [seq for seq in range(1, ROWS + 1) if seq not in world.service.poisoned]
    times = Counter(world.service.table)
    assert set(times) == set(good), "nothing lost, nothing invented"
    surplus = sum(times.values()) - len(good)
    assert surplus <= repeated, "a repetition is counted"
    if not world.service.forgets:
        assert world.service.table == good, "once, and in the order of seq"
        assert repeated == 0
    dead = [seq for (seq,) in look(path, "SELECT seq FROM dead_letter ORDER BY seq")]
    assert dead == sorted(world.service.poisoned)
    assert counters.get("delivered", 0) == len(good)
    assert counters.get("dead_lettered", 0) == len(dead)
    assert look(path, "SELECT count(*) FROM append_cut") == [(0,)]
    world.writer.close()
