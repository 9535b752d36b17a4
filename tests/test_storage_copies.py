"""Restored copies of the sink's file, and clones of it: other rows are never taken for ours."""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest

from forwarder.appends import Meaning, refusal_of
from forwarder.settlement import judge, same_table
from forwarder.sink import FaultKind
from forwarder.storage import StorageSink
from spool import Cut, Journal, Reading, Settlement, SinkState
from tests.fakes.write_messages import error_answer, status_message
from tests.test_sink_contract import readings
from tests.test_sink_storage import EPOCH, TABLE, Bench, delivered, interrupted

STREAM = "projects/p-1/datasets/d/tables/readings/streams/S1"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.tables.create_table(TABLE)
    yield made
    made.close()


class World:
    """What one of two machines has: a file, a process, and readings that only it received."""

    def __init__(self, bench: Bench, directory: Path, marker: int) -> None:
        directory.mkdir(exist_ok=True)
        self.bench = bench
        self.directory = directory
        self.state = SinkState.open(directory, "bigquery")
        self.sink = StorageSink(bench.settings(), self.state)
        self.sink.resume(EPOCH)
        self._marker = bytes([marker]) * 16

    def rows(self, first: int, last: int) -> list[Reading]:
        """Return readings that no other world has, with the same numbers."""
        return [(row[0], self._marker, *row[2:]) for row in readings(last)[first - 1 :]]

    def arrived(self) -> Counter[int]:
        """Return how often each of them is in the table."""
        rows = self.bench.tables.rows(TABLE)
        marker = self._marker.hex()
        return Counter(int(str(row["seq"])) for row in rows if row["event_id"] == marker)

    def deliver(self, rows: Sequence[Reading]) -> None:
        """Deliver as the drain loop does, for as long as it takes."""
        todo = list(rows)
        for _ in range(100):
            delivery = self.sink.deliver(todo)
            assert delivery.dead == []
            todo = delivery.retry
            self.state.settle(Settlement(EPOCH, todo[0][0] - 1 if todo else rows[-1][0]))
            if not todo:
                return
            assert delivery.fault is None or delivery.fault.kind is FaultKind.TRANSIENT
        raise AssertionError(f"it is never delivered: {delivery.fault}")

    def close(self) -> None:
        """End the process."""
        self.sink.close()
        self.state.close()


@contextmanager
def world(bench: Bench, directory: Path, marker: int) -> Iterator[World]:
    made = World(bench, directory, marker)
    yield made
    made.close()


def copy(state: SinkState, directory: Path) -> Path:
    """Copy the file as it is now; return the directory of the copy."""
    directory.mkdir()
    with (
        closing(sqlite3.connect(state.path)) as source,
        closing(sqlite3.connect(directory / "bigquery.db")) as target,
    ):
        source.backup(target)
        target.execute("PRAGMA journal_mode=WAL")
    return directory


FIRST_TRIES = ["refused", "cut", "aborted", "nothing"]


@pytest.mark.parametrize("first_try", FIRST_TRIES)
@pytest.mark.parametrize("since", [3, 10, 25])
def test_a_restored_copy_loses_none_of_its_new_readings(
    bench: Bench, tmp_path: Path, since: int, first_try: str
) -> None:
    """``since`` rows lie behind the copy's end: fewer than, as many as, and more than its own."""
    with world(bench, tmp_path / "original", 1) as original:
        original.deliver(original.rows(1, 20))
        image = copy(original.state, tmp_path / "image")
        original.deliver(original.rows(21, 20 + since))
    with world(bench, image, 2) as restored:
        todo = restored.rows(21, 30)
        if first_try == "refused":
            bench.api.stop()
            assert restored.sink.deliver(todo).retry == todo
            bench.api.start()
        elif first_try == "cut":
            bench.api.faults.cut()
        elif first_try == "aborted":
            bench.api.faults.abort(grpc.StatusCode.UNAVAILABLE, "away", times=3)
        restored.deliver(todo)
        assert restored.arrived() == dict.fromkeys(range(21, 31), 1)
        assert restored.state.counters()["possibly_repeated"] == since, "the operator is told"


@pytest.mark.parametrize("first_try", FIRST_TRIES)
def test_a_copy_with_rows_on_their_way_repeats_only_what_it_cannot_know(
    bench: Bench, tmp_path: Path, first_try: str
) -> None:
    with world(bench, tmp_path / "original", 1) as original:
        rows = original.rows(1, 20)
        original.deliver(rows[:5])
        bench.api.faults.lose_answer()
        assert original.sink.deliver(rows[5:10]).retry
        image = copy(original.state, tmp_path / "image")
        original.deliver(rows[5:])
    assert original.arrived() == dict.fromkeys(range(1, 21), 1), "in its own life: once"
    with world(bench, image, 2) as restored:
        todo = [*rows[5:10], *restored.rows(11, 20)]
        if first_try == "refused":
            bench.api.stop()
            assert restored.sink.deliver(todo).retry == todo
            bench.api.start()
        elif first_try != "nothing":
            bench.api.faults.cut(times=2)
        restored.deliver(todo)
        assert restored.arrived() == dict.fromkeys(range(11, 21), 1)
        assert set(original.arrived()) == set(range(1, 21))
        assert restored.state.counters()["possibly_repeated"] == 15


@pytest.mark.parametrize("cuts", [0, 1, 3])
def test_a_clone_and_its_original_each_come_to_a_stream_of_their_own(
    bench: Bench, tmp_path: Path, cuts: int
) -> None:
    with world(bench, tmp_path / "original", 1) as original:
        original.deliver(original.rows(1, 20))
        image = copy(original.state, tmp_path / "image")
        with world(bench, image, 2) as clone:
            for n in range(5):
                first = 21 + 4 * n
                for one in (original, clone) if n % 2 else (clone, original):
                    if cuts:
                        bench.api.faults.cut(times=cuts)
                    one.deliver(one.rows(first, first + 3))
            assert original.arrived() == dict.fromkeys(range(1, 41), 1)
            assert clone.arrived() == dict.fromkeys(range(21, 41), 1)
            streams = [a.stream for a in bench.api.appended[-2:]]
            assert len(set(streams)) == 2
            assert original.state.counters().get("possibly_repeated", 0) == 0
            assert clone.state.counters().get("possibly_repeated", 0) == 0, "none were there yet"


def test_a_refused_row_of_a_lost_life_becomes_a_dead_letter_in_the_copy(
    bench: Bench, tmp_path: Path
) -> None:
    """What lies in the place of a refused row must not pass for it."""
    rows = readings(20)
    bench.api.faults.poison = lambda row: row["seq"] == 3
    with bench.sink() as sink:
        bench.api.faults.cut()
        assert sink.deliver(rows[:5]).retry == rows[:5]
        image = copy(bench.state, tmp_path / "image")
        todo, dead = rows[:5], []
        while todo:
            delivery = sink.deliver(todo)
            dead += delivery.dead
            todo = delivery.retry
        bench.settle(5)
        delivered(sink, rows[5:6])  # as many rows as the copy's journal has assigned
    assert [letter.row[0] for letter in dead] == [3]
    state = SinkState.open(image, "bigquery")
    restored = StorageSink(bench.settings(), state)
    restored.resume(EPOCH)
    todo, dead = rows[:5], []
    while todo:
        delivery = restored.deliver(todo)
        assert delivery.fault is None
        dead += delivery.dead
        todo = delivery.retry
    assert [letter.row[0] for letter in dead] == [3]
    restored.close()
    state.close()


def test_an_earlier_stream_that_cannot_be_asked_stops_nothing_if_nothing_was_on_its_way(
    bench: Bench,
) -> None:
    rows = readings(20)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
    bench.api.faults.abort(
        grpc.StatusCode.PERMISSION_DENIED, "no", times=None, calls={"FinalizeWriteStream"}
    )
    with bench.sink() as sink:
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(1, 21))


def test_a_refused_connection_is_no_lost_answer(bench: Bench) -> None:
    """Nothing was sent, so rows at that offset are not these, whatever the service says."""
    rows = readings(10)
    with bench.sink() as sink:
        delivered(sink, rows[:5])
        bench.settle(5)
        appender = sink._calls._appender  # noqa: SLF001 - whose end is awaited
        assert appender is not None
        bench.api.stop()
        appender._reader.join(10)  # noqa: SLF001 - the same
        delivery = sink.deliver(rows[5:])
        assert delivery.fault is not None
        assert "failed to connect" in delivery.fault.problem
        bench.api.start()
        # As a process would do that has this one's memory (a snapshot that was resumed twice).
        bench.api.streams.stream(*bench.api.streams.names).row_count = 10
        for _ in range(100):
            delivery = sink.deliver(rows[5:])
            if not delivery.retry:
                break
    assert bench.seqs() == list(range(1, 11))
    assert bench.possibly_repeated() == 5


@pytest.mark.parametrize("expected", [11, 7, 4001])
def test_an_end_that_the_journal_does_not_know_is_believed_for_nothing(expected: int) -> None:
    cut = Cut(0, 1, 5, 5)
    text = f"The offset is within stream, expected offset {expected}, received 0"
    status = status_message("ALREADY_EXISTS", text, "OFFSET_ALREADY_EXISTS")
    refusal = refusal_of(error_answer(STREAM, status), cut, ends={5, 10})
    assert refusal is not None
    assert refusal.meaning is Meaning.OFFSET


def test_an_answer_that_names_no_end_is_left_to_the_streams_length() -> None:
    status = status_message("ALREADY_EXISTS", "it exists", "OFFSET_ALREADY_EXISTS")
    refusal = refusal_of(error_answer(STREAM, status), Cut(0, 1, 5, 5), ends={5})
    assert refusal is not None
    assert refusal.meaning is Meaning.OFFSET


@pytest.mark.parametrize(
    ("there", "confirmed", "unknown"),
    [(0, 0, 0), (5, 1, 0), (15, 2, 0), (7, 0, 7), (16, 0, 16), (None, 0, 15)],
)
def test_the_length_of_a_stream_confirms_what_it_can_explain(
    there: int | None, confirmed: int, unknown: int
) -> None:
    journal = Journal(STREAM, 15, EPOCH, [Cut(0, 1, 5, 5), Cut(5, 6, 15, 10)])
    verdict = judge(journal, readings(15), there, sent_through=5)
    assert len(verdict.confirmed) == confirmed
    assert verdict.unknown_rows == unknown


@pytest.mark.parametrize(
    ("stream", "same"),
    [
        ("projects/p-1/datasets/d/tables/t/streams/S", True),
        ("projects/4711/datasets/d/tables/t/streams/S", True),
        ("projects/p-2/datasets/d/tables/t/streams/S", False),
        ("projects/p-1/datasets/d/tables/other/streams/S", False),
        ("projects/4711/datasets/e/tables/t/streams/S", False),
    ],
)
def test_a_projects_number_stands_for_its_id(stream: str, *, same: bool) -> None:
    assert same_table(stream, "projects/p-1/datasets/d/tables/t") is same


def test_a_crash_in_between_is_told_by_the_streams_length(bench: Bench) -> None:
    rows = readings(12)
    interrupted(bench, rows)
    with bench.sink() as sink:
        delivered(sink, rows)
    assert bench.seqs() == list(range(1, 13))
    assert bench.possibly_repeated() == 0
