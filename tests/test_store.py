"""What the writer thread takes is durable before it is acknowledged, in order, and once."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import collector.store
from collector.housekeeping import Housekeeping
from collector.inbox import Inbox
from collector.packets import Message
from collector.paho_client import Ack
from collector.store import LOOP, SALVAGE_KEY, Store
from collector.validation import Validator
from lifecycle import StopRequest, Watchdog
from spool import (
    Ballast,
    Budget,
    CorruptFileError,
    DiskFullError,
    Level,
    Retention,
    Salvage,
    SinkFile,
    SpoolError,
    SpoolWriter,
    StorageFaultError,
    set_aside,
    spool_path,
)
from tests.collector_parts import (
    MIB,
    Clock,
    Fault,
    Logbook,
    Script,
    deliver_through,
    disk_full,
    fill_disk,
    garbage,
    identity,
    logbook,
    message,
    open_scripted,
    read,
    small_disk,
)
from tests.test_spool_writer import look, new_reading

FULL = "the spool is full: no message is acknowledged"
FILLER_BYTES = 4096


class Watched(Housekeeping):
    """The real one, that says when it was asked to make room."""

    def __init__(self, *, on_full: Callable[[int], object], **parts: object) -> None:
        super().__init__(**parts)  # type: ignore[arg-type]
        self._on_full = on_full
        self.rounds = 0

    def make_room(self, writer: SpoolWriter, *, drop_oldest: bool) -> bool:
        self.rounds += 1
        self._on_full(self.rounds)
        return super().make_room(writer, drop_oldest=drop_oldest)


class Desk:
    """A store with everything around it that is real, and what it acknowledged."""

    def __init__(  # noqa: PLR0913 - each is what some test varies
        self,
        directory: Path,
        *,
        max_bytes: int = 64 * MIB,
        drop_oldest: bool = False,
        dedup_window: int = 1000,
        salvage: Salvage | None = None,
        script: Script | None = None,
        on_full: Callable[[int], object] = lambda _: None,
        on_ack: Callable[[], object] = lambda: None,
    ) -> None:
        self.directory = directory
        self.script = script or Script()
        self.stop = StopRequest()
        self.inbox = Inbox(on_room=self.stop.wake)
        self.acked: list[tuple[int, list[Ack]]] = []
        self.budget = Budget(max_bytes)
        self._on_ack = on_ack
        self.clock = Clock()
        self.writer = open_scripted(directory, self.script)
        self.house = Watched(
            on_full=on_full,
            sinks=[SinkFile(directory, "pubsub", enabled=True)],
            retention=Retention(10**15),
            budget=self.budget,
            ballast=Ballast(directory, max_bytes),
            salvage=salvage,
        )
        self.store = Store(
            open_writer=lambda: open_scripted(directory, self.script),
            writer=self.writer,
            inbox=self.inbox,
            validator=Validator(),
            housekeeping=self.house,
            dedup_window=dedup_window,
            acknowledge=self._acknowledge,
            drop_oldest=drop_oldest,
            stop=self.stop,
            # The network loop never turns here, so this never ends the test run.
            watchdog=Watchdog([LOOP, "network"], 1e6, self.clock),
        )

    def _acknowledge(self, generation: int, acks: list[Ack]) -> None:
        self._on_ack()
        self.acked.append((generation, acks))

    def begin(self) -> None:
        self.store.start()

    def end(self) -> None:
        """Close the inbox and wait for the end; raises what ended the writer thread."""
        self.inbox.close()
        self.store.join()

    def run(self) -> None:
        self.begin()
        self.end()

    def fill(self, *, until_level: Level, incoming_bytes: int) -> None:
        """Spool undelivered readings until so many bytes more would be at this level."""
        number = 0
        while self.budget.level(self.writer, incoming_bytes) < until_level:
            number -= 1
            row = new_reading(number, payload=b"x" * FILLER_BYTES)
            SpoolWriter.append(self.writer, [row], (), {})

    def ids(self) -> list[bytes]:
        return [x for (x,) in self.rows() if isinstance(x, bytes)]

    def rows(self) -> list[tuple[object, ...]]:
        return look(spool_path(self.directory), "SELECT event_id FROM reading_row ORDER BY seq")

    def counters(self) -> dict[str, int]:
        found = look(spool_path(self.directory), "SELECT name, value FROM counter")
        return {str(name): int(str(value)) for name, value in found}

    def assert_adds_up(self) -> None:
        counts = self.counters()
        parts = (counts.get(name, 0) for name in ("spooled", "duplicates", "rejected"))
        assert counts.get("received", 0) == sum(parts)


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
    made: list[Desk] = []

    def make(**options: object) -> Desk:
        directory = options.pop("directory", tmp_path)
        assert isinstance(directory, Path)
        made.append(Desk(directory, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.inbox.close()
        one.stop.request("the test is over")
        if one.store._thread.ident is not None:  # noqa: SLF001 - whether it was started
            one.store._thread.join()  # noqa: SLF001 - a test that failed must not leave it
        one.stop.close()
        one.store._writer.close()  # noqa: SLF001 - the one it has now


def ids(messages: Sequence[Message]) -> list[bytes]:
    return [identity(one) for one in messages]


# --- one transaction, then the acknowledgements


def test_what_several_reads_brought_is_one_transaction(desk: Callable[..., Desk]) -> None:
    d = desk()
    sent = [message(n) for n in range(1, 8)]
    d.inbox.put(read(*sent[:3]))
    d.inbox.put(read(*sent[3:4]))
    d.inbox.put(read(*sent[4:], generation=2))
    d.run()
    assert d.script.appends == [7]
    assert d.ids() == ids(sent)
    assert d.acked == [
        (1, [(1, 1), (1, 2), (1, 3)]),
        (1, [(1, 4)]),
        (2, [(1, 5), (1, 6), (1, 7)]),
    ]
    assert d.counters() == {"received": 7, "spooled": 7}


def test_an_acknowledgement_is_handed_over_only_once_everybody_can_read_the_row(
    desk: Callable[..., Desk],
) -> None:
    seen: list[int] = []
    d = desk(on_ack=lambda: seen.append(len(d.rows()) + d.counters()["rejected"]))
    d.inbox.put(read(message(1), garbage(2)))
    d.inbox.put(read(message(3)))
    d.run()
    assert seen == [3, 3]


def test_a_group_has_a_limit_and_the_order_is_kept_over_groups(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "GROUP_MAX_MESSAGES", 4)
    d = desk()
    sent = [message(n) for n in range(1, 12)]
    for start in range(0, 11, 2):
        d.inbox.put(read(*sent[start : start + 2]))
    d.run()
    assert d.script.appends == [4, 4, 3]
    assert d.ids() == ids(sent)
    assert [ack for _, acks in d.acked for ack in acks] == [(1, n) for n in range(1, 12)]


def test_rejected_and_duplicate_messages_are_acknowledged_in_their_places(
    desk: Callable[..., Desk],
) -> None:
    d = desk()
    again = message(1, mid=4)
    d.inbox.put(read(message(1), garbage(2), message(3), again, message(5, qos=2)))
    d.run()
    assert d.acked == [(1, [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5)])]
    assert d.ids() == ids([message(1), message(3), message(5)])
    rejected = look(spool_path(d.directory), "SELECT reason, payload FROM rejected_row")
    assert rejected == [("not_json", b"not json 2")]
    assert d.counters() | {"rejected_kept_bytes": 0} == {
        "received": 5,
        "spooled": 3,
        "duplicates": 1,
        "rejected": 1,
        "rejected_kept_bytes": 0,
    }


def test_what_came_with_qos_0_is_spooled_and_never_acknowledged(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    d.inbox.put(read(message(1, qos=0), garbage(2, qos=0), message(1, qos=0)))
    d.inbox.put(read(message(3, qos=0), message(4), generation=2))
    d.run()
    assert d.acked == [(2, [(1, 4)])]
    assert d.ids() == ids([message(1, qos=0), message(3, qos=0), message(4)])
    assert d.counters()["qos0"] == 4
    assert len(book.lines("messages come with QoS 0")) == 1
    d.assert_adds_up()


def test_a_group_of_nothing_but_rejections_is_stored_and_acknowledged(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    d.inbox.put(read(garbage(1), garbage(1), garbage(2)))
    d.run()
    assert d.acked == [(1, [(1, 1), (1, 1), (1, 2)])]
    assert d.rows() == []
    # The same garbage twice is two rejections: only what is spooled has duplicates.
    assert (d.counters()["rejected"], d.counters().get("duplicates")) == (3, None)
    (told,) = book.values("message rejected")
    assert told["reason"] == "not_json"
    assert told["look"] == "select * from rejected"
    d.assert_adds_up()


def test_duplicates_are_known_within_a_group_over_groups_and_over_a_restart(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "GROUP_MAX_MESSAGES", 3)
    d = desk()
    d.inbox.put(read(message(1), message(2), message(1)))
    d.inbox.put(read(message(2), message(3)))
    d.run()
    assert d.script.appends == [2, 1]
    assert d.counters() == {"received": 5, "spooled": 3, "duplicates": 2}
    later = desk()
    later.inbox.put(read(message(3, mid=9), message(4)))
    later.run()
    assert later.acked == [(1, [(1, 9), (1, 4)])]
    assert later.ids() == ids([message(n) for n in (1, 2, 3, 4)])
    assert later.counters() == {"received": 7, "spooled": 4, "duplicates": 3}


def test_a_dedup_window_of_zero_spools_everything(desk: Callable[..., Desk]) -> None:
    d = desk(dedup_window=0)
    d.inbox.put(read(message(1), message(1)))
    d.run()
    assert d.ids() == ids([message(1), message(1)])
    assert d.counters() == {"received": 2, "spooled": 2}


def test_another_site_in_the_payload_is_counted_and_told_once_and_so_are_retained_ones(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    d.inbox.put(read(message(1, site="S9"), message(2, site="S9"), message(3, retained=True)))
    d.run()
    counts = d.counters()
    assert (counts["site_mismatch"], counts["retained"], counts["spooled"]) == (2, 1, 3)
    (told,) = book.values("differs from the topic's")
    assert told["site_code"] == "S9"


def test_the_sinks_positions_ride_along_with_the_first_group(desk: Callable[..., Desk]) -> None:
    d = desk()
    deliver_through(d.directory, 0, d.writer.epoch)
    d.inbox.put(read(message(1)))
    d.run()
    # One with the group, and the last one at the end; none of its own in between.
    assert d.script.snapshots == 2
    shown = look(spool_path(d.directory), "SELECT sink, pending, state FROM backlog")
    assert shown == [("pubsub", 1, "starting")]


def test_what_is_to_be_remembered_is_in_meta_after_the_next_turn(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.store.remember("mqtt_subscription", "first")
    d.store.remember("mqtt_subscription", "second")
    d.store.remember("other", "x")
    d.inbox.put(read(message(1)))
    d.run()
    assert d.store._writer.meta("mqtt_subscription") == "second"  # noqa: SLF001 - as it is on disk
    assert d.store._writer.meta("other") == "x"  # noqa: SLF001


def test_the_end_of_the_thread_leaves_no_log_behind(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.inbox.put(read(message(1)))
    assert not d.store.finished or d.store._thread.ident is None  # noqa: SLF001 - not begun
    d.run()
    assert d.store.finished
    assert d.writer.wal_bytes() == 0
    assert not d.stop.requested


# --- a full spool


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
        book.when(FULL, lambda: len(book.lines(FULL)) == 3 and (disk / "hog").unlink())
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
        d.store._writer.close()  # noqa: SLF001 - before its disk goes


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
    assert book.levels("ends while the disk is full") == ["WARNING"]


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
    d = desk(script=script)
    d.house.turn(d.writer)
    deliver_through(d.directory, 0, d.writer.epoch)  # a change, so a snapshot is due
    monotonic = Clock()
    d.house._clock = monotonic  # noqa: SLF001 - a second later
    monotonic.now_s = 1e12
    script.progress_faults.append(DiskFullError("store the sinks' progress failed"))
    d.begin()
    d.end()
    assert d.store.failure is None
