"""What the long run is made of: turns of parts, each in a process of its own, and their sums."""

import importlib
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from tests.harness import waiting

SIZES: Mapping[str, int] = {
    "kills": 60,
    "powercut": 600,
    "fuzz": 60_000,
    "storage_faults": 24,
    "corruption": 21,
    "cloud_faults": 10,
    "mqtt_faults": 10,
    "many_keys": 14,
    "crash_loops": 5,
    "identity": 12,
    "failed_syncs": 200,
    "dead_letters": 8,
    "pinned_readers": 6,
    "garbage": 4,
    "tmpdir": 12,
    "poison": 10,
    "restores": 16,
}
"""Each part and the size of one turn; each is a module here with ``run(size, seed)``.

One turn of kills takes two minutes, most of them in waiting, and the two behind it as long
together: so in an hour there are more than 1,000 kills, 10,000 images and 2,000,000 inputs.
"""

TOGETHER: tuple[tuple[str, ...], ...] = (("kills",), ("powercut", "fuzz"))
"""What runs side by side: no verdict of theirs depends on how fast something is."""

ALONE = tuple(part for part in SIZES if all(part not in lane for lane in TOGETHER))
"""The others, one after each round: keepalives and deadlines are among what they look at."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One part, once."""

    part: str
    size: int
    seed: int

    def __str__(self) -> str:
        """Return it as ``--turn`` takes it."""
        return f"{self.part}:{self.size}:{self.seed}"

    @classmethod
    def parsed(cls, text: str) -> "Turn":
        """Return what ``--turn`` was given.

        Raises:
            ValueError: It is no turn.
        """
        part, size, seed = text.split(":")
        if part not in SIZES:
            raise ValueError(f"{part} is no part: {', '.join(SIZES)}")
        return cls(part, int(size), int(seed))


@dataclass(slots=True)
class Outcome:
    """What came of a turn."""

    turn: Turn
    text: str = ""
    figures: Counter[str] = field(default_factory=Counter)
    violations: int = 0
    seconds: float = 0.0


def take(turn: Turn) -> Outcome:
    """Run one turn, in this process."""
    outcome = Outcome(turn)
    begun = time.monotonic()
    run: Callable[[int, int], object] = importlib.import_module(f"tests.torture.{turn.part}").run
    try:
        report = run(turn.size, turn.seed)
        outcome.text = str(report)
        outcome.figures, outcome.violations = _figures(report)
    except Exception:  # noqa: BLE001 - a part that breaks off has shown something, and the others go on
        outcome.text, outcome.violations = traceback.format_exc(), 1
    outcome.seconds = time.monotonic() - begun
    return outcome


def _figures(report: object) -> tuple[Counter[str], int]:
    """Return what a report counts, and how many violations it has."""
    if isinstance(report, dict):
        counts = Counter({name: n for name, n in report.items() if name != "violations"})
        return counts, int(report["violations"])
    counts = Counter({"rounds": done} if (done := getattr(report, "rounds", 0)) else {})
    counts.update(getattr(report, "counts"))  # noqa: B009 - of any part's own class
    return counts, len(getattr(report, "violations"))  # noqa: B009 - the same


def rounds(seed: int) -> Iterator[tuple[tuple[Turn, ...], ...]]:
    """Yield rounds without end: the lanes of turns that run side by side.

    Args:
        seed: Of the seeds of all turns; their order does not depend on how long they take.
    """
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    number = 0
    while True:
        yield tuple(tuple(_drawn(part, dice) for part in lane) for lane in TOGETHER)
        yield ((_drawn(ALONE[number % len(ALONE)], dice),),)
        number += 1


def chosen(parts: Sequence[str], seed: int) -> Iterator[tuple[tuple[Turn, ...], ...]]:
    """Yield turns of the given parts alone, one after the other, without end."""
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    while True:
        for part in parts:
            yield ((_drawn(part, dice),),)


def _drawn(part: str, dice: random.Random) -> Turn:
    return Turn(part, SIZES[part], dice.randrange(2**32))


def side_by_side(lanes: Sequence[Sequence[Turn]]) -> Iterator[Outcome]:
    """Run lanes of turns, each in a new process; yield what came of each turn."""
    with ProcessPoolExecutor(len(lanes), mp_context=get_context("spawn")) as pool:
        running: list[tuple[Sequence[Turn], Future[list[Outcome]]]] = [
            (lane, pool.submit(_one_by_one, lane, number, len(lanes)))
            for number, lane in enumerate(lanes)
        ]
        for lane, future in running:
            try:
                yield from future.result()
            except Exception:  # noqa: BLE001 - the process has ended, which is a finding
                yield Outcome(lane[0], traceback.format_exc(), violations=1)


def _one_by_one(lane: Sequence[Turn], number: int, lanes: int) -> list[Outcome]:
    # A broker that is down for a moment must not find its port taken by the lane beside it.
    first, last = waiting._FIRST_PORT, waiting._LAST_PORT  # noqa: SLF001 - one process's affair as a rule
    share = (last - first) // lanes
    waiting._FIRST_PORT = first + number * share  # noqa: SLF001 - the same
    waiting._LAST_PORT = first + (number + 1) * share - 1  # noqa: SLF001 - the same
    return [take(turn) for turn in lane]


@dataclass(slots=True)
class Totals:
    """The sums of a whole run, by part."""

    turns: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    """The sizes of its turns."""
    seconds: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    figures: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Add what came of one turn."""
        part = outcome.turn.part
        self.turns[part] += 1
        self.tried[part] += outcome.turn.size
        self.seconds[part] += round(outcome.seconds)
        self.violations[part] += outcome.violations
        self.figures.setdefault(part, Counter()).update(outcome.figures)

    def __str__(self) -> str:
        """Return a table for the documentation: of each part what it tried and what it saw."""
        lines = [
            "| part | tried | violations | time | lost, repeated | and |",
            "|---|---|---|---|---|---|",
        ]
        for part in SIZES:
            if part in self.turns:
                told = {name: f"{name} {n:,}" for name, n in self.figures[part].items()}
                sums = [text for name, text in told.items() if _is_a_sum(name)]
                others = [t for n, t in told.items() if not _is_a_sum(n) and self.figures[part][n]]
                cells = (
                    part,
                    f"{self.tried[part]:,} in {self.turns[part]} turns",
                    f"{self.violations[part]}",
                    f"{self.seconds[part]:,} s",
                    ", ".join(sums),
                    ", ".join(others),
                )
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _is_a_sum(name: str) -> bool:
    return "lost" in name or "repeated" in name
