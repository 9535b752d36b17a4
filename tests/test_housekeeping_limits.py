"""How full the spool is: told once, room made as the policy says, space and ballast given back."""

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import collector.housekeeping
from collector.housekeeping import (
    BALLAST_INTERVAL_S,
    LEVEL_INTERVAL_S,
    PROGRESS_INTERVAL_S,
    warn_of_small_disk,
)
from spool import (
    Level,
    SpoolWriter,
    spool_path,
)
from tests.collector_parts import (
    MIB,
    Logbook,
    logbook,
)
from tests.house import HOUR_US, House, house_maker
from tests.test_spool_writer import look


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


def test_each_level_is_told_once_on_the_way_up_and_its_end_once(
    houses: Callable[..., House], book: Logbook
) -> None:
    house = houses(max_bytes=MIB)
    told: list[list[str]] = []

    def next_lines() -> list[str]:
        for _ in range(3):
            house.turn(LEVEL_INTERVAL_S)
        lines = [line for line in book.lines() if "ballast" not in line]
        book.records.clear()
        return lines

    told.append(next_lines())
    for level in (Level.WARN, Level.PRESSURE):
        house.fill_to(level)
        told.append(next_lines())
    house.fill_to(Level.FULL)
    told.append(next_lines())
    house.empty_to(Level.PRESSURE)
    told.append(next_lines())
    house.empty_to(Level.WARN)
    told.append(next_lines())
    house.empty_to(Level.GOOD)
    told.append(next_lines())
    house.fill_to(Level.WARN)
    told.append(next_lines())
    assert [[line.split(":")[0] for line in lines] for lines in told] == [
        [],
        ["the spool is filling up"],
        ["the spool is nearly full"],
        ["the spool is full"],
        [],
        [],
        ["the spool has room again"],
        ["the spool is filling up"],
    ]


def test_a_level_is_looked_at_once_a_second(houses: Callable[..., House], book: Logbook) -> None:
    house = houses(max_bytes=MIB)
    house.turn()
    house.fill_to(Level.WARN)
    house.turn(LEVEL_INTERVAL_S * 0.9)
    assert book.lines("filling up") == []
    house.turn(LEVEL_INTERVAL_S * 0.2)
    (values,) = book.values("filling up")
    assert values == {"used_bytes": house.writer.used_bytes(), "max_bytes": MIB}


def test_a_large_free_part_of_the_file_is_given_back_in_steps(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, kept = 256 * 1024, MIB
    monkeypatch.setattr(collector.housekeeping, "RETURN_SPACE_STEP_BYTES", step)
    monkeypatch.setattr(collector.housekeeping, "RETURN_SPACE_ABOVE_BYTES", kept)
    house.fill(1000)
    house.turn()
    assert not house.keeping.more
    assert house.writer.delete_through(1000, "pruned") == 1000
    free = [house.writer.free_bytes()]
    assert free[0] > kept + 2 * step
    while True:
        house.turn()
        free.append(house.writer.free_bytes())
        if not house.keeping.more:
            break
    assert free[-1] == free[-2] <= kept
    steps = [before - after for before, after in pairwise(free[:-1])]
    assert len(steps) >= 2
    assert all(0 < given <= step for given in steps)
    house.writer.checkpoint()
    assert spool_path(house.directory).stat().st_size < kept + MIB


def test_space_is_not_given_back_while_there_is_something_to_prune(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.housekeeping, "RETURN_SPACE_ABOVE_BYTES", 0)
    house.fill(500)
    house.writer.delete_through(300, "pruned")
    house.deliver(500)
    house.now_us = HOUR_US + 1
    before = house.writer.free_bytes()
    house.turn()
    assert house.left == (501, 500)
    assert house.writer.free_bytes() > before
    house.turn()
    assert house.writer.free_bytes() < before


def test_the_ballast_is_taken_and_after_it_was_given_up_taken_again_a_minute_later(
    house: House, tmp_path: Path, book: Logbook
) -> None:
    file = tmp_path / "ballast"
    house.turn()
    assert file.stat().st_size == MIB
    house.clock.now_s += BALLAST_INTERVAL_S - 1
    house.keeping.release_ballast()
    assert not file.exists()
    assert book.levels("gave up the ballast") == ["WARNING"]
    house.turn(BALLAST_INTERVAL_S - 1)
    assert not file.exists(), "the minute counts from when it was given up"
    house.turn(1)
    assert file.exists()


def test_giving_up_a_ballast_that_is_not_there_is_not_told(house: House, book: Logbook) -> None:
    house.keeping.release_ballast()
    assert book.lines() == []


def test_a_full_spool_takes_no_ballast_and_one_below_it_does(
    houses: Callable[..., House], tmp_path: Path
) -> None:
    house = houses(max_bytes=MIB)
    house.fill_to(Level.FULL)
    house.turn()
    house.turn(BALLAST_INTERVAL_S)
    assert not (tmp_path / "ballast").exists()
    house.empty_to(Level.PRESSURE)
    house.turn()
    assert (tmp_path / "ballast").exists(), "a look that found it full did not cost a minute"


def test_block_frees_what_is_delivered_and_shows_why_it_waits(house: House, book: Logbook) -> None:
    house.fill(10)
    house.turn()
    house.deliver(4)
    assert house.keeping.make_room(house.writer, drop_oldest=False)
    assert house.left == (5, 10)
    snapshots = house.script.snapshots
    assert not house.keeping.make_room(house.writer, drop_oldest=False)
    assert house.left == (5, 10)
    assert house.script.snapshots == snapshots, "not due yet"
    house.clock.now_s += PROGRESS_INTERVAL_S
    assert not house.keeping.make_room(house.writer, drop_oldest=False)
    assert house.shown()["pubsub"] == (1, 4, "starting")
    assert book.lines() == []
    health = "SELECT name, severity FROM health"
    assert look(house.directory / "spool.db", health) == [("spool_full", "CRITICAL")]
    house.turn()
    assert look(house.directory / "spool.db", health) == []


def test_drop_oldest_takes_delivered_rows_first_and_then_tells_what_it_drops(
    house: House, book: Logbook
) -> None:
    house.fill(100)
    house.deliver(4)
    assert house.keeping.make_room(house.writer, drop_oldest=True)
    assert (house.left, house.writer.counter("dropped")) == ((5, 100), 0)
    assert book.lines() == []
    assert house.keeping.make_room(house.writer, drop_oldest=True)
    dropped = house.left[0] - 5
    assert dropped > 0
    assert house.writer.counter("dropped") == dropped
    assert book.levels("drop-oldest") == ["ERROR"]
    assert book.values("drop-oldest") == [{"rows": dropped, "total": dropped}]
    assert house.writer.meta("dropped_through_seq") == str(house.left[0] - 1)


def test_drop_oldest_has_nothing_to_drop_in_an_empty_spool(house: House, book: Logbook) -> None:
    assert not house.keeping.make_room(house.writer, drop_oldest=True)
    assert book.lines() == []


def test_a_disk_that_is_smaller_than_the_limit_is_warned_of(
    house: House, tmp_path: Path, book: Logbook
) -> None:
    free = shutil.disk_usage(tmp_path).free
    warn_of_small_disk(house.writer, free // 2)
    assert book.lines() == []
    warn_of_small_disk(house.writer, free * 2)
    assert book.levels("larger than the disk has room for") == ["WARNING"]
    (values,) = book.values("larger than the disk")
    assert values["directory"] == str(tmp_path)
    assert values["needed_bytes"] == free * 2 - house.writer.used_bytes()


def test_what_the_spool_has_already_needs_no_room_any_more(
    house: House, monkeypatch: pytest.MonkeyPatch, book: Logbook
) -> None:
    house.fill(500)
    used = house.writer.used_bytes()

    class Usage:
        free = 100_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    warn_of_small_disk(house.writer, used + 100_000)
    assert book.lines() == []
    warn_of_small_disk(house.writer, used + 100_001)
    assert len(book.lines()) == 1


def test_a_spool_that_is_over_its_limit_is_no_small_disk(house: House, book: Logbook) -> None:
    house.fill(500)
    warn_of_small_disk(house.writer, 0)
    assert book.lines() == []


def test_the_level_counts_what_is_about_to_come(houses: Callable[..., House]) -> None:
    house = houses(max_bytes=MIB)
    house.fill_to(Level.PRESSURE)
    writer: SpoolWriter = house.writer
    assert house.keeping.level(writer) is Level.PRESSURE
    assert house.keeping.level(writer, MIB // 4) is Level.FULL
