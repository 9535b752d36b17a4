"""What is no reading cannot fill a spool: rejected messages give way, batches come in parts."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import collector.store
from collector.inbox import Delivered, parts
from collector.packets import Message
from spool import ROW_OVERHEAD_BYTES, Budget, Level, SpoolWriter, spool_path
from tests.collector_parts import MIB, Logbook, logbook, message, read
from tests.house import House, house_maker
from tests.store_desk import Desk, desks, ids
from tests.test_spool_writer import look, rejection

KIB = 1024
GARBAGE_BYTES = 64 * KIB
MANY = 150


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    with desks(tmp_path) as make:
        yield make


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook() as opened:
        yield opened


def large_garbage(number: int, *, topic_bytes: int = 30) -> Message:
    payload = b"%08d" % number + bytes(GARBAGE_BYTES - 8)
    topic = b"FCTS/FAE/" + b"x" * topic_bytes
    return Message(topic, payload, 1, retained=False, mid=number, size=len(payload))


@pytest.mark.parametrize("drop_oldest", [False, True])
@pytest.mark.parametrize("max_bytes", [256 * KIB, MIB, 8 * MIB])
def test_garbage_takes_no_room_from_readings(
    desk: Callable[..., Desk], *, max_bytes: int, drop_oldest: bool
) -> None:
    d = desk(max_bytes=max_bytes, drop_oldest=drop_oldest)
    number = 0
    good: list[Message] = []
    for _ in range(MANY // 10):
        batch = [large_garbage(number := number + 1) for _ in range(10)]
        one = message(number := number + 1)
        good.append(one)
        d.inbox.put(read(*batch[:5], one, *batch[5:]))
    d.run()
    assert d.ids() == ids(good), "each is there, none was dropped"
    assert sum(len(acks) for _, acks in d.acked) == number
    counts = d.counters()
    assert "dropped" not in counts
    assert counts["rejected"] == 10 * len(good)
    ((kept,),) = look(spool_path(d.directory), "SELECT count(*) FROM rejected_row")
    assert counts["rejected_dropped"] == counts["rejected"] - int(str(kept))
    assert int(str(kept)) > 0
    assert d.on_disk.used_bytes() <= max_bytes
    d.assert_adds_up()


@pytest.mark.parametrize("drop_oldest", [False, True])
def test_a_spool_that_garbage_has_filled_takes_readings_again(
    desk: Callable[..., Desk], *, drop_oldest: bool
) -> None:
    """As a release before the share left it behind, or SPOOL_MAX_BYTES was made smaller."""
    d = desk(max_bytes=8 * MIB, drop_oldest=drop_oldest)
    waiting = [message(n) for n in range(1, 50)]
    d.inbox.put(read(*waiting))
    SpoolWriter.append(d.writer, [], [rejection(bytes(GARBAGE_BYTES))] * 140, {"rejected": 0})
    assert d.budget.level(d.writer) is Level.FULL
    d.run()
    assert d.ids() == ids(waiting)
    assert "dropped" not in d.counters()


def test_duplicates_and_garbage_alone_need_no_room(desk: Callable[..., Desk]) -> None:
    d = desk(max_bytes=MIB, drop_oldest=True)
    again = message(1, pad_bytes=200_000)
    d.inbox.put(read(again))
    d.begin()
    d.end()
    full = desk(max_bytes=MIB, drop_oldest=True)
    full.fill(until_level=Level.FULL, incoming_bytes=200_000)
    before = full.ids()
    full.inbox.put(read(again))
    full.inbox.put(read(*(large_garbage(n) for n in range(2, 6))))
    full.run()
    assert full.ids() == before
    assert "dropped" not in full.counters()
    assert [one for _, acks in full.acked for one in acks] == [(1, n) for n in range(1, 6)]


def test_the_ring_gives_way_before_delivered_readings_do(tmp_path: Path) -> None:
    with house_maker(tmp_path) as make:
        house: House = make(max_bytes=MIB)
        house.writer.append([], [rejection(bytes(16 * KIB)) for _ in range(7)], {})
        house.fill_to(Level.PRESSURE)
        house.deliver(house.writer.last_seq())
        before = house.left
        house.turn(1.0)
        assert house.writer.counter("rejected_dropped") > 0
        assert house.left == before
        assert house.budget.level(house.writer) < Level.PRESSURE


def test_a_burst_comes_in_parts_so_that_the_limit_is_kept(
    desk: Callable[..., Desk], book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "ROOM_CHECK_S", 0.0)
    d = desk(max_bytes=MIB)
    full = "the spool is full: no message is acknowledged"
    book.when(full, lambda: d.stop.request("SIGTERM"))
    d.inbox.put(read(*(message(n) for n in range(1, 5_001))))
    d.begin()
    d.store.join()
    assert len(book.lines(full)) == 1
    assert MIB * 0.8 < d.on_disk.used_bytes() <= MIB
    stored = len(d.ids())
    acked = [mid for _, acks in d.acked for _, mid in acks]
    assert acked == list(range(1, stored + 1)), "what is acknowledged is what is stored"
    d.assert_adds_up()


@pytest.mark.parametrize("max_bytes", [1, 500, 5_000, 10**9])
def test_parts_keep_every_message_once_in_order_and_on_its_connection(max_bytes: int) -> None:
    taken = [
        read(*(message(10 * g + n, pad_bytes=97 * n) for n in range(5)), generation=g)
        for g in range(1, 7)
    ]
    cut = list(parts(taken, max_bytes))
    flat = [(i.generation, i.received_us, m) for part in cut for i in part for m in i.messages]
    assert flat == [(i.generation, i.received_us, m) for i in taken for m in i.messages]
    for part in cut:
        count = sum(len(item.messages) for item in part)
        size = sum(item.size for item in part) + ROW_OVERHEAD_BYTES * count
        assert size <= max_bytes or count == 1
        assert all(i.size == sum(len(m.topic) + len(m.payload) for m in i.messages) for i in part)
    nothing: list[Delivered] = []
    assert list(parts(nothing, max_bytes)) == []


@pytest.mark.parametrize("level", list(Level))
def test_the_ring_is_a_share_of_the_limit(level: Level) -> None:
    share = Budget(8 * MIB).rejected_bytes(level)
    assert share == (MIB if level < Level.PRESSURE else MIB // 8)
    assert Budget(10 * KIB * MIB).rejected_bytes(Level.GOOD) == 32 * MIB
