"""``python -m bench [NAME …]``: run comparisons, print the table, keep the figures."""

import argparse
import sys
from collections.abc import Callable, Sequence

from bench import (
    backlog,
    calm,
    chain,
    delay,
    disk,
    drain,
    fsync_check,
    idle,
    ingest,
    latency,
    memory,
    prune,
)
from bench.processes import BenchError
from bench.report import Row, Sheet, machine, save, table
from bench.servers import find_emulator

CASES: dict[str, Callable[[int, int], Sequence[Row | Sheet]]] = {
    "ingest": ingest.rows,
    "collector-ceiling": prune.ceiling_rows,
    "drain-pubsub": drain.pubsub_rows,
    "drain-bigquery": drain.bigquery_rows,
    "drain-storage": drain.storage_rows,
    "drain-ceiling": drain.ceiling_rows,
    "chain": chain.rows,
    "backlog": backlog.rows,
    "backlog-view": backlog.look_rows,
    "latency": latency.rows,
    "calm": calm.rows,
    "delay": delay.rows,
    "idle": idle.rows,
    "memory": memory.rows,
    "disk": disk.rows,
    "prune": prune.rows,
    "fsync": fsync_check.rows,
}
PARTS: dict[str, Callable[[int, int], Sequence[Row | Sheet]]] = {**calm.CASES}
"""Parts of the above, for a run that is to be short."""


def main() -> int:
    """Run the named comparisons, or all; return 1 if a target does not hold or a run failed."""
    parser = argparse.ArgumentParser(prog="bench/run.sh")
    parser.add_argument(
        "names", nargs="*", choices=[[], *CASES, *PARTS], help=", ".join([*CASES, *PARTS])
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--count", type=int, default=200_000, help="readings per run (calm, delay: no)"
    )
    arguments = parser.parse_args()
    about = machine()
    emulator = find_emulator()
    servers = f"in-repo fakes; Google's Pub/Sub emulator {'too' if emulator else 'not installed'}"
    about["servers"] = servers
    sys.stderr.write(f"servers: {servers}\n")
    rows: list[Row | Sheet] = []
    failed: list[str] = []
    for name in arguments.names or CASES:
        sys.stderr.write(f"running {name} …\n")
        try:
            made = (CASES | PARTS)[name](arguments.rounds, arguments.count)
        except BenchError as error:
            # It proves nothing, and the others do not depend on it.
            failed.append(name)
            sys.stderr.write(f"{name} FAILED: {error}\n")
            continue
        sys.stderr.write(table(made) + "\n")
        rows += made
    sys.stdout.write(f"servers: {servers}\n\n{table(rows)}\n\nfigures: {save(rows, about)}\n")
    if failed:
        sys.stdout.write(f"no figures, because a run failed: {', '.join(failed)}\n")
    return 0 if not failed and all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
