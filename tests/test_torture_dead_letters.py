"""Small budgets of dead letters with kills in between: the short version of the long run."""

import os
import time

import pytest

from tests.torture import dead_letters
from tests.torture.dead_letters import METHODS

ROUNDS = int(os.environ.get("SLUICE_DEAD_LETTER_ROUNDS", "1"))
SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_fills_loses_and_repeats_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "METHODS", (method,))
    report = dead_letters.run(ROUNDS, SEED)
    print(report)  # noqa: T201 - pytest shows it with a failure
    assert report.violations == []
    assert report.counts["holds"] == 2 * ROUNDS
    assert report.counts["pubsub lost"] == report.counts["bigquery lost"] == 0
