"""A full budget of dead letters holds the sink, drops nothing, and lets go by itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forwarder.backoff import HOLD_RETRY_S
from forwarder.sink import Delivery
from lifecycle.rate_limited_log import INTERVAL_S
from spool import DeadLetter, Reading, SinkState, SpoolWriter, claim_environment
from tests.collector_parts import Logbook, logbook
from tests.test_drain import Bench, RandomSink
from tests.test_spool_writer import edit, look

LETTER_BYTES = 300
"""About what one takes."""


class Refusing(RandomSink):
    """Refuses the rows whose seq is a multiple of ``every``."""

    def __init__(self, every: int, max_rows: int = 7) -> None:
        super().__init__(0, 0.0)
        self.every = every
        self.max_rows = max_rows
        self.calls: list[list[int]] = []

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        self.calls.append([row[0] for row in rows])
        delivery = Delivery()
        for row in rows:
            if row[0] % self.every == 0:
                delivery.dead.append(DeadLetter(row, "invalid", "no"))
                self.dead.append(row[0])
            else:
                self.acknowledged.append(row)
        return delivery


class Journalled(Refusing):
    """Was sending rows when it was interrupted."""

    through = 0

    def resume(self, epoch: str) -> int:
        assert epoch
        return self.through


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook("forwarder") as opened:
        yield opened


def limit(bench: Bench, max_bytes: int) -> None:
    """Start the forwarder again with another limit."""
    bench.state.close()
    bench.state = SinkState.open(bench.directory, "pubsub", max_bytes)


def assert_passed_is_delivered_or_kept(bench: Bench, sink: RandomSink) -> None:
    moved = bench.state.position(bench.writer.epoch)
    kept = {seq for (seq,) in look(bench.state.path, "SELECT seq FROM dead_letter")}
    assert {row[0] for row in sink.acknowledged} | kept == set(range(1, moved + 1))
    delivered, dead, dropped = bench.counters()
    assert (delivered + dead, dropped) == (moved, 0)
    assert dead == bench.state.dead_letters.usage().kept


def test_a_full_budget_holds_after_the_batch_in_hand_and_says_what_to_do(
    bench: Bench, book: Logbook
) -> None:
    bench.append(100)
    limit(bench, 10 * LETTER_BYTES)
    sink = Refusing(every=2)
    bench.drain(sink, lambda: len([w for w in bench.stop.waits if w == HOLD_RETRY_S]) >= 3)
    usage = bench.state.dead_letters.usage()
    assert usage.full
    batches = len(sink.calls)
    assert sink.calls == [list(range(7 * n + 1, 7 * n + 8)) for n in range(batches)]
    assert bench.state.position(bench.writer.epoch) == 7 * batches < 100
    assert usage.kept_bytes < usage.max_bytes + 7 * LETTER_BYTES * 2, "one batch beyond at most"
    assert_passed_is_delivered_or_kept(bench, sink)
    (line, *_) = book.lines("dead letters is used up")
    for words in (
        f"{usage.kept} of them",
        "sqlite3 -readonly",
        "raise DEAD_LETTER_MAX_BYTES",
        "supervisorctl restart forwarder-pubsub",
    ):
        assert words in line
    assert len(book.lines("dead letters is used up")) == len(
        [w for w in bench.stop.waits if w == HOLD_RETRY_S]
    )


def test_the_status_says_on_hold_while_it_holds(bench: Bench) -> None:
    bench.append(100)
    limit(bench, 10 * LETTER_BYTES)
    seen: list[tuple[object, ...]] = []

    def until() -> bool:
        if bench.stop.waits[-1] == HOLD_RETRY_S:
            seen.append(bench.status())
        return len(seen) == 2

    bench.drain(Refusing(every=1), until)
    assert {state for state, _ in seen} == {"on hold"}
    assert "the budget of dead letters is used up" in str(seen[0][1])


def test_it_goes_on_by_itself_when_there_is_room(bench: Bench, book: Logbook) -> None:
    bench.append(200)
    limit(bench, 10 * LETTER_BYTES)
    sink = Refusing(every=2)
    discarded = 0

    def until() -> bool:
        nonlocal discarded
        if bench.stop.waits[-1] == HOLD_RETRY_S:
            discarded += bench.state.dead_letters.discard(10**6)
        return bench.drained()

    bench.drain(sink, until)
    assert discarded > 50
    assert bench.counters() == (100, 100, 0)
    assert [row[0] for row in sink.acknowledged] == list(range(1, 200, 2)), "each once, in order"
    counters = bench.state.counters()
    assert counters["dead_letters_discarded"] == discarded
    assert counters["dead_lettered"] == discarded + bench.state.dead_letters.usage().kept
    assert book.lines("dead letters is used up")
    assert bench.status()[0] == "stopped"


def test_a_higher_limit_and_a_restart_go_on_where_it_stood(bench: Bench) -> None:
    bench.append(60)
    sink = Refusing(every=3)
    for max_letters in (4, 8, 12, 1000):
        limit(bench, max_letters * LETTER_BYTES)
        bench.drain(sink, lambda: bench.drained() or HOLD_RETRY_S in bench.stop.waits)
        assert_passed_is_delivered_or_kept(bench, sink)
    assert bench.drained()
    assert bench.counters() == (40, 20, 0)
    assert [row[0] for row in sink.acknowledged] == [n for n in range(1, 61) if n % 3]


def test_a_damaged_row_needs_room_too(bench: Bench) -> None:
    bench.append(40)
    edit(bench.directory / "spool.db", "UPDATE reading_row SET value = value + 1 WHERE seq > 3")
    limit(bench, 4 * LETTER_BYTES)
    sink = Refusing(every=1000)
    bench.drain(sink, lambda: HOLD_RETRY_S in bench.stop.waits)
    assert bench.state.dead_letters.usage().full
    assert not bench.drained()
    assert look(bench.state.path, "SELECT DISTINCT reason FROM dead_letter") == [("corrupt_row",)]
    assert_passed_is_delivered_or_kept(bench, sink)


def test_what_a_journalled_sink_had_begun_is_finished_although_the_budget_is_full(
    bench: Bench,
) -> None:
    """After a hold of days its stream would be forgotten, and with it what has arrived."""
    bench.append(50)
    limit(bench, LETTER_BYTES)
    first = Refusing(every=1)
    bench.drain(first, lambda: HOLD_RETRY_S in bench.stop.waits)
    stood = bench.state.position(bench.writer.epoch)
    assert 0 < stood < 30
    sink = Journalled(every=1)
    sink.through = 30
    limit(bench, LETTER_BYTES)
    bench.drain(sink, lambda: HOLD_RETRY_S in bench.stop.waits)
    assert sink.calls == [list(range(stood + 1, 31))]
    assert bench.state.position(bench.writer.epoch) == 30


def test_a_spool_that_is_replaced_during_a_hold_is_noticed(bench: Bench) -> None:
    bench.append(50)
    limit(bench, LETTER_BYTES)
    holds = 0

    def until() -> bool:
        nonlocal holds
        holds += bench.stop.waits[-1] == HOLD_RETRY_S
        if holds == 1:
            holds += 1
            bench.writer.close()
            for path in bench.directory.glob("spool.db*"):
                path.unlink()
            bench.writer = SpoolWriter.open(bench.directory)
            claim_environment(bench.writer, "LOCAL", [])
            bench.append(5)
            bench.state.dead_letters.discard(10**6)
        return bench.drained()

    bench.drain(Refusing(every=3), until)
    assert bench.state.position(bench.writer.epoch) == 5


def test_eighty_percent_is_one_warning_and_stands_in_the_status(
    bench: Bench, book: Logbook
) -> None:
    bench.append(40)
    limit(bench, 60 * LETTER_BYTES)
    share = bench.state.dead_letters
    bench.drain(Refusing(every=1))
    assert not share.usage().nearly_full
    assert book.lines("nearly used up") == []
    bench.append(14)
    seen: list[tuple[object, ...]] = []

    def until() -> bool:
        seen.append(bench.status())
        return bench.drained() and len(seen) > 5

    while not share.usage().nearly_full:
        bench.append(1)
        bench.drain(Refusing(every=1))
    bench.drain(Refusing(every=1000), until)
    assert not share.usage().full
    assert seen[-1][0] == "delivering"
    assert "80 % of DEAD_LETTER_MAX_BYTES" in str(seen[-1][1])
    warned = len(book.lines("nearly used up"))
    # Once by the forwarder that crossed it, once by the one that was started behind it.
    assert warned == 2
    assert set(book.levels("nearly used up")) == {"WARNING"}


def test_many_dead_letters_are_a_line_a_minute_with_their_number(
    bench: Bench, book: Logbook
) -> None:
    bench.append(3000)
    bench.drain(Refusing(every=1, max_rows=500))
    bench.append(1)
    stop_at = INTERVAL_S + 5.0
    bench.drain(Refusing(every=1000), lambda: bench.stop.now_s > stop_at)
    first, *more = book.lines("dead letter")
    assert first == "dead letter: no"
    assert len(more) <= 2
    assert book.levels("dead letter")[0] == "ERROR"
    (values, *_) = book.values("dead letter: no")
    assert (values["reason"], values["seq"]) == ("invalid", 1)
    assert look(bench.state.path, "SELECT count(*) FROM dead_letters") == [(3000,)]


def test_the_number_that_was_held_back_is_told(bench: Bench, book: Logbook) -> None:
    bench.append(3000)
    bench.drain(Refusing(every=1, max_rows=500), lambda: bench.stop.now_s > INTERVAL_S + 5.0)
    assert book.values("the same again") == [{"more_since_last_line": 2999}]
    assert book.levels("the same again") == ["ERROR"]
