"""Thousands of ordering keys with some in trouble: the short version of the long run."""

import os
import time

import pytest

from tests.torture import many_keys

ROUNDS = int(os.environ.get("SLUICE_KEY_ROUNDS", str(len(many_keys.TROUBLES))))
SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))


@pytest.mark.timeout(ROUNDS * 30 + 60)
def test_keys_in_trouble_hold_up_no_other_key_and_lose_nothing() -> None:
    report = many_keys.run(ROUNDS, SEED, keys=1_000)
    print(report)  # noqa: T201 - pytest shows it with a failure
    assert report.violations == []
    assert report.rounds == ROUNDS
    assert all(report.counts[kind] for kind in many_keys.TROUBLES[:ROUNDS] if ROUNDS >= 7)
