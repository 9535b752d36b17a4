"""``python -m tests.torture --hours N [--seed S]``: all parts in turn until the time is over.

Every turn of every part has a seed of its own, drawn from the one that is printed first. A
turn that breaks a rule is had again by ``--turn``, with what is printed beside it; the whole run
by ``--seed``. What is left to the timing of processes comes again only as often as it comes.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence

from tests.torture import turns

_HOUR_S = 3_600.0


def main(arguments: Sequence[str]) -> int:
    """Run; return 1 if any promise was broken."""
    parser = argparse.ArgumentParser(prog="tests/torture/run.sh", description=__doc__)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--hours", type=float, help="how long; parts of one will do")
    length.add_argument(
        "--turn", type=turns.Turn.parsed, metavar="PART:SIZE:SEED", help="one turn, once more"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))  # noqa: S311 - no secret
    parser.add_argument(
        "--only", choices=sorted(turns.SIZES), action="append", help="this part alone"
    )
    options = parser.parse_args(arguments)
    totals = turns.Totals()
    if options.turn is not None:
        _told(turns.take(options.turn), totals)
    else:
        _say(f"seed {options.seed}")
        until = time.monotonic() + options.hours * _HOUR_S
        schedule = (
            turns.chosen(options.only, options.seed) if options.only else turns.rounds(options.seed)
        )
        for lanes in schedule:
            for outcome in turns.side_by_side(lanes):
                _told(outcome, totals)
            if time.monotonic() >= until:
                break
        _say(f"\nseed {options.seed}")
    violations = sum(totals.violations.values())
    _say(f"{totals}\n\n{violations} violations")
    return 1 if violations else 0


def _told(outcome: turns.Outcome, totals: turns.Totals) -> None:
    totals.add(outcome)
    _say(f"{outcome.turn}: {outcome.text}")
    if outcome.violations:
        _say(f"VIOLATED; once more: tests/torture/run.sh --turn {outcome.turn}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
