"""install.sh, killed at each step of the broker's change: the next run repairs what it left."""

import re

import pytest

from tests.broker_machine import (
    CLOSED,
    CONF_D,
    DROP_IN,
    OCCUPIED,
    PENDING,
    SHIPPED,
    TRIAL,
    Machine,
    debian,
    machine,
    occupy,
)
from tests.harness.throwaway_root import needs_throwaway_root

__all__ = ["debian", "machine"]

pytestmark = needs_throwaway_root()


# Before which command of deploy/mosquitto-setup.sh it is killed.
STEPS = {
    "the trial answers": 'kill -KILL "$pid"*',
    "it was tried": "begin_pending",
    "the former is noted": 'mv "$DROP_IN_PENDING.new"*',
    "the change is pending": 'record_drop_in "$SHIPPED_DROP_IN"',
    "the new one is known": 'put_file "$SHIPPED_DROP_IN" "$DROP_IN"',
    "the new one is there": "remember_the_log",
    "the broker is asked to stop": 'wait_until "$MOSQUITTO_STOP_TIMEOUT_S"*',
    "the broker is stopped": "start-stop-daemon --start*",
    "the broker is started": "wait_for_mosquitto*",
    "the broker serves": 'rm -rf "$DROP_IN_PENDING"',
}


def kill_before(command: str) -> str:
    pattern = re.sub(r'(["$ ])', r"\\\1", command)
    return f"set -T; trap 'case $BASH_COMMAND in {pattern}) kill -KILL $$;; esac' DEBUG"


@pytest.mark.parametrize("then", ["again", "reboot"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_the_next_run_repairs(debian: Machine, step: str, then: str) -> None:
    code, output = debian.set_up(kill_before(STEPS[step]))
    assert code in {-9, 137}, f"it was not killed there: {code} {output}"
    if then == "reboot":
        debian.stop_mosquitto()
        debian.start_mosquitto()
        assert debian.publishes(1883) == 0

    code, output = debian.set_up()

    assert code == 0, output
    assert debian.serves_with_ours()
    assert not debian.has(PENDING)
    assert not debian.has(TRIAL)
    assert debian.processes("mosquitto", "mosquitto") == debian.service()
    assert len(debian.service()) == 1


def test_what_a_killed_run_has_left_is_taken_back_when_the_broker_is_now_the_plants(
    debian: Machine,
) -> None:
    debian.set_up(kill_before(STEPS["the new one is there"]))
    assert debian.has(DROP_IN)
    debian.write(f"{CONF_D}/plant.conf", f"listener 1884\n{CLOSED}")
    process = debian.service()

    code, output = debian.set_up()

    assert code == 0, output
    assert not debian.has(DROP_IN)
    assert not debian.has(PENDING)
    assert debian.service() == process


@pytest.mark.parametrize("now", [SHIPPED, SHIPPED + OCCUPIED, SHIPPED + "nonsense true\n"])
def test_killed_while_the_broker_is_down_the_next_run_brings_it_up(
    debian: Machine, now: str
) -> None:
    occupy(debian)
    debian.set_up(kill_before("show_what_mosquitto_said"))
    assert debian.service() == []
    debian.ship(now)

    code, output = debian.set_up()

    assert code == (0 if now == SHIPPED else 1), output
    assert debian.has(DROP_IN) == (now == SHIPPED)
    assert debian.publishes(1883) == 0
