"""When the conditions of the broker are put, changed and taken back, by a clock of the test's."""

from collections.abc import Iterable

import pytest

from collector.brokerhealth import ANSWER_S, CRITICAL_AFTER_S, SESSION_LOST_S, BrokerHealth, Problem
from lifecycle import load_settings
from spool import Condition, Conditions
from tests.collector_parts import Clock

STEADY_S = 5.0
AWAY = Problem("cannot reach the broker", "is it running?")
RESET = Problem("the connection to the broker was lost")
REFUSED = Problem("the broker refuses the connection", "check the password", refusal=True)


class File:
    """What the writer thread would store, and how often it would write."""

    def __init__(self) -> None:
        self.rows: dict[str, Condition] = {}
        self.writes = 0

    def set_conditions(self, conditions: Iterable[Condition]) -> bool:
        self.rows = {one.name: one for one in conditions}
        self.writes += 1
        return True


class Desk:
    """A BrokerHealth, its clock, and the file as it is after the next turn."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.conditions = Conditions()
        self.file = File()
        settings = load_settings({"APP_ENV": "LOCAL", "MQTT_BROKER": "plant"}, "host")
        self.health = BrokerHealth(
            settings, self.conditions, steady_s=STEADY_S, clock=self.clock, now_us=lambda: 0
        )

    def after(self, seconds: float) -> dict[str, Condition]:
        self.clock.now_s += seconds
        self.health.turn()
        return self.now()

    def now(self) -> dict[str, Condition]:
        self.conditions.store(self.file)
        return self.file.rows


@pytest.fixture
def desk() -> Desk:
    made = Desk()
    made.now()
    return made


def test_an_outage_becomes_critical_and_is_written_twice_whatever_the_attempts(desk: Desk) -> None:
    before = desk.file.writes
    desk.health.lost(AWAY)
    assert desk.now()["broker_disconnected"].severity == "WARNING"
    for attempt in range(100):
        desk.health.lost((AWAY, RESET)[attempt % 2])
        desk.after(CRITICAL_AFTER_S / 50)
    assert desk.now()["broker_disconnected"].severity == "CRITICAL"
    assert desk.file.writes - before == 2
    desk.health.ready(doubtful=False)
    assert desk.now() == {}


def test_a_reason_that_stays_is_the_one_that_is_shown(desk: Desk) -> None:
    desk.health.lost(RESET)
    desk.health.lost(AWAY)
    assert RESET.text in desk.now()["broker_disconnected"].detail
    desk.health.lost(AWAY)
    row = desk.now()["broker_disconnected"]
    assert AWAY.text in row.detail
    assert row.remedy == AWAY.remedy


def test_a_refusal_is_critical_at_once_and_over_when_the_broker_is_away(desk: Desk) -> None:
    desk.health.lost(REFUSED)
    rows = desk.now()
    assert rows["broker_refuses"].severity == "CRITICAL"
    assert rows["broker_refuses"].remedy == "check the password"
    assert rows["broker_disconnected"].severity == "WARNING"
    desk.health.lost(AWAY)
    assert set(desk.now()) == {"broker_disconnected"}


def test_a_broker_that_takes_the_connection_and_says_nothing_is_told_of(desk: Desk) -> None:
    desk.health.opened()
    assert desk.after(ANSWER_S / 2) == {}
    assert "does not answer" in desk.after(ANSWER_S)["broker_disconnected"].detail
    desk.health.ready(doubtful=False)
    assert desk.now() == {}


def test_connections_that_break_again_and_again_are_one_condition(desk: Desk) -> None:
    taken = Problem("lost; is another client connected with the id x?")
    desk.health.lost(taken)
    before = desk.now(), desk.file.writes
    for _ in range(10):
        desk.health.opened()
        desk.health.ready(doubtful=True)
        desk.after(STEADY_S / 2)
        desk.health.lost(taken)
    assert (desk.now(), desk.file.writes) == before
    desk.health.ready(doubtful=True)
    assert desk.after(STEADY_S) == {}


def test_a_lost_session_stays_for_an_hour(desk: Desk) -> None:
    desk.health.session_lost(0)
    desk.health.ready(doubtful=False)
    assert set(desk.after(SESSION_LOST_S - 1)) == {"session_lost"}
    assert desk.after(2) == {}
