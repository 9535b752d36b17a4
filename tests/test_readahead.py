"""The next batch is read while the sink waits, and nothing else about a drain changes."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forwarder.lanes
from forwarder.batch import Checked, check
from forwarder.pubsub import PubSubSink
from forwarder.readahead import ReadAhead, WaitingSink
from forwarder.sink import Delivery
from spool import Reading, SpoolReader, StorageFaultError, row_crc
from tests.fakes import FakePubSub
from tests.test_drain import Bench, RandomSink, assert_settled_once_in_order
from tests.test_sink_contract import readings
from tests.test_sink_pubsub import TOPIC, made

SOON_S = 5.0


class IdlingSink(RandomSink):
    """Has everything on its way at once, and then waits, for some pieces of work."""

    def __init__(
        self, seed: int = 0, trouble: float = 0.0, *, pieces: int = 9, likes: int = 99
    ) -> None:
        super().__init__(seed, trouble)
        self.meanwhile: Callable[[], bool] = lambda: False
        self.log: list[str] = []
        self.prepared: list[Reading] = []
        self._pieces = pieces
        self._likes = likes

    def prepare(self, rows: list[Reading]) -> list[Reading]:
        self.prepared = rows[: self._likes]
        return self.prepared

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        self.log.append(f"send {rows[0][0]}-{rows[-1][0]}{'+' * (rows is self.prepared)}")
        for _ in range(self._pieces):
            if not self.meanwhile():
                break
        delivery = super().deliver(rows)
        self.log.append(f"answer, {len(delivery.retry)} again")
        return delivery


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    opened = Bench(tmp_path)
    yield opened
    opened.close()


def whole(count: int) -> list[Reading]:
    """Return readings with the right checksums."""
    return [
        (*row[:10], row_crc(row[1], (row[2], row[3], row[7]), "".join((*row[4:7], row[8])), row[9]))
        for row in readings(count)
    ]


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
        "send 8-14+",
        "read after 14",
        "answer, 0 again",
        "send 15-17+",  # not full: nothing is behind it yet
        "answer, 0 again",
    ]
    assert bench.counters() == (17, 0, 0)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    trouble=st.floats(0, 0.9),
    pieces=st.integers(0, 4),
    likes=st.integers(1, 8),
)
def test_every_row_is_still_settled_exactly_once_and_in_order(  # noqa: PLR0913, PLR0917 - the strategies'
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    seed: int,
    trouble: float,
    pieces: int,
    likes: int,
) -> None:
    bench = Bench(tmp_path_factory.mktemp("spool"), rows)
    sink = IdlingSink(seed, trouble, pieces=pieces, likes=likes)
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


def test_a_shortened_batch_is_followed_by_what_it_left_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(2 * RandomSink.max_rows)
    sink = IdlingSink(likes=5)
    watch_reads(monkeypatch, sink.log)
    bench.drain(sink)
    sent = [line for line in sink.log if not line.startswith("answer")]
    assert sent[:6] == [
        "read after 0",
        "send 1-7",
        "read after 7",
        "send 8-12+",
        "read after 12",
        "send 13-14+",
    ]
    assert bench.counters() == (14, 0, 0)


def test_damaged_rows_are_shortened_with_the_others() -> None:
    rows = whole(6)
    rows[1], rows[4] = (*rows[1][:10], 0), (*rows[4][:10], 0)
    checked = check(rows)
    assert checked == Checked(rows, [rows[0], rows[2], rows[3], rows[5]], [rows[1], rows[4]])
    checked.shorten(checked.good)
    assert not checked.shortened
    checked.shorten(checked.good[:2])
    assert checked == Checked(rows[:3], [rows[0], rows[2]], [rows[1]], shortened=True)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_what_was_read_is_of_no_use_at_another_position_or_twice(pieces: int) -> None:
    sink = IdlingSink()
    ahead = ReadAhead(sink)
    rows = whole(2)
    for position, expected in ((5, None), (4, check(rows))):
        ahead.plan(4, lambda _: rows)
        more = [sink.meanwhile() for _ in range(pieces)]
        assert more == [True, True, False][:pieces]
        assert ahead.take(position) == expected
        assert ahead.take(position) is None
        assert not sink.meanwhile()


def test_what_is_forgotten_is_let_go_of_by_the_sink_too() -> None:
    sink = IdlingSink()
    ahead = ReadAhead(sink)
    ahead.plan(4, lambda _: whole(2))
    while sink.meanwhile():
        pass
    assert len(sink.prepared) == 2
    ahead.forget()
    assert sink.prepared == []
    assert ahead.take(4) is None


def test_a_sink_that_does_not_tell_of_its_waiting_is_left_alone() -> None:
    sink = RandomSink(0, 0.0)
    assert not isinstance(sink, WaitingSink)
    ahead = ReadAhead(sink)
    ahead.plan(4, lambda _: readings(1))
    assert ahead.take(4) is None


def watch_encoder(monkeypatch: pytest.MonkeyPatch, sink: PubSubSink) -> list[int]:
    built: list[int] = []
    build = sink._encoder.request  # noqa: SLF001 - what is sent is built there

    def request(rows: Sequence[Reading]) -> bytes:
        built.extend(row[0] for row in rows)
        return build(rows)

    monkeypatch.setattr(sink._encoder, "request", request)  # noqa: SLF001
    return built


def test_pubsub_makes_the_next_requests_while_it_waits_for_these(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forwarder.lanes, "REQUEST_MAX_MESSAGES", 2)
    with FakePubSub(topics=[TOPIC]) as fake:
        answered = threading.Event()
        fake.faults.poison = lambda _: not answered.wait(SOON_S)
        sink = made(fake)
        assert isinstance(sink, WaitingSink)
        built = watch_encoder(monkeypatch, sink)
        first, rest = readings(8)[:2], readings(8)[2:]
        following: list[Reading] = []

        def meanwhile() -> bool:
            if not following:
                following.extend(rest)
                assert sink.prepare(following) is following
                return True
            if len(built) == 8:
                answered.set()
            return False

        sink.meanwhile = meanwhile
        assert sink.deliver(first) == Delivery()
        assert sorted(built) == list(range(1, 9))
        assert sink.deliver(following) == Delivery()
        assert sorted(built) == list(range(1, 9)), "none is made twice"
        assert fake.count == 8
        sink.close()


def test_pubsub_delivers_another_list_than_it_prepared_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakePubSub(topics=[TOPIC]) as fake:
        sink = made(fake)
        rows = readings(4)
        sink.prepare(rows)
        assert sink.deliver(rows[:2]) == Delivery()
        assert fake.count == 2
        assert sink.deliver(rows[2:]) == Delivery()
        assert fake.count == 4
        built = watch_encoder(monkeypatch, sink)
        sink.prepare(rows)
        sink.prepare([])
        assert sink.deliver(rows) == Delivery()
        assert sorted(built) == [1, 2, 3, 4]
        sink.close()


def test_pubsub_with_nothing_to_send_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder.lanes, "KEY_MAX_BYTES", 1)
    monkeypatch.setattr(forwarder.lanes, "UNDOUBTED_CHARS", 0)
    with FakePubSub(topics=[TOPIC]) as fake:
        sink = made(fake)
        waits: list[int] = []

        def meanwhile() -> bool:
            waits.append(1)
            return False

        sink.meanwhile = meanwhile
        assert len(sink.deliver(readings(2, sites=["AB"])).dead) == 2
        assert waits == []
        sink.close()
