"""What the drain loop does when the spool loses rows, is damaged, replaced, or not its own."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forwarder.sink import Delivery
from spool import (
    SPOOL_DAMAGED,
    CursorAheadError,
    Reading,
    Settlement,
    SpoolWriter,
    StorageFaultError,
    WrongEnvironmentError,
    claim_environment,
    spool_path,
)
from spool.writer import PAGE_BYTES
from tests.test_drain import TRANSIENT, Bench, RandomSink, ScriptedSink, everything_delivered
from tests.test_spool_writer import edit, look


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_rows_that_left_the_spool_are_a_gap_that_is_counted(bench: Bench) -> None:
    bench.append(10)
    bench.writer.delete_through(4, "dropped")
    bench.drain(ScriptedSink(everything_delivered))
    assert bench.counters() == (6, 0, 4)
    ((first, last, reason),) = look(bench.state.path, "SELECT first_seq, last_seq, reason FROM gap")
    assert (first, last) == (1, 4)
    assert "drop-oldest" in str(reason)


def test_rows_that_left_without_being_dropped_are_a_gap_with_another_reason(bench: Bench) -> None:
    bench.append(10)
    bench.writer.delete_through(4, "pruned")
    bench.drain(ScriptedSink(everything_delivered))
    assert "drop-oldest" not in str(look(bench.state.path, "SELECT reason FROM gap"))
    assert bench.counters() == (6, 0, 4)


def test_a_spool_that_was_emptied_to_the_last_row_is_one_gap(bench: Bench) -> None:
    bench.append(5)
    bench.writer.delete_through(5, "dropped")
    bench.drain(ScriptedSink(everything_delivered))
    assert bench.counters() == (0, 0, 5)
    bench.append(2)
    bench.drain(ScriptedSink(everything_delivered))
    assert bench.counters() == (2, 0, 5)


def test_rows_dropped_while_they_are_tried_are_counted_once(bench: Bench) -> None:
    bench.append(9)

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        if call == 1:
            bench.writer.delete_through(8, "dropped")
            return Delivery(list(rows), fault=TRANSIENT)
        return None

    bench.drain(ScriptedSink(answer))
    assert bench.counters() == (8, 0, 1)


@pytest.mark.parametrize(
    "damage", ["value=value+1", "site_code=CAST(x'FF' AS TEXT)", "payload=zeroblob(3)"]
)
def test_a_row_whose_bits_changed_is_a_dead_letter_and_stops_nobody(
    bench: Bench, damage: str
) -> None:
    bench.append(5)
    edit(spool_path(bench.directory), f"UPDATE reading_row SET {damage} WHERE seq=3")  # noqa: S608
    sink = ScriptedSink(everything_delivered)
    bench.drain(sink)
    assert sink.calls == [[1, 2, 4, 5]]
    assert look(bench.state.path, "SELECT seq, reason FROM dead_letter") == [(3, "corrupt_row")]
    assert bench.counters() == (4, 1, 0)


def test_a_batch_of_nothing_but_damaged_rows_is_passed(bench: Bench) -> None:
    bench.append(3)
    edit(spool_path(bench.directory), "UPDATE reading_row SET crc=crc+1")
    sink = ScriptedSink(everything_delivered)
    bench.drain(sink)
    assert sink.calls == []
    assert bench.counters() == (0, 3, 0)


def test_a_new_spool_is_read_from_its_start(bench: Bench) -> None:
    bench.append(5)
    bench.drain(ScriptedSink(everything_delivered))
    bench.writer.close()
    for path in bench.directory.glob("spool.db*"):
        path.unlink()
    bench.writer = SpoolWriter.open(bench.directory)
    claim_environment(bench.writer, "LOCAL", [])
    bench.append(3)
    sink = ScriptedSink(everything_delivered)
    bench.drain(sink)
    assert sink.calls == [[1, 2, 3]]
    assert bench.counters() == (8, 0, 0)


def test_a_spool_that_is_replaced_under_the_loop_is_noticed(bench: Bench) -> None:
    bench.append(2)
    sink = ScriptedSink(everything_delivered)

    def until() -> bool:
        if not bench.drained():
            return False
        if len(sink.calls) > 1:
            return True
        bench.writer.close()
        for path in bench.directory.glob("spool.db*"):
            path.unlink()
        bench.writer = SpoolWriter.open(bench.directory)
        claim_environment(bench.writer, "LOCAL", [])
        bench.append(4)
        return False

    bench.drain(sink, until)
    assert sink.calls == [[1, 2], [1, 2, 3, 4]]


def test_a_cursor_beyond_the_end_stops_with_an_alarm_and_sends_nothing(bench: Bench) -> None:
    bench.append(3)
    bench.state.settle(Settlement(bench.writer.epoch, 7, 7))
    sink = ScriptedSink(everything_delivered)
    with pytest.raises(CursorAheadError, match="seq 7"):
        bench.drain(sink)
    assert sink.calls == []
    assert bench.state.position(bench.writer.epoch) == 7
    assert bench.status()[0] == "stopped"


def test_a_damaged_spool_is_told_in_the_status(bench: Bench) -> None:
    bench.append(2000)
    bench.writer.checkpoint()
    bench.writer.close()
    with spool_path(bench.directory).open("r+b") as file:
        file.seek(20 * PAGE_BYTES)
        file.write(b"\xff" * 200 * PAGE_BYTES)
    sink = RandomSink(1, 0.0)
    with pytest.raises(StorageFaultError):
        bench.drain(sink, lambda: False)
    assert bench.status()[0] == SPOOL_DAMAGED


def test_another_environments_readings_are_not_sent(bench: Bench) -> None:
    bench.append(3)
    sink = ScriptedSink(everything_delivered)
    with pytest.raises(WrongEnvironmentError, match="3 for pubsub"):
        bench.drain(sink, app_env="PRD")
    assert sink.calls == []


def test_a_spool_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.writer.close()
    for path in tmp_path.glob("spool.db*"):
        path.unlink()
    sink = ScriptedSink(everything_delivered)

    def until() -> bool:
        if len(bench.stop.waits) < 5:
            return False
        if len(bench.stop.waits) == 5:
            bench.writer = SpoolWriter.open(tmp_path)
            claim_environment(bench.writer, "LOCAL", [])
            bench.append(2)
        return bench.drained()

    bench.drain(sink, until)
    assert sink.calls == [[1, 2]]
