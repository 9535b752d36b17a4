"""The drain loop settles every row exactly once, in order, whatever its sink does."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwarder.backoff import BACKOFF_MAX_S, HOLD_RETRY_S, pause_for_rate_s
from forwarder.batch import find_gaps
from forwarder.drain import Drain
from forwarder.sink import Delivery, Fault, FaultKind
from lifecycle import StopRequest, Watchdog
from spool import (
    DeadLetter,
    Reading,
    SinkState,
    SpoolWriter,
    claim_environment,
)
from tests.test_spool_writer import look, new_reading

SITES = ("S1", "S2", "S3")
TRANSIENT = Fault(FaultKind.TRANSIENT, "the network is down")
HOLD = Fault(FaultKind.HOLD, "no permission", "allow it")


class FakeStop(StopRequest):
    """A stop request whose waits take no time but move a clock; asks for the stop by itself."""

    def __init__(self, until: Callable[[], bool], max_waits: int = 10_000) -> None:
        self._requested = False
        self._reason = ""
        self._from_outside = False
        self._parent = 0
        self._until = until
        self._max_waits = max_waits
        self.now_s = 0.0
        self.waits: list[float] = []

    def wake(self) -> None:
        """Nothing sleeps here."""

    def wait(self, timeout_s: float, also: object = None) -> bool:  # noqa: ARG002 - never rings here
        if self._requested:
            return True
        self.waits.append(timeout_s)
        self.now_s += max(timeout_s, 0.001)
        if self._until():
            self.request("done")
        if len(self.waits) > self._max_waits:
            raise AssertionError("the drain loop does not come to its end")
        return self.requested


class RandomSink:
    """Delivers, refuses and fails at random, as its contract allows it to."""

    name = "pubsub"
    max_rows = 7
    max_bytes = 10**6
    gather_s: float = 0.005

    def __init__(self, seed: int, trouble: float) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a test's dice
        self._trouble = trouble
        self._poisoned = [self._random.random() < trouble / 4 for _ in range(1000)]
        self.acknowledged: list[Reading] = []
        self.arrived: list[Reading] = []
        self.dead: list[int] = []

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        numbers = [row[0] for row in rows]
        assert rows
        assert numbers == sorted(set(numbers))
        assert len(rows) <= self.max_rows
        delivery = Delivery()
        failed: set[str] = set()
        for row in rows:
            dice = self._random.random()
            if row[4] in failed or dice < self._trouble * 0.5:
                if dice < self._trouble * 0.1 and row[4] not in failed:
                    self.arrived.append(row)  # it arrived, but its answer was lost
                failed.add(row[4])
                delivery.retry.append(row)
            elif self._poisoned[row[0]]:  # always the same rows: it is their own fault
                delivery.dead.append(DeadLetter(row, "invalid", "no"))
                self.dead.append(row[0])
            else:
                self.arrived.append(row)
                self.acknowledged.append(row)
        if delivery.retry:
            delivery.fault = self._random.choice([TRANSIENT, HOLD])
        return delivery

    def close(self) -> None:
        """Hold nothing."""


class ScriptedSink(RandomSink):
    """Answers by a function of the rows, and delivers everything once that is None."""

    def __init__(self, answer: Callable[[int, Sequence[Reading]], Delivery | None]) -> None:
        super().__init__(0, 0.0)
        self._answer = answer
        self.calls: list[list[int]] = []

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        self.calls.append([row[0] for row in rows])
        scripted = self._answer(len(self.calls), rows)
        return super().deliver(rows) if scripted is None else scripted


class Bench:
    """One spool, one sink's file and the means to drain the one into the other."""

    def __init__(self, directory: Path, rows: int = 0) -> None:
        self.directory = directory
        self.writer = SpoolWriter.open(directory)
        claim_environment(self.writer, "LOCAL", [])
        self.state = SinkState.open(directory, "pubsub")
        self.stop = FakeStop(lambda: True)
        if rows:
            self.append(rows)

    def append(self, rows: int) -> None:
        first = self.writer.last_seq()
        self.writer.append(
            [new_reading(first + n, site=SITES[n % len(SITES)]) for n in range(rows)], [], {}
        )

    def drained(self) -> bool:
        return self.state.position(self.writer.epoch) == self.writer.last_seq()

    def drain(
        self,
        sink: RandomSink,
        until: Callable[[], bool] | None = None,
        *,
        max_rate: int = 0,
        app_env: str = "LOCAL",
    ) -> FakeStop:
        stop = self.stop = FakeStop(until or self.drained)
        Drain(
            directory=self.directory,
            sink=sink,
            state=self.state,
            app_env=app_env,
            max_rate=max_rate,
            stop=stop,
            watchdog=Watchdog(["a loop that never turns"], 1.0),
            jitter=lambda: 1.0,
            clock=lambda: stop.now_s,
        ).run()
        return stop

    def counters(self) -> tuple[int, int, int]:
        counts = self.state.counters()
        names = ("delivered", "dead_lettered", "dropped")
        delivered, dead, dropped = (counts.get(name, 0) for name in names)
        return delivered, dead, dropped

    def status(self) -> tuple[object, ...]:
        return look(self.state.path, "SELECT state, detail FROM status")[0]

    def close(self) -> None:
        self.writer.close()
        self.state.close()


def everything_delivered(_: int, __: Sequence[Reading]) -> Delivery | None:
    return None


def assert_settled_once_in_order(bench: Bench, sink: RandomSink, rows: int) -> None:
    """Hold a drain to it: each of the rows is delivered or dead, once, in order per site."""
    acknowledged = [row[0] for row in sink.acknowledged]
    assert sorted(acknowledged + sink.dead) == list(range(1, rows + 1))
    for site in SITES:
        of_site = [row[0] for row in sink.acknowledged if row[4] == site]
        assert of_site == sorted(of_site)
    assert bench.counters() == (len(acknowledged), len(sink.dead), 0)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    trouble=st.floats(0, 0.9),
)
def test_every_row_is_settled_exactly_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, trouble: float
) -> None:
    bench = Bench(tmp_path_factory.mktemp("spool"), rows)
    sink = RandomSink(seed, trouble)
    bench.drain(sink)
    assert_settled_once_in_order(bench, sink, rows)
    kept = [seq for (seq,) in look(bench.state.path, "SELECT seq FROM dead_letter ORDER BY seq")]
    assert kept == sorted(sink.dead)
    bench.close()


# Few examples: each is up to some hundred restarts, with their syncs.
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32), trouble=st.floats(0.2, 0.6), steps=st.integers(1, 4))
def test_a_restart_at_any_wait_repeats_but_loses_and_reorders_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, trouble: float, steps: int
) -> None:
    bench = Bench(tmp_path_factory.mktemp("spool"), 30)
    sink = RandomSink(seed, trouble)
    position = 0
    for _ in range(500):
        bench.drain(sink, lambda: bench.drained() or len(bench.stop.waits) >= steps)
        moved = bench.state.position(bench.writer.epoch)
        done = {row[0] for row in sink.acknowledged} | set(sink.dead)
        assert moved >= position
        assert done >= set(range(1, moved + 1)), "the cursor passed what was not settled"
        position = moved
        if bench.drained():
            break
    assert bench.drained()
    assert sum(bench.counters()) == 30
    for site in SITES:
        firsts = list(dict.fromkeys(row[0] for row in sink.acknowledged if row[4] == site))
        assert firsts == sorted(firsts)
    bench.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_the_cursor_moves_over_the_contiguous_prefix_only(bench: Bench) -> None:
    bench.append(6)
    positions = []

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        positions.append(bench.state.position(bench.writer.epoch))
        if call == 1:  # 4 fails, 5 is dead, 6 is delivered
            return Delivery([rows[3]], [DeadLetter(rows[4], "invalid", "no")], TRANSIENT)
        return None

    sink = ScriptedSink(answer)
    bench.drain(sink)
    assert sink.calls == [[1, 2, 3, 4, 5, 6], [4]]
    assert positions == [0, 3]
    assert bench.counters() == (5, 1, 0)


def test_dead_letters_behind_the_prefix_wait_for_it(bench: Bench) -> None:
    bench.append(3)

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        if call == 1:
            return Delivery([rows[0]], [DeadLetter(rows[1], "invalid", "no")], TRANSIENT)
        assert bench.counters() == (0, 0, 0)
        return None

    bench.drain(ScriptedSink(answer))
    assert bench.counters() == (2, 1, 0)


def test_transient_faults_back_off_to_the_limit_and_holds_wait_a_minute(bench: Bench) -> None:
    bench.append(1)
    states = []

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        states.append(bench.status())
        if call <= 10:
            return Delivery(list(rows), fault=TRANSIENT)
        return Delivery(list(rows), fault=HOLD) if call <= 12 else None

    stop = bench.drain(ScriptedSink(answer))
    backoffs = [wait for wait in stop.waits if wait > 0.1]
    assert backoffs[:9] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, BACKOFF_MAX_S, BACKOFF_MAX_S]
    assert backoffs[10:] == [HOLD_RETRY_S] * 2
    assert states[5] == ("retrying", str(TRANSIENT))
    assert states[12] == ("on hold", "no permission; allow it")
    assert bench.status() == ("stopped", "done")


def test_progress_begins_the_backoff_anew(bench: Bench) -> None:
    bench.append(4)

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        return Delivery(list(rows[1:] if call % 3 == 0 else rows), fault=TRANSIENT)

    stop = bench.drain(ScriptedSink(answer), lambda: len(bench.stop.waits) >= 6)
    assert stop.waits == [0.25, 0.5, 0.25, 0.5, 1.0, 0.25]


def test_a_stop_during_a_backoff_ends_at_once_and_keeps_what_was_settled(bench: Bench) -> None:
    bench.append(3)
    sink = ScriptedSink(lambda _, rows: Delivery(list(rows[1:]), fault=HOLD))
    stop = bench.drain(sink, lambda: True)
    assert stop.waits == [HOLD_RETRY_S]
    assert len(sink.calls) == 1
    assert bench.state.position(bench.writer.epoch) == 1
    assert bench.counters() == (1, 0, 0)


def test_a_sink_that_gives_no_reason_for_a_retry_is_a_bug(bench: Bench) -> None:
    bench.append(1)
    with pytest.raises(RuntimeError, match="gives no reason"):
        bench.drain(ScriptedSink(lambda _, rows: Delivery(list(rows))))


def test_the_rate_is_held_over_the_whole_drain(bench: Bench) -> None:
    bench.append(500)
    sink = RandomSink(0, 0.0)
    stop = bench.drain(sink, max_rate=100)
    assert 500 / stop.now_s <= 100
    assert stop.now_s < 500 / 100 + 0.5
    assert len(sink.acknowledged) == 500


def test_a_rate_below_the_batch_makes_the_batch_smaller(bench: Bench) -> None:
    bench.append(10)
    sink = ScriptedSink(everything_delivered)
    bench.drain(sink, max_rate=2)
    assert max(map(len, sink.calls)) == 2


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(0, 100))
def test_the_pause_makes_up_for_what_was_too_fast(rows: int, rate: int, elapsed_s: float) -> None:
    pause = pause_for_rate_s(rows, rate, elapsed_s)
    assert pause >= 0
    assert elapsed_s + pause == pytest.approx(max(elapsed_s, rows / rate))
    assert pause_for_rate_s(rows, 0, elapsed_s) == 0


@given(
    after=st.integers(0, 5),
    seqs=st.sets(st.integers(6, 40), min_size=1),
    dropped=st.integers(0, 40),
)
def test_gaps_and_rows_together_are_every_number(after: int, seqs: set[int], dropped: int) -> None:
    rows: list[Reading] = [(seq, *new_reading(seq)) for seq in sorted(seqs)]
    gaps = find_gaps(after, rows, dropped)
    missing = {seq for gap in gaps for seq in range(gap.first_seq, gap.last_seq + 1)}
    assert missing | seqs == set(range(after + 1, max(seqs) + 1))
    assert not missing & seqs
    for gap in gaps:
        assert ("drop-oldest" in gap.reason) == (gap.last_seq <= dropped)
