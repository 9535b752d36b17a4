"""One run at a plant's rate: readings one by one, at random moments, and what they cost.

The spool prunes at once, so pruning is part of what is measured. The services are the in-repo
fakes, whatever the system that is measured.
"""

import os
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from bench.live_publisher import due_times
from bench.processes import ROOT, BenchError, Process, pause
from bench.publish import reading_at
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for
from bench.servers import PubSub
from bench.system import TOPIC, Services, System

WINDOW_VARIABLE = "SLUICE_BENCH_WINDOW_S"
"""Names another length of the window, for a look at whether all runs; the table tells it."""

WINDOW_S = 60.0
WARM_UP_S = 12.0
"""Connections and caches; delivered, but not counted."""

TAIL_S = 3.0
"""Sent on after the window, so that the end of the traffic is not measured."""

BEHIND_MAX_S = 0.2
RUN_TIMEOUT_S = 300.0
TRACE_S = 15.0
FOLLOWS_SHARE = 0.9
"""Who has passed on less than this share of what was sent does not keep up."""

LOOK_S = 0.1
PRUNES_AT_ONCE = {"SPOOL_RETENTION_HOURS": "0"}
SUBSCRIPTION = TOPIC.replace("/topics/", "/subscriptions/")
_SEED = 20_261_128
_PAYLOADS_SAMPLED = 2_000


class NotFollowingError(BenchError):
    """The rate is too high for what is measured."""


@dataclass(frozen=True)
class Load:
    """What is published."""

    rate: int
    """Readings a second, in the mean."""
    sites: int
    window_s: float

    @classmethod
    def of(cls, rate: int, sites: int) -> "Load":
        """Return the load with the window that the environment asks for."""
        window_s = float(os.environ.get(WINDOW_VARIABLE) or WINDOW_S)
        return cls(rate, sites, window_s)

    @property
    def count(self) -> int:
        """How many readings there are in warm-up, window and tail."""
        return self.sent_by(WARM_UP_S + self.window_s + TAIL_S)

    def sent_by(self, after_s: float) -> int:
        """Return how many are sent in the first ``after_s`` seconds."""
        # Far more than can come in that time.
        many = due_times(int(2 * self.rate * after_s) + 100, self.rate, _SEED)
        return sum(1 for _ in takewhile(lambda due_s: due_s < after_s, many))

    def publisher(self, setup: Rig, count: int) -> Process:
        """Start to publish the first ``count``."""
        arguments = [str(setup.broker_port), str(count), str(self.rate), str(self.sites)]
        return setup.start(
            Process.python(
                "live", ["bench.live_publisher", *arguments, str(_SEED)], setup.directory
            )
        )

    def payload_bytes(self) -> float:
        """Return the mean size of a payload."""
        count = self.count
        sample = range(0, count, max(1, count // _PAYLOADS_SAMPLED))
        now_us = time.time_ns() // 1000
        return sum(len(reading_at(n, now_us, self.sites)[1]) for n in sample) / len(sample)


@dataclass
class Figures:
    """What one run cost, within the window."""

    readings_per_s: float
    written: dict[str, float] = field(default_factory=dict)
    """Bytes to the disk per byte of payload, by process."""
    gb_a_day: float = 0.0
    """The same, of all processes, by the day."""
    cpu_percent: dict[str, float] = field(default_factory=dict)
    """Of a core, by process."""
    wake_ups_per_s: dict[str, float] = field(default_factory=dict)
    pubsub_ms: list[float] = field(default_factory=list)
    """From PUBLISH to the subscriber's receipt, of each reading that was sent in the window."""
    bigquery_ms: list[float] = field(default_factory=list)
    """From PUBLISH to the row."""
    pruned: int = 0
    """Rows that left the spool in the window."""


@dataclass(frozen=True)
class _Mark:
    """Begin or end of the window."""

    at_s: float
    wall_s: float
    readings: int
    cpu_ns: dict[str, int]
    written_bytes: dict[str, int]
    wake_ups: dict[str, int]
    pruned: int


class _Subscriber:
    """Takes the messages out of Pub/Sub, and notes when each came."""

    def __init__(self, server: PubSub) -> None:
        self._server = server
        self._came: dict[bytes, tuple[float, float]] = {}

    @property
    def count(self) -> int:
        """How many different readings came."""
        return len(self._came)

    def receive(self) -> None:
        """Receive what is there, or comes soon."""
        received = self._server.next_messages(SUBSCRIPTION)
        now_s = time.time()
        for one in received:
            data = msgspec.json.decode(one.message.data)
            sent_s = datetime.fromisoformat(data["timestamp"]).timestamp()
            identity = f"{data['sensor_id']} {data['timestamp']}".encode()
            self._came.setdefault(identity, (sent_s, now_s))
        self._server.acknowledge(SUBSCRIPTION, received)

    def took(self) -> list[tuple[float, float]]:
        """Return of each reading when it was sent, and when it came, in order of sending."""
        return sorted(self._came.values())


def measure(
    services: Services,
    processes: Mapping[str, Process],
    load: Load,
    *,
    with_rows: bool = True,
    look: Callable[[int], None] | None = None,
) -> Figures:
    """Publish ``load``, take everything out again, and return what it cost.

    Args:
        services: Where the readings go.
        processes: What is measured.
        load: What is published.
        with_rows: Whether they go to BigQuery too.
        look: Called now and then within the window, with how many readings the subscriber has.

    Raises:
        NotFollowingError: ``processes`` do not keep up with the rate.
        BenchError: Something did not arrive.
    """
    server = _server(services)
    try:
        subscriber = _Subscriber(server)
        publisher = load.publisher(services.setup, load.count)
        marks = _follow(services.setup, subscriber, processes, load, look)
        if publisher.wait(START_TIMEOUT_S) != 0:
            raise BenchError(f"the publisher failed: {publisher.output()}")
        if float(publisher.output().split()[-1]) > BEHIND_MAX_S:
            raise BenchError("the publisher did not keep to its rate")
        took = subscriber.took()
        figures = _figures(marks, load, took)
        if with_rows:
            wait_for(
                lambda: services.received()[1] >= load.count,
                f"{load.count} rows are in BigQuery",
                START_TIMEOUT_S,
                every_s=LOOK_S,
            )
            rows = _row_times(took, services.bigquery.counts())
            figures.bigquery_ms = _within(marks, rows)
        return figures
    finally:
        server.close()


def _follow(
    setup: Rig,
    subscriber: _Subscriber,
    processes: Mapping[str, Process],
    load: Load,
    look: Callable[[int], None] | None,
) -> list[_Mark]:
    """Receive until all is there; return the window's begin and end."""
    count, begun = load.count, time.perf_counter()
    marks: list[_Mark] = []
    due_s = [WARM_UP_S, WARM_UP_S + load.window_s]
    while subscriber.count < count:
        subscriber.receive()
        past_s = time.perf_counter() - begun
        if len(marks) < len(due_s) and past_s >= due_s[len(marks)]:
            marks.append(_mark(setup, processes, subscriber.count))
            # One second: the publisher has to start, and some are on their way.
            if subscriber.count < FOLLOWS_SHARE * load.sent_by(past_s - 1.0):
                raise NotFollowingError(f"{subscriber.count} came in {past_s:.0f} s")
        if look is not None and len(marks) == 1:
            look(subscriber.count)
        if past_s > RUN_TIMEOUT_S:
            raise BenchError(f"{subscriber.count} of {count} reached the subscriber")
    return marks


def _mark(setup: Rig, processes: Mapping[str, Process], readings: int) -> _Mark:
    return _Mark(
        time.perf_counter(),
        time.time(),
        readings,
        {name: p.cpu_ns() for name, p in processes.items()},
        {name: p.usage().written_bytes for name, p in processes.items()},
        {name: p.wake_ups() for name, p in processes.items()},
        setup.spool_counter("pruned"),
    )


def _figures(marks: list[_Mark], load: Load, took: list[tuple[float, float]]) -> Figures:
    if len(marks) != 2:  # noqa: PLR2004 - begin and end of the window
        raise BenchError("the readings came to an end before the window")
    a, b = marks
    seconds = b.at_s - a.at_s
    payload = (b.readings - a.readings) * load.payload_bytes()
    written = {n: b.written_bytes[n] - a.written_bytes[n] for n in a.written_bytes}
    return Figures(
        (b.readings - a.readings) / seconds,
        {name: size / payload for name, size in written.items()},
        sum(written.values()) / seconds * 86_400e-9,
        {n: (b.cpu_ns[n] - a.cpu_ns[n]) / 1e7 / seconds for n in a.cpu_ns},
        {n: (b.wake_ups[n] - a.wake_ups[n]) / seconds for n in a.wake_ups},
        pubsub_ms=_within(marks, took),
        pruned=b.pruned - a.pruned,
    )


def _within(marks: list[_Mark], times: list[tuple[float, float]]) -> list[float]:
    """Return how many milliseconds those took that were sent within the window."""
    a, b = marks
    return [(came - sent) * 1e3 for sent, came in times if a.wall_s <= sent < b.wall_s]


def _row_times(
    took: list[tuple[float, float]], counts: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Return of each reading when it was sent, and when its row was there.

    Rows come in the order in which the readings were sent, so the n-th reading is there as soon
    as n rows are.
    """
    at_s = [at for at, _ in counts["arrivals"]]
    rows = [n for _, n in counts["arrivals"]]
    return [(sent, at_s[bisect_left(rows, number)]) for number, (sent, _) in enumerate(took, 1)]


def start_services(setup: Rig) -> Services:
    """Start both services, with a subscription, and with the times at which rows come."""
    services = Services.start(setup, arrivals=True)
    server = _server(services)
    server.subscribe(TOPIC)
    server.close()
    return services


def _server(services: Services) -> PubSub:
    fake = services.pubsub
    return PubSub("in-repo fake", f"127.0.0.1:{fake.port}", fake, fake.process)


def sluice(
    load: Load,
    code: Path = ROOT,
    look: Callable[[Rig, int], None] | None = None,
    **environ: str,
) -> Figures:
    """Run the three programs of ``code``.

    Args:
        load: What is published.
        code: A checkout.
        look: As :func:`measure` takes it, with the rig besides.
        environ: Added to the programs' settings.

    Raises:
        BenchError: Something did not arrive, did not add up, or nothing was pruned or written.
    """
    with rig(code) as setup:
        services = start_services(setup)
        system = System.start(setup, services=services, settings=PRUNES_AT_ONCE | environ)
        bound = None if look is None else (lambda count: look(setup, count))
        figures = measure(services, system.processes, load, look=bound)
        count = load.count
        system.wait_delivered(count, START_TIMEOUT_S)
        system.check(count)
        if not figures.written["collector"]:
            raise BenchError("this file system counts no writes: let TMPDIR name a disk's")
        if not figures.pruned and load.window_s >= WINDOW_S:
            raise BenchError("nothing was pruned within the window")
        return figures


def syncs_per_s(load: Load, code: Path = ROOT, **environ: str) -> dict[str, float]:
    """Return how often each process syncs, in a run of its own: to be traced costs time."""
    tracer = shutil.which("strace")
    if tracer is None:
        raise BenchError("strace is not installed: apt-get install strace")
    with rig(code) as setup:
        system = System.start(setup, settings=PRUNES_AT_ONCE | environ)
        trace_s = min(TRACE_S, load.window_s)
        load.publisher(setup, load.sent_by(WARM_UP_S + trace_s + TAIL_S))
        pause(WARM_UP_S)
        traces = {}
        for name, process in system.processes.items():
            traces[name] = setup.directory / f"{name}.strace"
            command = [tracer, "-f", "-qq", "-e", "trace=fsync,fdatasync,sync_file_range,msync"]
            command += ["-o", str(traces[name]), "-p", str(process.pid)]
            setup.start(Process(f"strace-{name}", command, setup.directory))
        pause(1.0)  # until it is attached
        before, begun = {n: _syncs(path) for n, path in traces.items()}, time.perf_counter()
        pause(trace_s)
        seconds = time.perf_counter() - begun
        return {name: (_syncs(path) - before[name]) / seconds for name, path in traces.items()}


def _syncs(path: Path) -> int:
    # A call that another thread interrupts has a second line, without the parenthesis.
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum("sync(" in line or "sync_file_range(" in line for line in lines)
