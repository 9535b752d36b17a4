"""``python -m tests.torture --hours N [--seed S]``: all parts in turn until the time is over.

Every turn of every part has a seed of its own, drawn from the one that is printed first: with
it a failed turn, or the whole run, is had again.
"""

import argparse
import importlib
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence

PARTS: dict[str, int] = {
    "kills": 60,
    "storage_faults": 48,
    "corruption": 24,
    "powercut": 600,
    "cloud_faults": 20,
    "mqtt_faults": 20,
    "fuzz": 20_000,
}
"""Each part and the size of one turn; each is a module here with ``run(size, seed)``."""

_HOUR_S = 3_600.0


def main(arguments: Sequence[str]) -> int:
    """Run; return 1 if any promise was broken."""
    parser = argparse.ArgumentParser(prog="tests/torture/run.sh", description=__doc__)
    parser.add_argument("--hours", type=float, required=True, help="how long; parts of one will do")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="this part alone")
    options = parser.parse_args(arguments)
    _say(f"seed {options.seed}")
    dice = random.Random(options.seed)  # noqa: S311 - a test's dice
    until = time.monotonic() + options.hours * _HOUR_S
    turns: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    violations = 0
    while True:
        for part in options.only or PARTS:
            begun = time.monotonic()
            violations += _turn(part, PARTS[part], dice.randrange(2**32))
            turns[part] += 1
            seconds[part] += round(time.monotonic() - begun)
            if time.monotonic() >= until:
                _say("")
                for name, count in turns.items():
                    _say(f"{name}: {count} turns of {PARTS[name]:,} in {seconds[name]:,} s")
                _say(f"seed {options.seed}: {violations} violations")
                return 1 if violations else 0


def _turn(part: str, size: int, seed: int) -> int:
    """Run one turn of one part; return how many violations there were."""
    run: Callable[[int, int], object] = importlib.import_module(f"tests.torture.{part}").run
    try:
        report = run(size, seed)
    except Exception:  # noqa: BLE001 - a part that breaks off has shown something, and the others go on
        _say(f"{part}({size}, {seed}): {traceback.format_exc()}")
        return 1
    _say(f"{part}({size}, {seed}): {report}")
    found: object = (
        report["violations"] if isinstance(report, dict) else getattr(report, "violations")  # noqa: B009 - of any part's own class
    )
    return found if isinstance(found, int) else len(found)  # type: ignore[arg-type]


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
