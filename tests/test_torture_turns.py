"""The long run draws the same turns from the same seed, counts them, and hides no violation."""

import itertools
import os
from collections import Counter
from collections.abc import Callable

import pytest

from tests.torture import fuzz, turns
from tests.torture.__main__ import main
from tests.torture.report import Report
from tests.torture.turns import ALONE, SIZES, TOGETHER, Totals, Turn

SHORT = Turn("fuzz", 20, 7)
Lanes = tuple[tuple[Turn, ...], ...]


def drawn(seed: int, count: int = 2 * len(ALONE)) -> list[Lanes]:
    return list(itertools.islice(turns.rounds(seed), count))


def test_a_seed_decides_every_turn() -> None:
    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    seeds = [turn.seed for lanes in drawn(1) for lane in lanes for turn in lane]
    assert len(set(seeds)) == len(seeds)


def test_every_part_has_its_turn() -> None:
    parts = Counter(turn.part for lanes in drawn(1) for lane in lanes for turn in lane)
    assert set(parts) == set(SIZES)
    assert parts["kills"] == parts["powercut"] == parts["fuzz"] == len(ALONE)
    assert all(len(lanes) == (len(TOGETHER), 1)[n % 2] for n, lanes in enumerate(drawn(1)))


def test_a_turn_is_had_again_by_what_is_printed() -> None:
    assert Turn.parsed(str(SHORT)) == SHORT
    with pytest.raises(ValueError, match="no part"):
        Turn.parsed("naps:1:1")


def test_turns_run_beside_each_other_and_are_counted() -> None:
    totals = Totals()
    outcomes = list(turns.side_by_side([[SHORT, SHORT], [SHORT]]))
    for outcome in outcomes:
        totals.add(outcome)
    assert [(outcome.turn, outcome.violations) for outcome in outcomes] == [(SHORT, 0)] * 3
    assert totals.figures["fuzz"]["streams"] == 3 * SHORT.size
    assert totals.turns["fuzz"] == 3
    assert "| fuzz | 60 in 3 turns | 0 |" in str(totals)
    assert "streams 60" in str(totals)


def lossy(_: int, seed: int) -> Report:
    report = Report("fuzz", seed, rounds=1)
    report.violations += ["one is lost", "so is another"]
    return report


def breaking_off(_: int, seed: int) -> Report:
    raise AssertionError(f"seed {seed} is a bad one")


@pytest.mark.parametrize(("run", "violations"), [(lossy, 2), (breaking_off, 1)])
def test_a_violation_is_counted_and_told_with_the_way_to_have_it_again(
    run: Callable[[int, int], Report],
    violations: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fuzz, "run", run)
    assert main(["--turn", str(SHORT)]) == 1
    text = capsys.readouterr().out
    assert f"tests/torture/run.sh --turn {SHORT}" in text
    assert f"{violations} violations" in text


class Deadly(Turn):
    """Ends the process that is given it."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        """Have the end called by whoever unpacks it."""
        return os._exit, (9,)


def test_a_process_that_ends_is_a_violation() -> None:
    deadly = Deadly("fuzz", 1, 1)
    first, *others = turns.side_by_side([[deadly], [SHORT]])
    assert (first.turn, first.violations) == (deadly, 1)
    assert "terminated abruptly" in first.text
    assert len(others) == 1


def test_a_clean_run_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--turn", str(SHORT)]) == 0
    assert "VIOLATED" not in capsys.readouterr().out
