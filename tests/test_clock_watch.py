"""A wall clock that jumps is told in ``health``, and for how long; a slewing one is not."""

from collections.abc import Iterator

import pytest

from collector.clockwatch import TOLD_FOR_S, ClockWatch
from spool import Condition, Conditions

START_US = 1_790_000_000_000_000


class Clocks:
    """A monotonic clock, and a wall clock that can be set."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.set_us = 0
        self.newest_us = START_US

    def wall_us(self) -> int:
        return START_US + int((self.now_s - 100.0) * 1e6) + self.set_us


class Shelf:
    """Takes the conditions."""

    def __init__(self) -> None:
        self.shown: dict[str, Condition] = {}

    def set_conditions(self, conditions: Iterator[Condition]) -> bool:
        self.shown = {c.name: c for c in conditions}
        return True


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def make(clocks: Clocks, conditions: Conditions) -> ClockWatch:
    return ClockWatch(conditions, clocks.newest_us, lambda: clocks.now_s, clocks.wall_us)


def shown(conditions: Conditions) -> dict[str, Condition]:
    shelf = Shelf()
    conditions.store(shelf)  # type: ignore[arg-type]
    return shelf.shown


@pytest.mark.parametrize("step_s", [3600, -3600, 6, -6])
def test_a_step_is_told_once_and_for_an_hour(clocks: Clocks, step_s: int) -> None:
    conditions = Conditions(lambda: clocks.now_s)
    watch = make(clocks, conditions)
    assert not watch.look(lambda: clocks.newest_us)
    clocks.set_us += step_s * 1_000_000
    clocks.now_s += 0.25
    assert watch.look(lambda: clocks.newest_us)
    assert f"{step_s:+d} s" in shown(conditions)["clock_stepped"].detail
    assert not watch.look(lambda: clocks.newest_us)
    clocks.now_s += TOLD_FOR_S + 1
    watch.look(lambda: 0)
    conditions.put(Condition("other", "WARNING", "", ""))
    assert set(shown(conditions)) == {"other"}


def test_a_clock_that_slews_is_no_step(clocks: Clocks) -> None:
    conditions = Conditions(lambda: clocks.now_s)
    watch = make(clocks, conditions)
    for _ in range(1000):
        clocks.now_s += 1
        clocks.set_us += 500  # what adjtimex allows
        assert not watch.look(lambda: clocks.newest_us)
    assert not shown(conditions)


def test_it_stays_while_the_newest_reading_lies_in_the_future(clocks: Clocks) -> None:
    conditions = Conditions(lambda: clocks.now_s)
    clocks.newest_us = START_US + 7_200_000_000
    watch = make(clocks, conditions)
    assert "7200 s before the newest reading" in shown(conditions)["clock_stepped"].detail
    clocks.now_s += 3600
    watch.look(lambda: clocks.newest_us)
    conditions.put(Condition("other", "WARNING", "", ""))
    assert set(shown(conditions)) == {"clock_stepped", "other"}
    clocks.now_s += 3601
    watch.look(lambda: clocks.newest_us)
    conditions.clear("other")
    conditions.put(Condition("another", "WARNING", "", ""))
    assert set(shown(conditions)) == {"another"}


def test_a_clock_that_was_wrong_for_a_minute_is_forgotten_after_an_hour(clocks: Clocks) -> None:
    conditions = Conditions(lambda: clocks.now_s)
    watch = make(clocks, conditions)
    year_us = 365 * 86_400_000_000
    clocks.set_us += year_us
    assert watch.look(lambda: clocks.newest_us)
    clocks.now_s += 60
    clocks.set_us -= year_us
    assert watch.look(lambda: clocks.newest_us)
    clocks.now_s += TOLD_FOR_S + 1
    watch.look(lambda: clocks.newest_us)
    conditions.put(Condition("other", "WARNING", "", ""))
    assert set(shown(conditions)) == {"other"}
