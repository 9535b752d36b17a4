"""``python -m bench [NAME …]``: run comparisons, print the table, keep the figures."""

import argparse
import sys
from collections.abc import Callable

from bench import drain, ingest
from bench.report import Row, save, table

CASES: dict[str, Callable[[int, int], list[Row]]] = {
    "ingest": ingest.rows,
    "drain-pubsub": drain.pubsub_rows,
    "drain-bigquery": drain.bigquery_rows,
}


def main() -> int:
    """Run the named comparisons, or all; return 1 if a target does not hold."""
    parser = argparse.ArgumentParser(prog="bench/run.sh")
    parser.add_argument("names", nargs="*", choices=[[], *CASES], help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=200_000, help="readings per run")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.names or CASES:
        sys.stderr.write(f"running {name} …\n")
        rows += CASES[name](arguments.rounds, arguments.count)
        sys.stderr.write(table(rows) + "\n")
    sys.stdout.write(table(rows) + f"\n\nfigures: {save(rows)}\n")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
