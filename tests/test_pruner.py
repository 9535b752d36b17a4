"""Pruning keeps up with what comes, hardly disturbs it, and never takes what a sink needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import collector.housekeeping
import spool.retention
from collector.housekeeping import RETURN_SPACE_BUSY_INTERVAL_S, Housekeeping
from spool import Ballast, Budget, Pruner, Retention, SinkProgress, SpoolWriter, StorageFaultError
from spool.retention import (
    ALONG_MAX_ROWS,
    ALONG_PER_READING,
    FEW_EACH_S,
    PRUNE_STEP_HALVINGS,
    PRUNE_STEP_ROWS,
    PRUNE_STEP_S,
    QUIET_S,
    WORTH_ROWS,
)
from spool.writer import PAGE_BYTES
from tests.collector_parts import Clock
from tests.test_spool_writer import look, new_reading, progress

DUE, YOUNG = 0, 10
"""When rows were received; at NOW_US the first are due and the others are not."""

KEEP_US, NOW_US = 5, 9


class Plant:
    """A spool that readings come into, and its pruner, with a clock that a test moves."""

    def __init__(self, directory: Path) -> None:
        self.writer = SpoolWriter.open(directory)
        self.clock = Clock()
        self.pruner = Pruner(Retention(KEEP_US), self.clock)
        self.sinks: list[SinkProgress] = []

    def come(self, rows: int, received_us: int = YOUNG) -> None:
        first = self.writer.last_seq()
        new = [new_reading(first + n, received_us=received_us) for n in range(rows)]
        self.writer.append(new, [], {})

    def turn(self, *, pressure: bool = False) -> int:
        return self.pruner.turn(self.writer, self.sinks, NOW_US, pressure=pressure)

    @property
    def gone(self) -> int:
        return self.writer.first_seq() - 1


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    made = Plant(tmp_path)
    yield made
    made.writer.close()


@pytest.fixture
def busy(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """A spool of rows that are due, and a pruner that has seen readings come."""
    plant.come(5000, DUE)
    monkeypatch.setattr(spool.retention, "PRUNE_STEP_ROWS", 100)
    monkeypatch.setattr(spool.retention, "WORTH_ROWS", 200)
    assert plant.turn() == 100
    return plant


def test_while_readings_come_rows_leave_with_the_next_batch(busy: Plant) -> None:
    busy.come(300)
    assert busy.turn() == 0
    assert busy.gone == 100
    busy.come(1)
    assert busy.gone == 100 + 300 * ALONG_PER_READING
    assert busy.writer.counter("pruned") == busy.gone
    busy.come(1)
    assert busy.gone == 100 + 300 * ALONG_PER_READING, "once"


def test_rows_that_should_leave_with_a_batch_that_fails_stay(busy: Plant) -> None:
    busy.come(300)
    busy.turn()
    with pytest.raises(StorageFaultError):
        busy.writer.append([(b"short", *new_reading(1)[1:])], [], {})
    assert busy.gone == 100
    assert busy.writer.counter("pruned") == 100


def test_a_batch_takes_the_pages_of_the_rows_that_leave_with_it(tmp_path: Path) -> None:
    sizes = []
    for name in ("along", "before"):
        (tmp_path / name).mkdir()
        plant = Plant(tmp_path / name)
        plant.come(2000, DUE)
        plant.writer.checkpoint()
        pages = plant.writer.path.stat().st_size
        if name == "along":
            plant.writer.prune_along(1000, YOUNG)
        else:
            plant.writer.delete_through(1000, "pruned", older_than_us=YOUNG)
        plant.come(1000)
        assert plant.gone == 1000
        sizes.append(plant.writer.wal_bytes())
        plant.writer.checkpoint()
        assert plant.writer.path.stat().st_size <= pages + 2 * PAGE_BYTES
        plant.writer.close()
    assert sizes[0] < 0.65 * sizes[1], "a page is written once, and not when it is freed too"


def test_rows_that_are_young_do_not_leave_with_a_batch(plant: Plant) -> None:
    plant.turn()
    plant.come(WORTH_ROWS, DUE)
    plant.come(1000)
    plant.turn()
    plant.come(1)
    assert plant.gone == WORTH_ROWS


def test_pruning_keeps_up_with_any_rate_and_catches_up(busy: Plant) -> None:
    for rows in (1, 20, 700):
        before, came = busy.gone, 0
        while came < 700:
            busy.come(rows)
            came += rows
            busy.turn()
        busy.come(1)
        assert busy.gone - before >= came
    assert busy.gone < 5000


def test_rows_leave_in_numbers_that_are_worth_it(busy: Plant) -> None:
    moves = []
    for _ in range(100):
        before = busy.gone
        busy.come(10)
        busy.turn()
        moves.append(busy.gone - before)
    assert {move for move in moves if move} == {200}


def test_time_allows_pruning_too_so_that_a_trickle_catches_up(busy: Plant) -> None:
    busy.come(1)
    busy.turn()
    busy.clock.now_s += 0.1
    busy.come(1)
    busy.turn()
    busy.come(1)
    assert busy.gone >= 100 + 500


def test_no_batch_has_more_to_prune_than_the_limit(
    busy: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool.retention, "ALONG_MAX_ROWS", 1000)
    assert ALONG_MAX_ROWS > 1000
    busy.clock.now_s += 3600
    busy.come(900)
    busy.turn()
    busy.come(1)
    assert busy.gone == 100 + 1000


def test_few_rows_wait_until_nothing_comes(plant: Plant) -> None:
    plant.turn()
    plant.come(WORTH_ROWS - 1, DUE)
    for _ in range(10):
        plant.come(50)
        assert plant.turn() == 0
        plant.clock.now_s += QUIET_S / 2
        assert plant.turn() == 0, "between two readings"
    assert plant.gone == 0
    plant.clock.now_s += QUIET_S
    assert plant.turn() == WORTH_ROWS - 1
    assert plant.turn() == 0


def test_readings_far_apart_do_not_leave_one_by_one(plant: Plant) -> None:
    plant.turn()
    steps = []
    for _ in range(30):
        plant.come(1, DUE)
        plant.turn()
        plant.clock.now_s += 1.01 * QUIET_S  # of floats
        steps.append(plant.turn())
    assert sum(steps) >= 25
    assert len([rows for rows in steps if rows]) <= 30 * 1.01 * QUIET_S / FEW_EACH_S + 1


def test_on_a_slow_disk_small_steps_follow_one_another(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool.retention, "PRUNE_STEP_ROWS", 100)
    plant.come(1000, DUE)
    assert [plant.turn() for _ in range(11)] == [100] * 10 + [0]


def test_when_space_is_short_rows_leave_at_once_and_as_many_as_come(busy: Plant) -> None:
    busy.come(300)
    assert busy.turn(pressure=True) == 300 * ALONG_PER_READING
    assert busy.turn(pressure=True) == 100


def test_a_sink_that_lost_its_file_since_holds_what_was_to_leave(busy: Plant) -> None:
    busy.come(300)
    busy.turn()
    busy.sinks = [SinkProgress("pubsub", enabled=True)]
    busy.turn()
    busy.come(1)
    assert busy.gone == 100


def test_a_step_is_smaller_where_it_takes_long_and_grows_again(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.come(2 * PRUNE_STEP_ROWS, DUE)
    plant.turn()
    asked: list[int] = []

    def slow_step(_: Retention, *__: object, max_rows: int, **___: object) -> int:
        asked.append(max_rows)
        plant.clock.now_s += took_s
        return max_rows

    monkeypatch.setattr(Retention, "prune_step", slow_step)
    took_s = PRUNE_STEP_S * 1.1
    for _ in range(PRUNE_STEP_HALVINGS + 2):
        plant.turn()
    took_s = PRUNE_STEP_S / 5
    for _ in range(PRUNE_STEP_HALVINGS + 2):
        plant.turn()
    least = PRUNE_STEP_ROWS >> PRUNE_STEP_HALVINGS
    down = [PRUNE_STEP_ROWS >> n for n in range(PRUNE_STEP_HALVINGS)] + [least, least]
    assert asked == down + [least << n for n in range(PRUNE_STEP_HALVINGS)] + [PRUNE_STEP_ROWS] * 2


@settings(max_examples=40)
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 2000), st.booleans(), st.booleans()),
        max_size=12,
    )
)
def test_no_turn_passes_a_sink_or_takes_a_row_that_is_young(
    tmp_path_factory: pytest.TempPathFactory, turns: list[tuple[int, int, bool, bool]]
) -> None:
    plant = Plant(tmp_path_factory.mktemp("spool"))
    plant.come(1500, DUE)
    position = 0
    for rows, delivered, pressure, lost in turns:
        position = max(position, min(delivered, plant.writer.last_seq()))
        at = 0 if lost else position
        plant.sinks = [progress(at, plant.writer.epoch), progress(10**6, plant.writer.epoch, "b")]
        before = plant.gone
        plant.turn(pressure=pressure)
        if rows:
            plant.come(rows)
        assert plant.gone <= max(at, before)
        assert plant.gone <= 1500 or any(p for *_, p, _ in turns)
    left = [seq for (seq,) in look(plant.writer.path, "SELECT seq FROM reading_row")]
    assert left == list(range(plant.gone + 1, plant.writer.last_seq() + 1))
    assert plant.writer.counter("pruned") == plant.gone
    plant.writer.close()


def test_space_is_handed_back_in_small_steps_while_readings_come(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.housekeeping, "RETURN_SPACE_ABOVE_BYTES", 0)
    monkeypatch.setattr(collector.housekeeping, "RETURN_SPACE_BUSY_STEP_BYTES", 4 * PAGE_BYTES)
    monkeypatch.setattr(collector.housekeeping, "RETURN_SPACE_STEP_BYTES", 20 * PAGE_BYTES)
    returned: list[int] = []
    real = SpoolWriter.return_space

    def return_space(writer: SpoolWriter, max_bytes: int) -> None:
        returned.append(max_bytes // PAGE_BYTES)
        real(writer, max_bytes)

    monkeypatch.setattr(SpoolWriter, "return_space", return_space)
    house = Housekeeping(
        sinks=[],
        retention=Retention(KEEP_US),
        budget=Budget(2**30),
        ballast=Ballast(tmp_path, 2**20),
        clock=plant.clock,
        now_us=lambda: NOW_US,
    )
    plant.come(2000, YOUNG)
    house.turn(plant.writer)
    plant.writer.delete_through(1900, "pruned")
    for _ in range(3):
        plant.come(1)
        house.turn(plant.writer)
        assert not house.more
    assert returned == [4], "not with every batch"
    plant.clock.now_s += 1.01 * RETURN_SPACE_BUSY_INTERVAL_S  # of floats
    plant.come(1)
    house.turn(plant.writer)
    assert returned == [4, 4]
    house.turn(plant.writer)
    assert returned == [4, 4, 20], "nobody is disturbed now"
    assert house.more
