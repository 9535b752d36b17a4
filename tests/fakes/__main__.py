"""Run one fake as a process of its own, for benchmarks and for a look by hand.

    python -m tests.fakes pubsub --port 8085 --topic projects/p/topics/t
    python -m tests.fakes bigquery --port 9050 --table p.d.t --create

Prints one JSON line when it serves, one with its counts at each SIGUSR1, and a
last one upon SIGTERM or SIGINT.
"""

import argparse
import json
import signal
from collections.abc import Callable

from tests.fakes.bigquery import FakeBigQuery
from tests.fakes.pubsub import FakePubSub
from tests.fakes.tables import READINGS
from tests.fakes.write_api import FakeWriteApi

SCHEMAS = {"default": READINGS}
_SIGNALS = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}


def main() -> None:
    """Serve until told to stop."""
    arguments = _parser().parse_args()
    # Blocked before any thread starts, so that all inherit it and only sigwait gets them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if arguments.fake == "pubsub":
        with FakePubSub(arguments.port, topics=arguments.topic, keep=arguments.keep) as pubsub:
            _serve(lambda: _pubsub_counts(pubsub))
    else:
        with FakeBigQuery(
            arguments.port, keep=arguments.keep, dedup=not arguments.no_dedup
        ) as bigquery:
            for ref in arguments.table:
                bigquery.create_dataset(ref.rpartition(".")[0])
                if arguments.create:
                    bigquery.create_table(ref, SCHEMAS[arguments.schema])
            # What is not kept need not be looked into.
            write_api = FakeWriteApi(bigquery.store, arguments.write_port, strict=arguments.keep)
            with write_api:
                _serve(lambda: _bigquery_counts(bigquery, write_api))


def _serve(counts: Callable[[], dict[str, object]]) -> None:
    _tell({"event": "serving", **counts()})
    while signal.sigwait(_SIGNALS) == signal.SIGUSR1:
        _tell({"event": "counts", **counts()})
    _tell({"event": "stopped", **counts()})


def _tell(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)  # noqa: T201 - this is the command line


def _pubsub_counts(fake: FakePubSub) -> dict[str, object]:
    topics = fake.topics()
    return {
        "fake": "pubsub",
        "port": fake.port,
        "count": fake.count,
        "requests": fake.requests,
        "violations": len(fake.violations),
        "topics": {topic: fake.topic_count(topic) for topic in topics},
        "last_seq": {topic: fake.last_seq(topic) for topic in topics},
    }


def _bigquery_counts(fake: FakeBigQuery, write_api: FakeWriteApi) -> dict[str, object]:
    return {
        "fake": "bigquery",
        "port": fake.port,
        "write_port": write_api.port,
        "appends": len(write_api.appended),
        "streams": len(write_api.streams.names),
        "count": fake.count,
        "requests": fake.requests,
        "tables": {table.ref: table.count for table in fake.store.tables()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    fakes = parser.add_subparsers(dest="fake", required=True)
    pubsub = fakes.add_parser("pubsub", help="gRPC")
    pubsub.add_argument("--topic", action="append", default=[], help="projects/P/topics/T")
    bigquery = fakes.add_parser("bigquery", help="REST, and the write API by gRPC")
    bigquery.add_argument("--write-port", type=int, default=0)
    bigquery.add_argument("--table", action="append", default=[], help="project.dataset.table")
    bigquery.add_argument("--create", action="store_true", help="create the tables")
    bigquery.add_argument("--schema", choices=sorted(SCHEMAS), default="default")
    bigquery.add_argument("--no-dedup", action="store_true", help="ignore insert ids")
    for fake in (pubsub, bigquery):
        fake.add_argument("--port", type=int, default=0)
        fake.add_argument("--keep", action="store_true", help="keep what arrives, not only counts")
    return parser


if __name__ == "__main__":
    main()
