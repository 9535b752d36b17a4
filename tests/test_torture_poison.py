"""What one publisher sends stops no other one's readings, in the real programs."""

import os
import random

import pytest

from tests.torture import poison

ROUNDS = int(os.environ.get("SLUICE_POISON_ROUNDS", "1"))
SEED = int(os.environ.get("SLUICE_TORTURE_SEED", "1"))


@pytest.mark.parametrize("method", poison.METHODS)
def test_poison_and_oddities_of_one_publisher_stop_no_other(method: str) -> None:
    chance = random.Random(SEED)  # noqa: S311 - a test's dice
    with poison.poisoned(method) as rig:
        poison.oddities(rig)
        for _ in range(ROUNDS):
            for way in poison.WAYS:
                poison.poison(rig, way, chance)
