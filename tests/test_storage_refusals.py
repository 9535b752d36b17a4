"""Refusals as services give them: guilty rows without a name, calls that end, streams that end."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest

import forwarder.appends
from forwarder.defaultstream import DefaultStreamSink
from forwarder.sink import FaultKind, Sink
from forwarder.storage import NEW_STREAMS_MAX, StorageSink
from forwarder.trial import Trial
from spool import DeadLetter, Reading, Settlement
from tests.fakes.rows import Column
from tests.test_sink_contract import readings
from tests.test_sink_storage import EPOCH, TABLE, Bench, delivered, interrupted

METHODS = ["storage", "storage_default"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(forwarder.appends, "REQUEST_MAX_ROWS", 16)
    made = Bench(tmp_path)
    made.tables.create_table(TABLE)
    yield made
    made.close()


def open_sink(bench: Bench, method: str, **variables: str) -> Sink:
    if method == "storage_default":
        return DefaultStreamSink(bench.settings(BIGQUERY_WRITE_METHOD=method, **variables))
    sink = StorageSink(bench.settings(**variables), bench.state)
    sink.resume(EPOCH)
    return sink


def deliver_all(bench: Bench, sink: Sink, rows: Sequence[Reading], tries: int = 30) -> list[int]:
    """Deliver as the drain loop does, through passing faults; return the dead letters' seqs."""
    dead: list[DeadLetter] = []
    todo = list(rows)
    for _ in range(tries):
        delivery = sink.deliver(todo)
        dead += delivery.dead
        todo = delivery.retry
        bench.state.settle(Settlement(EPOCH, todo[0][0] - 1 if todo else rows[-1][0]))
        if not todo:
            return sorted(letter.row[0] for letter in dead)
        assert delivery.fault is None or delivery.fault.kind is FaultKind.TRANSIENT, delivery.fault
    raise AssertionError(f"no progress: {delivery.fault}")


def all_but(last: int, guilty: set[int]) -> list[int]:
    return [seq for seq in range(1, last + 1) if seq not in guilty]


# A call that ends behind a row error.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK])
@pytest.mark.parametrize("guilty", [{1}, {30}, {5, 6, 20, 21, 22, 60}])
def test_a_row_error_counts_although_the_call_ends_behind_it(
    bench: Bench, method: str, end: grpc.StatusCode, guilty: set[int]
) -> None:
    bench.api.faults.poison = lambda row: row["seq"] in guilty
    bench.api.faults.end_after_row_errors = end
    sink = open_sink(bench, method)
    assert deliver_all(bench, sink, readings(60)) == sorted(guilty)
    assert sorted(bench.seqs()) == all_but(60, guilty)
    sink.close()


# Guilty rows without a name.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends_call", [True, False])
@pytest.mark.parametrize("guilty", [{1}, {16}, {17}, {60}, {1, 2, 3}, {5, 20, 21, 59}])
def test_rows_that_are_refused_without_a_name_are_found(
    bench: Bench, method: str, guilty: set[int], *, ends_call: bool
) -> None:
    bench.api.ending = {""} if ends_call else set()
    bench.api.faults.poison = lambda row: row["seq"] in guilty
    bench.api.faults.unnamed = True
    sink = open_sink(bench, method)
    assert deliver_all(bench, sink, readings(60)) == sorted(guilty)
    assert sorted(bench.seqs()) == all_but(60, guilty)
    assert bench.possibly_repeated() == 0
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_guilty_row_that_comes_alone_does_not_stand_in_the_way(bench: Bench, method: str) -> None:
    """There is no healthy row to compare it with, so one that is made for it is tried."""
    bench.api.faults.poison = lambda row: row["seq"] == 1
    bench.api.faults.unnamed = True
    sink = open_sink(bench, method)
    (letter,) = sink.deliver(readings(1)).dead
    assert (letter.reason, letter.row[0]) == ("invalid", 1)
    assert "cannot be processed" in letter.detail
    assert bench.seqs() == [], "the row that was tried is in no table"
    sink.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3, 60])
def test_a_service_that_refuses_every_row_without_a_name_is_a_hold(
    bench: Bench, method: str, count: int
) -> None:
    rows = readings(count)
    bench.api.faults.poison = lambda _: True
    bench.api.faults.unnamed = True
    sink = open_sink(bench, method)
    for _ in range(3):
        delivery = sink.deliver(rows)
        assert (delivery.retry, delivery.dead) == (rows, [])
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.HOLD
        assert "cannot be processed" in delivery.fault.problem
    bench.api.faults.clear()
    assert deliver_all(bench, sink, rows) == []
    assert bench.seqs() == all_but(count, set())
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_the_operator_may_put_even_those_aside(bench: Bench, method: str) -> None:
    bench.api.faults.poison = lambda _: True
    bench.api.faults.unnamed = True
    sink = open_sink(bench, method, REFUSED_POLICY="dead-letter")
    assert deliver_all(bench, sink, readings(20)) == all_but(20, set())
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_what_the_table_is_at_fault_for_is_told_before_any_row_is_tried(
    bench: Bench, method: str
) -> None:
    rows = readings(10)
    sink = open_sink(bench, method)
    delivered(sink, rows[:5])
    bench.settle(5)
    bench.tables.add_column(TABLE, Column("unit", "STRING", "REQUIRED"))
    created = bench.api.streams.created
    delivery = sink.deliver(rows[5:])
    assert (delivery.retry, delivery.dead) == (rows[5:], [])
    assert delivery.fault is not None
    assert "ALTER COLUMN unit DROP NOT NULL" in delivery.fault.remedy
    assert bench.api.streams.created == created
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_no_row_is_blamed_while_the_service_learns_of_a_mended_table(
    bench: Bench, method: str
) -> None:
    rows = readings(40)
    sink = open_sink(bench, method)
    delivered(sink, rows[:10])
    bench.settle(10)
    bench.tables.add_column(TABLE, Column("unit", "STRING", "REQUIRED"))
    assert sink.deliver(rows[10:]).fault is not None
    bench.tables.drop_column(TABLE, "unit")
    bench.api.faults.poison = lambda _: True  # it has not heard of it yet
    bench.api.faults.unnamed = True
    delivery = sink.deliver(rows[10:])
    assert (delivery.retry, delivery.dead) == (rows[10:], [])
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    bench.api.faults.clear()
    assert deliver_all(bench, sink, rows[10:]) == []
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_where_no_search_can_be_made_the_refusal_itself_is_told(bench: Bench, method: str) -> None:
    rows = readings(10)
    sink = open_sink(bench, method)
    delivered(sink, rows[:5])
    bench.settle(5)
    bench.api.faults.poison = lambda _: True
    bench.api.faults.unnamed = True
    bench.api.faults.abort(
        grpc.StatusCode.UNIMPLEMENTED, "no such type", times=None, calls={"CreateWriteStream"}
    )
    delivery = sink.deliver(rows[5:])
    assert (delivery.retry, delivery.dead) == (rows[5:], [])
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert "cannot be processed" in delivery.fault.problem
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_search_that_takes_too_long_keeps_what_it_found_and_goes_on(
    bench: Bench, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each search ends after so many requests; the next delivery begins where it ended."""
    guilty = {2, 9, 20}
    bench.api.faults.poison = lambda row: row["seq"] in guilty
    bench.api.faults.unnamed = True
    asked = Trial._refused  # noqa: SLF001 - what takes long
    left = [0]

    def slow(self: Trial, rows: list[Reading]) -> str:
        left[0] -= 1
        if left[0] <= 0:
            self._give_back_at = 0.0
        return asked(self, rows)

    monkeypatch.setattr(Trial, "_refused", slow)
    sink = open_sink(bench, method)
    todo, dead = readings(40), []
    for _ in range(20):
        left[0] = 8
        delivery = sink.deliver(todo)
        dead += [letter.row[0] for letter in delivery.dead]
        todo = delivery.retry
        bench.settle(todo[0][0] - 1 if todo else 40)
        if not todo:
            break
    assert sorted(dead) == sorted(guilty)
    assert sorted(bench.seqs()) == all_but(40, guilty)
    sink.close()


# The end of a stream.


@pytest.mark.parametrize("end", ["finalized", "expired"])
@pytest.mark.parametrize("ends_call", [True, False])
def test_a_stream_that_is_at_its_end_without_a_storage_error_is_replaced(
    bench: Bench, end: str, *, ends_call: bool
) -> None:
    bench.api.ending = {""} if ends_call else set()
    bench.api.streams.plain = True
    rows = readings(60)
    sink = open_sink(bench, "storage")
    delivered(sink, rows[:20])
    bench.settle(20)
    (first,) = bench.api.streams.names
    if end == "finalized":
        bench.api.streams.finalize(first)
    else:
        bench.api.streams.forget(first, countable=True)
    assert deliver_all(bench, sink, rows[20:]) == []
    assert bench.seqs() == all_but(60, set())
    assert len(bench.api.streams.names) == 2
    assert bench.possibly_repeated() == 0
    sink.close()


@pytest.mark.parametrize("code", ["FAILED_PRECONDITION", "INVALID_ARGUMENT"])
@pytest.mark.parametrize("in_stream", [True, False])
def test_one_refusal_of_a_healthy_request_is_outlived(
    bench: Bench, code: str, *, in_stream: bool
) -> None:
    rows = readings(10)
    if in_stream:
        bench.api.faults.refuse(code, "as planned")
    else:
        bench.api.faults.abort(grpc.StatusCode[code], "as planned")
    sink = open_sink(bench, "storage")
    assert deliver_all(bench, sink, rows) == []
    assert bench.seqs() == all_but(10, set())
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_wrong_with_the_table_is_a_hold_in_the_services_words(
    bench: Bench, method: str
) -> None:
    rows = readings(10)
    bench.api.faults.refuse("FAILED_PRECONDITION", "encryption key is disabled", times=None)
    sink = open_sink(bench, method)
    for n in (1, 2):
        delivery = sink.deliver(rows)
        assert (delivery.retry, delivery.dead) == (rows, [])
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.HOLD
        assert "encryption key is disabled" in delivery.fault.problem
        assert bench.api.streams.created <= n * NEW_STREAMS_MAX
    bench.api.faults.clear()
    assert deliver_all(bench, sink, rows) == []
    assert sorted(bench.seqs()) == all_but(10, set())
    sink.close()


@pytest.mark.parametrize("ending", ["OFFSET_ALREADY_EXISTS", "OFFSET_OUT_OF_RANGE"])
def test_an_error_of_offsets_that_ends_the_call_is_one_all_the_same(
    bench: Bench, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwarder.storage.OUTDATED_END_S", 0.0)
    bench.api.ending = {ending}
    rows = readings(40)
    sink = open_sink(bench, "storage")
    delivered(sink, rows[:10])
    bench.settle(10)
    if ending == "OFFSET_ALREADY_EXISTS":
        bench.api.faults.lose_answer()
    else:
        bench.api.streams.stream(*bench.api.streams.names).row_count = 4
    assert deliver_all(bench, sink, rows[10:]) == []
    assert bench.seqs() == all_but(40, set())
    sink.close()


# Names with the project's number.


def test_a_stream_whose_name_has_the_projects_number_is_kept(bench: Bench) -> None:
    bench.api.streams.project_numbers["p-1"] = "4711"
    rows = readings(60)
    sink = open_sink(bench, "storage")
    for first in (0, 20, 40):
        delivered(sink, rows[first : first + 20])
        bench.settle(first + 20)
    sink.close()
    assert bench.seqs() == all_but(60, set())
    assert len(bench.api.streams.names) == 1
    assert "/4711/" in bench.api.streams.names[0]


def test_a_crash_with_such_a_stream_repeats_nothing(bench: Bench) -> None:
    bench.api.streams.project_numbers["p-1"] = "4711"
    rows = readings(10)
    interrupted(bench, rows)
    bench.api.faults.abort(grpc.StatusCode.PERMISSION_DENIED, "no", calls={"FinalizeWriteStream"})
    sink = open_sink(bench, "storage")
    held = sink.deliver(rows)
    assert held.fault is not None
    assert held.fault.kind is FaultKind.HOLD, "it is this table's, and is waited for"
    assert deliver_all(bench, sink, rows) == []
    sink.close()
    assert bench.seqs() == all_but(10, set())
    assert bench.possibly_repeated() == 0
