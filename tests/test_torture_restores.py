"""Restored copies and clones under the real forwarder: the short version of the long run."""

import os
import random
import time

import pytest

from tests.torture import restores
from tests.torture.report import Report
from tests.torture.restores import FAULTS, Plan, suffer

ROUNDS = int(os.environ.get("SLUICE_RESTORES", "0"))
SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))
RESTORED = Plan(clone=False, before=40, since=250, own=250, fault="a cut", busy=False)
"""The other life has put as many rows behind the copy's end as the copy has of its own."""

CLONED = Plan(clone=True, before=40, since=250, own=250, fault="a lost answer", busy=False)
BUSY = Plan(clone=False, before=2_500, since=40, own=3, fault="refused connections", busy=True)


@pytest.mark.parametrize("plan", [RESTORED, CLONED, BUSY], ids=["restored", "cloned", "busy"])
def test_what_a_copy_holds_is_in_the_table_and_repetitions_are_counted(plan: Plan) -> None:
    report = Report("restores", SEED)
    suffer(plan, random.Random(SEED), report)  # noqa: S311 - a test's dice
    assert report.violations == []
    assert report.counts["lost"] == 0


def test_the_checker_sees_a_forwarder_that_takes_up_an_earlier_stream() -> None:
    report = Report("restores", SEED)
    command = ("-m", "tests.torture.broken", "earlier stream taken up", "forwarder")
    suffer(RESTORED, random.Random(SEED), report, command)  # noqa: S311 - a test's dice
    assert report.counts["lost"] == RESTORED.own
    assert "are lost" in report.violations[0]


def test_plans_are_drawn_of_every_kind() -> None:
    dice = random.Random(SEED)  # noqa: S311 - a test's dice
    drawn = [Plan.drawn(dice) for _ in range(500)]
    assert {plan.fault for plan in drawn} == set(FAULTS)
    assert {(plan.clone, plan.busy) for plan in drawn} == {
        (clone, busy) for clone in (True, False) for busy in (True, False)
    }


@pytest.mark.timeout(0)
@pytest.mark.skipif(not ROUNDS, reason="the long version: SLUICE_RESTORES=100")
def test_random_restores() -> None:
    report = restores.run(ROUNDS, SEED)
    print(report)  # noqa: T201 - pytest shows it with a failure
    assert report.violations == []
