"""A full spool and a full disk: nothing is acknowledged too soon, overtaken, or stored twice."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import collector.store
from collector.packets import Message
from spool import (
    DiskFullError,
    Level,
    SpoolReader,
    SpoolWriter,
    spool_path,
)
from tests.collector_parts import (
    MIB,
    Logbook,
    Script,
    deliver_through,
    disk_full,
    fill_disk,
    logbook,
    message,
    read,
    small_disk,
)
from tests.store_desk import Desk, desks, ids

FULL = "the spool is full: no message is acknowledged"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for room again at once: what a test waits for comes from within the loop."""
    monkeypatch.setattr(collector.store, "ROOM_CHECK_S", 0.0)


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook() as opened:
        yield opened


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    with desks(tmp_path) as make:
        yield make


def full_desk(make: Callable[..., Desk], **options: object) -> tuple[Desk, Message, Message]:
    """Return a desk with a spool that is full for the first message, but not for the second."""
    d = make(max_bytes=MIB, **options)
    big, small = message(1, pad_bytes=250_000), message(2)
    d.fill(until_level=Level.FULL, incoming_bytes=read(big).size)
    assert d.budget.level(d.writer, read(small).size + 1000) < Level.FULL
    return d, big, small


def test_a_stop_while_a_group_waits_for_room_lets_no_later_one_overtake_it(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d, big, small = full_desk(desk)
    before = d.ids()

    def stop_and_more_comes() -> None:
        d.stop.request("SIGTERM")
        d.inbox.put(read(small))
        d.inbox.close()

    book.when(FULL, stop_and_more_comes)
    d.inbox.put(read(big))
    d.begin()
    d.store.join()
    assert len(book.lines(FULL)) == 1
    assert d.ids() == before, "the small one came after the one in hand"
    assert d.acked == []
    assert "received" not in d.counters()
    assert d.store.failure is None


def test_a_stop_while_the_disk_is_full_lets_no_later_group_overtake(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    script = Script()
    script.faults.append(disk_full())
    d = desk(script=script)

    def stop_and_more_comes() -> None:
        d.stop.request("SIGTERM")
        d.inbox.put(read(message(2)))
        d.inbox.close()

    book.when(FULL, stop_and_more_comes)
    d.inbox.put(read(message(1)))
    d.begin()
    d.store.join()
    assert d.rows() == []
    assert d.acked == []


def test_a_stop_does_not_keep_what_has_room_from_being_stored(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.stop.request("SIGTERM")
    d.inbox.put(read(message(1)))
    d.inbox.put(read(message(2), generation=2))
    d.run()
    assert d.ids() == ids([message(1), message(2)])
    assert d.acked == [(1, [(1, 1)]), (2, [(1, 2)])]


def test_block_waits_acknowledges_nothing_and_goes_on_once_there_is_room(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    acked_while_full: list[int] = []

    def on_full(rounds: int) -> None:
        acked_while_full.append(len(d.acked))
        if rounds == 5:
            deliver_through(d.directory, d.writer.last_seq(), d.writer.epoch)

    d, big, small = full_desk(desk, on_full=on_full)
    book.when(FULL, lambda: d.inbox.put(read(small)))
    beats = d.clock.asked
    d.inbox.put(read(big))
    d.begin()
    d.end()
    assert acked_while_full == [0] * d.house.rounds
    assert d.house.rounds >= 5
    assert d.clock.asked - beats >= d.house.rounds, "waiting for room is no stall"
    assert d.ids()[-2:] == ids([big, small])
    assert d.acked == [(1, [(1, 1)]), (1, [(1, 2)])]
    assert len(book.lines(FULL)) == 1, "told once, and then each minute"
    assert book.levels(FULL) == ["CRITICAL"]
    assert book.lines("there is room again") == ["there is room again: taking messages"]
    assert d.counters()["pruned"] > 0
    assert "dropped" not in d.counters()
    d.assert_adds_up()


def test_a_spool_that_stays_full_is_told_of_again(
    desk: Callable[..., Desk], book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "FULL_REMINDER_S", 0.0)

    def on_full(rounds: int) -> None:
        if rounds == 4:
            d.stop.request("SIGTERM")

    d, big, _ = full_desk(desk, on_full=on_full)
    d.inbox.put(read(big))
    d.run()
    assert len(book.lines(FULL)) == 4
    assert str(spool_path(d.directory)) in book.lines(FULL)[0]
    used = book.values(FULL)[0]["used_bytes"]
    assert isinstance(used, int)
    assert MIB // 2 < used <= MIB


def test_drop_oldest_makes_room_for_the_new_and_counts_what_went(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d, big, small = full_desk(desk, drop_oldest=True)
    before = d.ids()
    d.inbox.put(read(big))
    d.inbox.put(read(small))
    d.run()
    left = d.ids()
    dropped = len(before) + 2 - len(left)
    assert dropped > 0
    assert left == [*before[dropped:], *ids([big, small])]
    assert d.counters()["dropped"] == dropped
    assert d.acked == [(1, [(1, 1)]), (1, [(1, 2)])]
    assert set(book.levels("drop-oldest")) == {"ERROR"}
    told = book.values("drop-oldest")
    assert told[-1]["total"] == sum(int(str(values["rows"])) for values in told) == dropped
    assert book.lines(FULL) == []


# --- a full disk


@pytest.mark.parametrize("durable_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window", [0, 1, 1000])
def test_after_a_full_disk_the_group_is_stored_once_whatever_the_failed_commit_did(
    desk: Callable[..., Desk], book: Logbook, durable_share: float, window: int
) -> None:
    script = Script()
    script.faults.extend([None, disk_full(durable_share)])
    sent = [message(n) for n in range(1, 10)]
    ballast: list[bool] = []

    def two_reads_more() -> None:
        if not d.acked:
            d.inbox.put(read(*sent[:4]))
            d.inbox.put(read(*sent[4:]))

    d = desk(script=script, dedup_window=window, on_ack=two_reads_more)
    d.house.turn(d.writer)
    book.when("the disk is full", lambda: ballast.append((d.directory / "ballast").exists()))
    book.when(FULL, lambda: ballast.append((d.directory / "ballast").exists()))
    # Another group goes before, so that the spool's tail is not this group alone.
    d.inbox.put(read(message(100)))
    d.begin()
    d.end()
    assert ballast == [True, False], "it is given up"
    assert script.openings == 2
    assert d.ids() == ids([message(100), *sent])
    assert d.acked == [
        (1, [(1, 100)]),
        (1, [(1, n) for n in range(1, 5)]),
        (1, [(1, n) for n in range(5, 10)]),
    ]
    assert len(book.lines("the disk is full")) == 1
    assert book.lines("there is room again") == ["there is room again: taking messages"]
    d.assert_adds_up()


def test_what_a_failed_commit_stored_is_a_duplicate_when_it_comes_again(
    desk: Callable[..., Desk],
) -> None:
    script = Script()
    script.faults.append(disk_full(0.5))
    d = desk(script=script)
    d.inbox.put(read(*(message(n) for n in range(1, 7))))
    d.run()
    later = desk()
    later.inbox.put(read(*(message(n, mid=n + 50) for n in range(1, 7)), generation=2))
    later.run()
    assert later.ids() == ids([message(n) for n in range(1, 7)])
    assert later.acked == [(2, [(1, n + 50) for n in range(1, 7)])]
    later.assert_adds_up()


def test_a_disk_that_is_really_full_is_survived(
    tmp_path: Path,
    desk: Callable[..., Desk],
    book: Logbook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector.store, "FULL_REMINDER_S", 0.0)
    sent = [message(n, pad_bytes=10_000) for n in range(1, 400)]
    with small_disk(tmp_path, 16) as disk:
        d = desk(directory=disk)
        d.house.turn(d.writer)
        assert (disk / "ballast").exists()
        fill_disk(disk / "hog")
        # By the third look the ballast is gone too, and the group still does not fit.

        def give_room_at_the_third() -> None:
            if len(book.lines(FULL)) == 3:
                (disk / "hog").unlink()

        book.when(FULL, give_room_at_the_third)
        d.inbox.put(read(*sent))
        d.run()
        assert len(book.lines(FULL)) == 3
        assert len(book.lines("the disk is full")) == 1, "a notice, and no flood of them"
        assert len(book.lines("gave up the ballast")) == 1
        assert d.ids() == ids(sent)
        assert d.acked == [(1, [(1, n) for n in range(1, 400)])]
        assert d.counters() | {"duplicates": 0} == {
            "received": 399,
            "spooled": 399,
            "duplicates": 0,
        }
        d.on_disk.close()  # before its disk goes


def test_a_stop_while_not_even_opening_finds_room_is_clean(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    script = Script()
    script.faults.append(disk_full())
    d = desk(script=script)
    beats: list[int] = []

    def stop_at_the_fifth(opening: int) -> None:
        beats.append(d.clock.asked)
        if opening == 5:
            d.stop.request("SIGTERM")

    script.on_opening = stop_at_the_fifth
    script.opening_faults.extend(DiskFullError("open failed") for _ in range(9))
    d.inbox.put(read(message(1)))
    d.run()
    assert script.openings == 5
    assert len(set(beats)) == 4, "looking for room is no stall"
    assert d.acked == []
    assert d.rows() == []
    assert d.store.failure is None
    assert book.levels("ends while nothing can be written") == ["WARNING"]


def test_after_a_full_disk_the_log_begins_anew(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    script.faults.append(disk_full())
    d = desk(script=script)
    pages: list[int] = []
    cut = SpoolWriter.checkpoint

    def counted(writer: SpoolWriter) -> None:
        pages.append(writer.wal_bytes())
        cut(writer)
        pages.append(writer.wal_bytes())

    monkeypatch.setattr(SpoolWriter, "checkpoint", counted)
    reader = SpoolReader.open(d.directory)  # or the reopening works the log off
    d.inbox.put(read(message(1)))
    d.run()
    reader.close()
    assert len(pages) == 4, "once after the reopening, once at the end"
    assert pages[0] > pages[1] == 0


def test_opening_is_tried_again_until_there_is_room(desk: Callable[..., Desk]) -> None:
    script = Script()
    script.faults.append(disk_full())
    d = desk(script=script)
    script.opening_faults.extend(DiskFullError("open failed") for _ in range(3))
    d.inbox.put(read(message(1)))
    d.run()
    assert script.openings == 5
    assert d.ids() == ids([message(1)])
    assert d.acked == [(1, [(1, 1)])]


def test_housekeeping_that_finds_the_disk_full_ends_nothing(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    script = Script()
    script.progress_faults.append(DiskFullError("store the sinks' progress failed"))
    d = desk(script=script)
    (d.directory / "ballast").touch()

    def a_message_comes() -> None:
        d.inbox.put(read(message(1)))
        d.inbox.close()

    book.when("the disk is full", a_message_comes)
    d.begin()
    d.store.join()
    assert not (d.directory / "ballast").exists()
    assert script.openings == 2
    assert d.ids() == ids([message(1)])
    assert d.acked == [(1, [(1, 1)])]


def test_what_is_to_be_remembered_outlives_a_full_disk(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    script = Script()
    script.meta_faults.append(DiskFullError("write meta failed"))
    d = desk(script=script)
    d.store.remember("mqtt_subscription", "old")
    book.when("the disk is full", lambda: d.store.remember("other", "x"))
    d.inbox.put(read(message(1)))
    book.when("the disk is full", lambda: d.inbox.put(read(message(2))))
    d.run()
    assert script.openings == 2
    assert d.on_disk.meta("mqtt_subscription") == "old"
    assert d.on_disk.meta("other") == "x"
    assert d.ids() == ids([message(1), message(2)])
