"""The next batch is read while the sink waits, and nothing else about a drain changes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forwarder.pubsub
from forwarder.readahead import ReadAhead, WaitingSink
from forwarder.sink import Delivery
from spool import Reading, SpoolReader, StorageFaultError
from tests.fakes import FakePubSub
from tests.test_drain import Bench, RandomSink, assert_settled_once_in_order
from tests.test_sink_contract import readings
from tests.test_sink_pubsub import TOPIC, made


class IdlingSink(RandomSink):
    """Has everything on its way at once, and then waits."""

    def __init__(self, seed: int = 0, trouble: float = 0.0) -> None:
        super().__init__(seed, trouble)
        self.meanwhile: Callable[[], object] = lambda: None
        self.log: list[str] = []

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        self.log.append(f"send {rows[0][0]}-{rows[-1][0]}")
        self.meanwhile()
        delivery = super().deliver(rows)
        self.log.append(f"answer, {len(delivery.retry)} again")
        return delivery


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    opened.close()


def watch_reads(monkeypatch: pytest.MonkeyPatch, log: list[str], broken_after: int = -1) -> None:
    read_after = SpoolReader.read_after

    def watched(reader: SpoolReader, seq: int, max_rows: int, max_bytes: int) -> list[Reading]:
        log.append(f"read after {seq}")
        if seq == broken_after:
            raise StorageFaultError("the disk does not answer", reader.path)
        return read_after(reader, seq, max_rows, max_bytes)

    monkeypatch.setattr(SpoolReader, "read_after", watched)


def test_a_full_batch_is_followed_by_reading_before_its_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(2 * RandomSink.max_rows + 3)
    sink = IdlingSink()
    watch_reads(monkeypatch, sink.log)
    bench.drain(sink)
    assert sink.log[:9] == [
        "read after 0",
        "send 1-7",
        "read after 7",
        "answer, 0 again",
        "send 8-14",
        "read after 14",
        "answer, 0 again",
        "send 15-17",  # not full: nothing is behind it yet
        "answer, 0 again",
    ]
    assert bench.counters() == (17, 0, 0)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 60), seed=st.integers(0, 2**32), trouble=st.floats(0, 0.9))
def test_every_row_is_still_settled_exactly_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, trouble: float
) -> None:
    bench = Bench(tmp_path_factory.mktemp("spool"), rows)
    sink = IdlingSink(seed, trouble)
    bench.drain(sink)
    assert_settled_once_in_order(bench, sink, rows)
    bench.close()


def test_a_batch_that_is_tried_again_reads_ahead_only_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(RandomSink.max_rows + 1)
    sink = IdlingSink(seed=3, trouble=0.9)
    watch_reads(monkeypatch, sink.log)
    bench.drain(sink)
    assert sum(line.startswith("send 1-") for line in sink.log) > 1
    assert sink.log.count("read after 7") == 1


def test_an_error_of_reading_ahead_is_told_after_the_batch_is_settled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(9)
    sink = IdlingSink()
    watch_reads(monkeypatch, sink.log, broken_after=7)
    with pytest.raises(StorageFaultError, match="does not answer"):
        bench.drain(sink)
    assert bench.state.position(bench.writer.epoch) == 7
    assert sink.log[-3:] == ["read after 7", "answer, 0 again", "read after 7"]


def test_what_was_read_is_of_no_use_at_another_position_or_twice() -> None:
    sink = IdlingSink()
    ahead = ReadAhead(sink)
    rows = readings(2)
    for position, expected in ((5, []), (4, rows)):
        ahead.plan(4, lambda _: rows)
        sink.meanwhile()
        assert ahead.take(position) == expected
        assert ahead.take(position) == []


def test_a_sink_that_does_not_tell_of_its_waiting_is_left_alone() -> None:
    sink = RandomSink(0, 0.0)
    assert not isinstance(sink, WaitingSink)
    ahead = ReadAhead(sink)
    ahead.plan(4, lambda _: readings(1))
    assert ahead.take(4) == []


def test_pubsub_waits_once_all_requests_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder.pubsub, "REQUEST_MAX_MESSAGES", 2)
    with FakePubSub(topics=[TOPIC]) as fake:
        sink = made(fake)
        assert isinstance(sink, WaitingSink)
        built: list[int] = []
        build = sink._encoder.request  # noqa: SLF001 - what is sent is built there

        def request(rows: Sequence[Reading]) -> bytes:
            built.append(len(rows))
            return build(rows)

        monkeypatch.setattr(sink._encoder, "request", request)  # noqa: SLF001
        waits: list[int] = []
        # The sites answer in any order, so only the sum is certain: every row is on its way.
        sink.meanwhile = lambda: waits.append(sum(built))
        assert sink.deliver(readings(10, sites=["A", "B"])) == Delivery()
        assert sink.deliver(readings(1)) == Delivery()
        assert waits == [10, 11]
        sink.close()


def test_pubsub_with_nothing_to_send_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder.pubsub, "KEY_MAX_BYTES", 1)
    monkeypatch.setattr(forwarder.pubsub, "UNDOUBTED_CHARS", 0)
    with FakePubSub(topics=[TOPIC]) as fake:
        sink = made(fake)
        waits: list[int] = []
        sink.meanwhile = lambda: waits.append(1)
        assert len(sink.deliver(readings(2, sites=["AB"])).dead) == 2
        assert waits == []
        sink.close()
