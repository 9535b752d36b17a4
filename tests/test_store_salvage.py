"""A damaged spool is copied between the groups: every row once, whatever interrupts it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import collector.store
from collector.store import SALVAGE_KEY
from spool import (
    Level,
    Salvage,
    SpoolError,
    SpoolWriter,
    StorageFaultError,
    set_aside,
    spool_path,
)
from spool.recovery import SALVAGE_STEP_ROWS
from tests.collector_parts import (
    MIB,
    Fault,
    Logbook,
    Script,
    deliver_through,
    disk_full,
    fill_disk,
    identity,
    logbook,
    message,
    read,
    small_disk,
)
from tests.store_desk import FILLER_BYTES, Desk, desks, ids
from tests.test_spool_writer import new_reading

COPIED = "what could be read of the damaged spool"
SALVAGED = 2500
"""Two whole steps and a half one."""

OLD = [new_reading(n)[0] for n in range(SALVAGED)]


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


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A spool of SALVAGED readings that was set aside."""
    writer = SpoolWriter.open(tmp_path)
    rows = [new_reading(n) for n in range(SALVAGED)]
    writer.append(rows, [], {})
    writer.close()
    return set_aside(spool_path(tmp_path), now_s=0)


def salvaging(make: Callable[..., Desk], damaged: Path, **options: object) -> Desk:
    d = make(salvage=Salvage(damaged, 0), **options)
    d.writer.set_meta(SALVAGE_KEY, Salvage(damaged, 0).position())
    return d


def test_a_damaged_spool_is_copied_between_the_groups_and_its_end_is_told(
    desk: Callable[..., Desk], damaged: Path, book: Logbook
) -> None:
    d = salvaging(desk, damaged)
    d.inbox.put(read(message(1)))
    book.when(COPIED, lambda: d.inbox.put(read(message(2))))
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert d.ids() == [identity(message(1)), *OLD, identity(message(2))]
    assert d.acked == [(1, [(1, 1)]), (1, [(1, 2)])]
    assert d.counters() == {"received": 2, "spooled": 2, "salvaged": SALVAGED}
    assert d.on_disk.meta(SALVAGE_KEY) == ""
    assert book.levels(COPIED) == ["CRITICAL"]
    (told,) = book.values(COPIED)
    assert told == {"file": str(damaged), "salvaged_rows": SALVAGED, "damaged_rows": 0}
    assert damaged.exists()
    assert d.house.salvage is None


def test_a_copy_that_is_interrupted_goes_on_where_it_was(
    desk: Callable[..., Desk], damaged: Path
) -> None:
    d = salvaging(desk, damaged)
    # The acknowledgement comes before the first step of the copy.
    d.inbox.put(read(message(1)))
    d.begin()
    d.inbox.close()
    d.store.join()
    copied = len(d.ids()) - 1
    assert SALVAGE_STEP_ROWS <= copied < SALVAGED
    assert d.ids() == [identity(message(1)), *OLD[:copied]]
    later = desk(salvage=Salvage.resumed(d.on_disk.meta(SALVAGE_KEY)))
    with logbook() as book:
        book.when(COPIED, later.inbox.close)
        later.begin()
        later.store.join()
        (told,) = book.values(COPIED)
    assert told["salvaged_rows"] == SALVAGED, "the sum of both"
    assert later.ids() == [identity(message(1)), *OLD]
    assert later.counters()["salvaged"] == SALVAGED


def test_what_the_broker_sent_again_meanwhile_is_not_copied_as_well(
    desk: Callable[..., Desk], tmp_path: Path, book: Logbook
) -> None:
    first = desk()
    first.inbox.put(read(message(1), message(2)))
    first.run()
    first.on_disk.close()  # it is set aside
    d = salvaging(desk, set_aside(spool_path(tmp_path), now_s=0))
    d.inbox.put(read(message(2)))
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert d.ids() == ids([message(2), message(1)])
    assert d.counters() == {"received": 1, "spooled": 1, "salvaged": 1}


@pytest.mark.parametrize("durable_share", [0.0, 1.0])
@pytest.mark.parametrize("step", range(4))
def test_a_copy_that_finds_the_disk_full_is_continued_and_leaves_nothing_out(
    desk: Callable[..., Desk], damaged: Path, book: Logbook, step: int, durable_share: float
) -> None:
    script = Script()
    script.faults.extend([*[None] * step, disk_full(durable_share), disk_full(durable_share)])
    d = salvaging(desk, damaged, script=script)
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert d.ids() == OLD
    assert d.counters() == {"salvaged": SALVAGED}
    assert d.on_disk.meta(SALVAGE_KEY) == ""
    assert len(book.lines(COPIED)) == 1


def test_a_copy_that_finds_no_room_does_not_try_again_at_once(
    desk: Callable[..., Desk], damaged: Path, book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "IDLE_WAIT_S", 0.001)
    script = Script()
    script.faults.extend([None, disk_full(), disk_full()])
    d = salvaging(desk, damaged, script=script)
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert d.inbox.waits == [0.0, 0.0, 0.001, 0.001, 0.0]


def test_a_copy_that_finds_no_room_does_not_keep_the_pruning_from_making_some(
    desk: Callable[..., Desk], damaged: Path, book: Logbook
) -> None:
    script = Script()
    script.faults.append(disk_full())
    d = salvaging(desk, damaged, script=script, max_bytes=MIB)
    d.fill(until_level=Level.PRESSURE, incoming_bytes=0)
    deliver_through(d.directory, d.writer.last_seq(), d.writer.epoch)

    def no_room_before_the_pruning(opening: int) -> None:
        if "pruned" not in d.counters():
            script.faults.append(disk_full())
        if opening == 10:
            d.inbox.close()

    script.on_opening = no_room_before_the_pruning
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert len(book.lines(COPIED)) == 1
    assert d.ids()[-SALVAGED:] == OLD


def test_a_message_that_only_a_failed_step_of_the_copy_knew_is_no_duplicate(
    desk: Callable[..., Desk], tmp_path: Path, book: Logbook
) -> None:
    first = desk()
    first.inbox.put(read(message(1), message(2), message(3)))
    first.run()
    first.on_disk.close()  # it is set aside
    script = Script()
    script.faults.append(disk_full())
    stored: list[list[bytes]] = []
    d: Desk = salvaging(
        desk,
        set_aside(spool_path(tmp_path), now_s=0),
        script=script,
        on_ack=lambda: stored.append(d.ids()),
    )
    book.when("the disk is full", lambda: d.inbox.put(read(message(2))))
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert stored == [ids([message(2)])], "it is on the disk before it is acknowledged"
    assert d.ids() == ids([message(2), message(1), message(3)])


def test_a_copy_outlives_a_disk_that_is_really_full(
    tmp_path: Path, desk: Callable[..., Desk], book: Logbook
) -> None:
    rows = [new_reading(n, payload=b"x" * FILLER_BYTES) for n in range(1000)]
    with small_disk(tmp_path, 24) as disk:
        writer = SpoolWriter.open(disk)
        writer.append(rows, [], {})
        writer.close()
        script = Script()
        d = salvaging(desk, set_aside(spool_path(disk)), directory=disk, script=script)
        fill_disk(disk / "hog")

        def give_room(opening: int) -> None:
            if opening == 4:
                (disk / "hog").unlink()

        script.on_opening = give_room
        book.when(COPIED, d.inbox.close)
        d.begin()
        d.store.join()
        assert script.openings == 4
        assert d.ids() == [row[0] for row in rows]
        d.on_disk.close()  # before its disk goes


def test_a_copy_waits_for_room_in_the_budget_and_leaves_some_for_new_readings(
    desk: Callable[..., Desk], tmp_path: Path, book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "IDLE_WAIT_S", 0.001)
    writer = SpoolWriter.open(tmp_path)
    # Two on a page, so that they take little more than what they hold.
    writer.append([new_reading(n, payload=b"x" * 1_900) for n in range(SALVAGED)], [], {})
    writer.close()
    damaged = set_aside(spool_path(tmp_path), now_s=0)
    used: list[int] = []

    def look_and_go_on() -> None:
        used.append(d.on_disk.used_bytes())
        d.inbox.put(read(message(1)))

    def deliver_all() -> None:
        deliver_through(d.directory, d.on_disk.last_seq(), d.writer.epoch)

    d: Desk = salvaging(desk, damaged, max_bytes=4 * MIB, on_ack=deliver_all)
    book.when("is not copied until there is room", look_and_go_on)
    book.when(COPIED, d.inbox.close)
    d.begin()
    d.store.join()
    assert len(used) == 1
    assert 2 * MIB < used[0] <= 4 * MIB < damaged.stat().st_size
    assert d.acked == [(1, [(1, 1)])], "before there was room for the rest"
    assert d.counters()["salvaged"] == SALVAGED
    assert d.counters()["pruned"] > 0
    assert d.ids()[-1] == OLD[-1]


def test_an_error_of_the_copy_is_no_full_disk_and_ends_the_program(
    desk: Callable[..., Desk], damaged: Path
) -> None:
    script = Script()
    script.faults.append(Fault(StorageFaultError("append failed")))
    d = salvaging(desk, damaged, script=script)
    with pytest.raises(SpoolError):
        d.run()
