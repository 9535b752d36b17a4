"""Between the batches: what is due is done, no sooner, and nothing goes that a sink needs."""

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collector.housekeeping import (
    PROGRESS_INTERVAL_S,
    UNCHANGED_PROGRESS_INTERVAL_S,
)
from spool import (
    SPOOL_DAMAGED,
    CorruptFileError,
    Level,
    Salvage,
    SinkState,
    sink_path,
    spool_path,
)
from spool.beat import BEAT_S, RIDE_FROM_S
from spool.retention import FEW_EACH_S
from tests.collector_parts import (
    MIB,
    Logbook,
    deliver_through,
    logbook,
)
from tests.house import HOUR_US, House, house_maker
from tests.test_spool_writer import edit


@pytest.fixture
def houses(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with house_maker(tmp_path) as make:
        yield make


@pytest.fixture
def house(houses: Callable[..., House]) -> House:
    return houses()


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook() as opened:
        yield opened


def test_the_first_turn_shows_where_every_sink_stands(house: House) -> None:
    house.fill(5)
    house.deliver(3, "pubsub")
    house.turn()
    assert house.shown() == {"pubsub": (1, 3, "starting"), "bigquery": (1, 0, "no file")}


def test_a_snapshot_is_stored_a_second_after_a_change_and_not_sooner(house: House) -> None:
    house.fill(9)
    house.deliver(1)
    house.turn()
    assert house.script.snapshots == 1
    for seq in range(2, 8):
        house.deliver(seq)
        house.turn(PROGRESS_INTERVAL_S / 10)
    assert house.script.snapshots == 1
    assert house.shown()["pubsub"] == (1, 1, "starting")
    house.turn(PROGRESS_INTERVAL_S)
    assert house.script.snapshots == 2
    assert house.shown()["pubsub"] == (1, 7, "starting")


def test_an_unchanged_snapshot_is_stored_seldom_but_stays_fresh(house: House) -> None:
    house.turn()
    steps = int(UNCHANGED_PROGRESS_INTERVAL_S / PROGRESS_INTERVAL_S) - 1
    for _ in range(steps):
        house.turn(PROGRESS_INTERVAL_S)
    assert house.script.snapshots == 1
    house.turn(PROGRESS_INTERVAL_S)
    assert house.script.snapshots == 2


def test_a_sign_of_life_is_written_in_time_whatever_snapshots_take_along(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat, written = house.writer.beat, []
    monkeypatch.setattr(beat, "_clock", house.clock)
    write = beat.write

    def noted(conn: sqlite3.Connection) -> None:
        written.append(house.clock.now_s)
        write(conn)

    monkeypatch.setattr(beat, "write", noted)
    for second in range(60):
        if second in {0, 8, 30}:  # a snapshot at 8 is too soon to take one along
            house.deliver(second)
        house.turn(PROGRESS_INTERVAL_S)
    gaps = [after - before for before, after in itertools.pairwise(written)]
    assert max(gaps) <= BEAT_S
    assert len(written) <= 60 / RIDE_FROM_S


def test_what_rode_along_with_a_group_is_not_stored_again(house: House) -> None:
    house.turn()
    house.deliver(0)
    house.turn(PROGRESS_INTERVAL_S / 2)
    house.clock.now_s += UNCHANGED_PROGRESS_INTERVAL_S
    progress = house.keeping.progress_if_due()
    assert [p.sink for p in progress] == ["pubsub", "bigquery"]
    assert house.keeping.progress_if_due() == []


def test_the_last_snapshot_shows_the_sinks_as_they_are_now(house: House) -> None:
    house.fill(3)
    house.turn()
    house.deliver(2)
    house.keeping.snapshot(house.writer)
    assert house.shown()["bigquery"] == (1, 2, "starting")


def test_pruning_stays_behind_the_slowest_enabled_sink(house: House) -> None:
    house.fill(10)
    house.now_us = HOUR_US + 1
    house.deliver(9, "pubsub")
    house.deliver(4, "bigquery")
    house.turn()
    assert house.left == (5, 10)
    house.deliver(7, "bigquery")
    house.turn(FEW_EACH_S)
    assert house.left == (8, 10)
    assert house.writer.counter("pruned") == 7


def test_a_disabled_sink_holds_nothing(houses: Callable[..., House]) -> None:
    house = houses(enabled=("pubsub",))
    house.fill(10)
    house.now_us = HOUR_US + 1
    house.deliver(6, "pubsub")
    house.turn()
    assert house.left == (7, 10)
    assert house.shown()["bigquery"] == (0, 0, "no file")


def test_an_enabled_sink_whose_file_is_missing_counts_as_0_until_it_is_there(
    house: House, tmp_path: Path
) -> None:
    house.fill(10)
    house.now_us = HOUR_US + 1
    house.deliver(10)
    away = sink_path(tmp_path, "bigquery").rename(tmp_path / "away")
    house.turn()
    assert house.left == (1, 10)
    assert not house.keeping.make_room(house.writer, drop_oldest=False)
    assert house.left == (1, 10)
    assert house.shown()["bigquery"] == (1, 0, "no file")
    away.rename(sink_path(tmp_path, "bigquery"))
    house.turn(PROGRESS_INTERVAL_S)
    assert house.left == (11, 10)


def test_delivered_rows_stay_for_the_retention(house: House) -> None:
    house.fill(5, received_us=1000)
    house.fill(5, received_us=2000)
    house.deliver(10)
    house.now_us = HOUR_US + 1000
    house.turn()
    assert house.left == (1, 10)
    house.now_us += 1
    house.turn(FEW_EACH_S)
    assert house.left == (6, 10)
    house.now_us += 1000
    house.turn(FEW_EACH_S)
    assert house.left == (11, 10)


def test_pruning_goes_in_steps_and_says_that_there_is_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spool.retention.PRUNE_STEP_ROWS", 4)
    house.fill(10)
    house.deliver(10)
    assert not house.keeping.more
    house.now_us = HOUR_US + 1
    left = []
    for _ in range(4):
        house.turn()
        left.append((house.left[0], house.keeping.more))
    assert left == [(5, True), (9, True), (11, True), (11, False)]


def test_when_space_is_short_delivered_rows_go_early_and_no_others(
    houses: Callable[..., House],
) -> None:
    house = houses(max_bytes=MIB)
    house.fill_to(Level.WARN)
    last = house.writer.last_seq()
    house.deliver(last // 2)
    house.turn()
    assert house.left[0] == 1, "not yet short"
    house.fill_to(Level.PRESSURE)
    house.turn(PROGRESS_INTERVAL_S)
    assert house.left == (last // 2 + 1, house.writer.last_seq())
    assert house.writer.counter("pruned") == last // 2
    assert house.writer.counter("dropped") == 0


def say_damaged(house: House, sink: str) -> None:
    state = SinkState.open(house.directory, sink)
    state.set_status(SPOOL_DAMAGED, "it could not be read")
    state.close()


def holed(house: House) -> None:
    """Take a row out of the middle, as only damage does."""
    edit(spool_path(house.directory), "DELETE FROM reading_row WHERE seq = 5")


def test_a_forwarder_that_cannot_read_the_spool_makes_its_owner_look(house: House) -> None:
    house.fill(10)
    holed(house)
    house.turn()
    say_damaged(house, "bigquery")
    house.turn(PROGRESS_INTERVAL_S / 2)  # not looked at yet
    with pytest.raises(CorruptFileError, match="not in order"):
        house.turn(PROGRESS_INTERVAL_S)


def test_the_owner_looks_behind_that_forwarders_cursor_only(house: House) -> None:
    house.fill(10)
    holed(house)
    house.deliver(6)
    say_damaged(house, "bigquery")
    house.turn()
    assert house.shown()["bigquery"] == (1, 6, SPOOL_DAMAGED)


def test_a_disabled_sink_or_a_false_alarm_sets_nothing_aside(houses: Callable[..., House]) -> None:
    house = houses(enabled=("pubsub",))
    house.fill(10)
    say_damaged(house, "pubsub")
    house.turn()
    holed(house)
    deliver_through(house.directory, 5, house.writer.epoch, "pubsub")
    say_damaged(house, "bigquery")
    house.turn(PROGRESS_INTERVAL_S)
    assert house.left == (1, 10)


def test_the_end_of_a_salvage_is_told_with_what_was_lost_and_once(
    house: House, tmp_path: Path, book: Logbook
) -> None:
    salvage = Salvage(tmp_path / "spool.db.damaged-x", 0)
    salvage.readable, salvage.unreadable = 7, 2
    house.keeping.salvage = salvage
    house.turn()
    assert house.keeping.more, "there is something to copy"
    house.keeping.end_salvage()
    house.keeping.end_salvage()
    assert book.levels("what could be read") == ["CRITICAL"]
    assert book.values("what could be read") == [
        {"file": str(salvage.path), "salvaged_rows": 7, "damaged_rows": 2}
    ]
    house.turn()
    assert not house.keeping.more
