"""A fake of ``tests.fakes`` that answers later, as a service does that is not on this machine.

That of BigQuery is for load (:mod:`bench.load_bigquery`), also where it is near.

``python -m bench.distant pubsub|bigquery --delay-ms D`` prints what ``python -m tests.fakes``
prints: a JSON line when it serves, and one with its counts at each SIGUSR1. Requests wait side
by side; only those that bring data wait.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable

from bench.load_bigquery import LoadBigQuery
from tests.fakes import FakePubSub, FakeWriteApi

ARRIVAL_LOOK_S = 1.0

_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["pubsub", "bigquery"])
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--table", default="")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--write-port", type=int, default=0)
    parser.add_argument(
        "--arrivals", action="store_true", help="tell when so many rows were there (BigQuery)"
    )
    arguments = parser.parse_args()
    # Blocked before any thread starts, so that all inherit it and only sigwait gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    delay_s = arguments.delay_ms / 1e3
    if arguments.kind == "pubsub":
        with FakePubSub(arguments.port, keep=False) as pubsub:
            pubsub.faults.delay(delay_s)
            _serve(
                pubsub.port,
                lambda: {
                    "violations": len(pubsub.violations),
                    "topics": {topic: pubsub.topic_count(topic) for topic in pubsub.topics()},
                },
            )
    else:
        with LoadBigQuery(arguments.port) as bigquery:
            bigquery.create_table(arguments.table)
            if delay_s:
                bigquery.faults.delay(delay_s)
            port = arguments.write_port
            with FakeWriteApi(bigquery.store, port, latency_s=delay_s, strict=False) as write_api:
                more: dict[str, object] = {}
                if arguments.arrivals:
                    more["arrivals"] = _arrivals(bigquery)
                _serve(
                    bigquery.port,
                    lambda: {
                        "write_port": write_api.port,
                        "tables": {arguments.table: bigquery.count},
                        **more,
                    },
                )


def _arrivals(bigquery: LoadBigQuery) -> list[tuple[float, int]]:
    """Return a list that grows: seconds since 1970 UTC, and how many rows there were then."""
    arrivals: list[tuple[float, int]] = []

    def watch() -> None:
        rows = 0
        while True:
            if bigquery.store.wait_for(rows + 1, ARRIVAL_LOOK_S):
                now_s, rows = time.time(), bigquery.store.count()
                arrivals.append((now_s, rows))

    threading.Thread(target=watch, daemon=True).start()
    return arrivals


def _serve(port: int, counts: Callable[[], dict[str, object]]) -> None:
    _tell({"event": "serving", **counts(), "port": port})
    while signal.sigwait(_SIGNALS) == signal.SIGUSR1:
        _tell({"event": "counts", **counts()})


def _tell(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
