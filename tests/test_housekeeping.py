"""Between the batches: what is due is done, no sooner, and nothing goes that a sink needs."""

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
    UNCHANGED_PROGRESS_INTERVAL_S,
    Housekeeping,
    warn_of_small_disk,
)
from spool import (
    SPOOL_DAMAGED,
    Ballast,
    Budget,
    CorruptFileError,
    Level,
    Retention,
    Salvage,
    SinkFile,
    SinkState,
    SpoolWriter,
    sink_path,
    spool_path,
)
from tests.collector_parts import (
    MIB,
    Clock,
    Logbook,
    Script,
    ScriptedWriter,
    deliver_through,
    logbook,
    open_scripted,
)
from tests.test_spool_writer import edit, look, new_reading

HOUR_US = 3_600_000_000
ROW_BYTES = 2000


class House:
    """Housekeeping over a real spool and real sinks' files, with a clock that a test moves."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = 64 * MIB,
        keep_us: int = HOUR_US,
        enabled: tuple[str, ...] = ("pubsub", "bigquery"),
    ) -> None:
        self.directory = directory
        self.script = Script()
        self.writer: ScriptedWriter = open_scripted(directory, self.script)
        self.clock = Clock()
        self.now_us = 0
        self.budget = Budget(max_bytes)
        self.keeping = Housekeeping(
            sinks=[SinkFile(directory, s, enabled=s in enabled) for s in ("pubsub", "bigquery")],
            retention=Retention(keep_us),
            budget=self.budget,
            ballast=Ballast(directory, max_bytes),
            clock=self.clock,
            now_us=lambda: self.now_us,
        )

    def turn(self, later_s: float = 0.0) -> None:
        self.clock.now_s += later_s
        self.keeping.turn(self.writer)

    def fill(self, rows: int, received_us: int = 0) -> None:
        first = self.writer.last_seq()
        payload = b"x" * ROW_BYTES
        self.writer.append(
            [new_reading(first + n, payload=payload, received_us=received_us) for n in range(rows)],
            [],
            {},
        )

    def fill_to(self, level: Level) -> None:
        """Spool rows, one at a time, until the spool is at this level."""
        while self.budget.level(self.writer) < level:
            self.fill(1)
        assert self.budget.level(self.writer) is level

    def empty_to(self, level: Level) -> None:
        """Take the oldest rows out, one at a time, until the spool is at this level."""
        while self.budget.level(self.writer) > level:
            self.writer.delete_through(self.writer.first_seq(), "dropped")
        assert self.budget.level(self.writer) is level

    def deliver(self, seq: int, *sinks: str) -> None:
        for sink in sinks or ("pubsub", "bigquery"):
            deliver_through(self.directory, seq, self.writer.epoch, sink)

    @property
    def left(self) -> tuple[int, int]:
        return self.writer.first_seq(), self.writer.last_seq()

    def shown(self) -> dict[object, tuple[object, ...]]:
        rows = look(
            spool_path(self.directory),
            "SELECT sink, enabled, cursor_seq, state FROM sink_progress",
        )
        return {row[0]: row[1:] for row in rows}


@pytest.fixture
def houses(tmp_path: Path) -> Iterator[Callable[..., House]]:
    made: list[House] = []

    def make(**options: object) -> House:
        made.append(House(tmp_path, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.writer.close()


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
    house.turn(PROGRESS_INTERVAL_S)
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
    house.turn()
    assert house.left == (6, 10)
    house.now_us += 1000
    house.turn()
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
