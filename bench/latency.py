"""Row 8: from a sensor's PUBLISH through everything to a subscriber of Pub/Sub."""

import json
import time
from collections.abc import Mapping
from datetime import datetime

from bench.fill import APP_ENV
from bench.processes import BenchError, Process, pause
from bench.report import Row
from bench.rig import START_TIMEOUT_S, rig, wait_for
from bench.servers import PubSub, pubsub_servers

DELAY_VARIABLE = "COMMIT_DELAY_MS"
AT_ONCE = {DELAY_VARIABLE: "0"}
DELAYS: dict[str, tuple[dict[str, str], tuple[int, int]]] = {
    "": (AT_ONCE, (15, 60)),
    "-default": ({}, (120, 300)),
}
"""By the name's ending: the settings, and the limits of p50 and p99 in milliseconds. Each reading
at once is what the figures of earlier releases are to be compared with."""

RATE = 1_000.0
WARM_UP = 1_000
"""The first messages find cold connections and caches; they are delivered, but not counted."""

MAX_COUNT = 20_000
"""Twenty seconds; a longer run says no more."""

BEHIND_MAX_S = 0.2
RUN_TIMEOUT_S = 120.0


def percentile(values: list[float], share: float) -> float:
    """Return the value below which ``share`` of ``values`` lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def one_run(server: PubSub, count: int, **settings: str) -> list[float]:
    """Return the milliseconds that each reading took, in order of receipt."""
    with rig() as setup:
        setup.broker()
        topic = server.new_topic()
        subscription = topic.replace("/topics/", "/subscriptions/")
        if server.counts_messages:
            server.subscribe(topic)
        environ = {"APP_ENV": APP_ENV, "BIGQUERY_ENABLED": "false", **server.environ(topic)}
        environ |= settings
        setup.collector(**environ)
        forwarder = setup.forwarder("pubsub", LOG_LEVEL="INFO", **environ)
        forwarder.wait_output('"draining"', START_TIMEOUT_S)
        pause(1.0)
        arguments = ["bench.live_publisher", str(setup.broker_port), str(count), str(RATE)]
        publisher = setup.start(Process.python("live", arguments, setup.directory))
        took_ms: dict[int, float] = {}
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while len(took_ms) < count:
            received = server.next_messages(subscription)
            now_s = time.time_ns() / 1e9
            for one in received:
                sent = datetime.fromisoformat(json.loads(one.message.data)["timestamp"])
                seq = int(one.message.attributes["seq"])
                took_ms.setdefault(seq, (now_s - sent.timestamp()) * 1e3)
            server.acknowledge(subscription, received)
            if time.monotonic() > deadline:
                raise BenchError(f"{len(took_ms)} of {count} reached the subscriber")
        if publisher.wait(START_TIMEOUT_S) != 0:
            raise BenchError(f"the publisher failed: {publisher.output()}")
        if float(publisher.output().split()[-1]) > BEHIND_MAX_S:
            raise BenchError("the publisher did not keep to its rate")
        # The subscriber has a message before the forwarder has noted that it was delivered.
        wait_for(
            lambda: setup.spool_counter("spooled") == setup.sink_counter("pubsub") == count,
            f"the counters come to {count}",
            START_TIMEOUT_S,
        )
        return [took_ms[seq] for seq in sorted(took_ms)]


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 8: two figures for each server and delay."""
    count = min(count, MAX_COUNT)
    made = []
    with pubsub_servers() as servers:
        for server in servers:
            suffix = "" if server.counts_messages else "-emulator"
            cases = [
                _Case(f"latency{name}", suffix, settings, limits)
                for name, (settings, limits) in DELAYS.items()
            ]
            for _ in range(rounds):
                for case in cases:
                    case.add(one_run(server, WARM_UP + count, **case.settings)[WARM_UP:])
            for case in cases:
                note = f"server: {server.name}, a pulling subscriber in this process"
                for row in (case.p50, case.p99):
                    row.notes.append(note)
                    made.append(row)
    return made


class _Case:
    """One server and delay."""

    def __init__(
        self, name: str, suffix: str, settings: Mapping[str, str], limits: tuple[int, int]
    ) -> None:
        self.settings = settings
        delay = settings.get(DELAY_VARIABLE, "at its default")
        what = (
            f"from PUBLISH to the subscriber's receipt at {RATE:,.0f} readings/s, "
            f"{DELAY_VARIABLE} {delay}"
        )
        self.p50 = Row(f"{name}-p50{suffix}", f"{what}, half of them within", "ms", "")
        self.p99 = Row(f"{name}-p99{suffix}", f"{what}, 99 % within", "ms", "")
        self.p50.target, self.p99.target = (f"<= {limit}" for limit in limits)

    def add(self, took_ms: list[float]) -> None:
        self.p50.ours.append(percentile(took_ms, 0.50))
        self.p99.ours.append(percentile(took_ms, 0.99))
