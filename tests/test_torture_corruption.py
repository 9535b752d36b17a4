"""Damaged files: set aside, salvaged, counted, told, and receiving again."""

import os
import random
import time

import pytest

from tests.torture import corruption
from tests.torture.report import Report

SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))


@pytest.mark.parametrize("name", corruption.DAMAGES)
def test_the_damage_costs_what_it_hit_and_nothing_more(name: str) -> None:
    print(f"SLUICE_SEED={SEED}")  # noqa: T201 - pytest shows it with a failure
    report = Report("corruption", SEED)
    corruption.suffer(name, random.Random(SEED), report)  # noqa: S311 - a test's dice
    assert report.violations == []
    if name == "a bit flipped in a payload":
        assert report.counts["pubsub dead-lettered"] == 1
    if name in {"garbage in the header", "garbage before the readings"}:
        assert report.counts["salvaged"] >= corruption.PENDING
    if name.endswith("beside its log"):
        assert report.counts["salvaged"] > 0
    if name == "garbage pages":
        assert report.counts["salvaged"] > corruption.PENDING - 3 * corruption.ROWS_PER_PAGE
