"""What a plant pays at its usual rate: readings one by one, at random moments, for a minute.

For each rate and number of sites: bytes written to the disk, syncs, wake-ups, processor time, and
how long a reading takes from its PUBLISH to a subscriber of Pub/Sub and to the row in BigQuery. For
comparison, with the same servers, the single-file script, Node-RED where npm can install it, and
another checkout of Sluice where SLUICE_BENCH_BEFORE names one.
"""

import os
import shutil
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from bench import node_red
from bench.chain import start_script
from bench.latency import percentile
from bench.processes import ROOT, BenchError, Process
from bench.publish import reading_at
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for
from bench.servers import PubSub
from bench.system import TOPIC, Services, System

BEFORE_VARIABLE = "SLUICE_BENCH_BEFORE"
"""Names a checkout of Sluice to compare with."""

RATES = (10, 50, 200, 1_000)
SITES = (1, 8)
WARM_UP_S = 12.0
"""Connections, caches, the first checkpoint; delivered, but not counted."""

WINDOW_S = 60.0
TAIL_S = 3.0
"""Sent on after the window, so that the end of the traffic is not measured."""

SCRIPT_RATE_MAX = 50
"""Above it the single-file script cannot follow: both of its calls wait for an answer."""

BEHIND_MAX_S = 0.2
RUN_TIMEOUT_S = 300.0
TRACE_S = 15.0
_SEED = 20_261_128
SUBSCRIPTION = TOPIC.replace("/topics/", "/subscriptions/")


@dataclass
class Figures:
    """What one run cost, within the window."""

    readings_per_s: float
    written: dict[str, float] = field(default_factory=dict)
    """Bytes to the disk per byte of payload, by process."""
    cpu_percent: dict[str, float] = field(default_factory=dict)
    """Of a core, by process."""
    wake_ups_per_s: dict[str, float] = field(default_factory=dict)
    pubsub_ms: list[float] = field(default_factory=list)
    bigquery_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Snapshot:
    at_s: float
    readings: int
    cpu_ns: dict[str, int]
    written_bytes: dict[str, int]
    wake_ups: dict[str, int]


class _Subscriber:
    """Takes the messages out of Pub/Sub, and notes when each came."""

    def __init__(self, server: PubSub) -> None:
        self._server = server
        self.took_ms: dict[bytes, float] = {}
        self.sent_s: list[float] = []

    def receive(self) -> None:
        """Receive what is there, or comes soon."""
        received = self._server.next_messages(SUBSCRIPTION)
        now_s = time.time()
        for one in received:
            data = msgspec.json.decode(one.message.data)
            sent_s = datetime.fromisoformat(data["timestamp"]).timestamp()
            identity = f"{data['sensor_id']} {data['timestamp']}".encode()
            if identity not in self.took_ms:
                self.took_ms[identity] = (now_s - sent_s) * 1e3
                self.sent_s.append(sent_s)
        self._server.acknowledge(SUBSCRIPTION, received)


def _snapshot(processes: Mapping[str, Process], readings: int) -> _Snapshot:
    return _Snapshot(
        time.perf_counter(),
        readings,
        {name: p.cpu_ns() for name, p in processes.items()},
        {name: p.usage().written_bytes for name, p in processes.items()},
        {name: p.wake_ups() for name, p in processes.items()},
    )


def _payload_bytes(count: int, sites: int) -> float:
    """Return the mean size of a payload."""
    return sum(len(reading_at(n, time.time_ns() // 1000, sites)[1]) for n in range(count)) / count


def measure(
    setup: Rig,
    services: Services,
    processes: Mapping[str, Process],
    load: "Load",
    *,
    with_rows: bool = True,
) -> Figures:
    """Publish at the rate of ``load``, take everything out again, and return what it cost.

    Args:
        setup: Where it runs.
        services: Where the readings go.
        processes: What is measured.
        load: What is published.
        with_rows: Whether they go to BigQuery too.
    """
    server = PubSub(
        "in-repo fake",
        f"127.0.0.1:{services.pubsub.port}",
        services.pubsub,
        services.pubsub.process,
    )
    try:
        subscriber = _Subscriber(server)
        arguments = [str(setup.broker_port), str(load.count), str(load.rate), str(load.sites)]
        begun = time.perf_counter()
        publisher = setup.start(
            Process.python(
                "live", ["bench.live_publisher", *arguments, str(_SEED)], setup.directory
            )
        )
        marks: list[_Snapshot] = []
        due_s = [WARM_UP_S, WARM_UP_S + load.window_s]
        while len(subscriber.took_ms) < load.count:
            subscriber.receive()
            past_s = time.perf_counter() - begun
            if len(marks) < len(due_s) and past_s >= due_s[len(marks)]:
                marks.append(_snapshot(processes, len(subscriber.took_ms)))
            if past_s > RUN_TIMEOUT_S:
                raise BenchError(
                    f"{len(subscriber.took_ms)} of {load.count} reached the subscriber"
                )
        if publisher.wait(START_TIMEOUT_S) != 0:
            raise BenchError(f"the publisher failed: {publisher.output()}")
        if float(publisher.output().split()[-1]) > BEHIND_MAX_S:
            raise BenchError("the publisher did not keep to its rate")
        figures = _figures(marks, load)
        skipped = int(WARM_UP_S * load.rate)
        figures.pubsub_ms = list(subscriber.took_ms.values())[skipped:]
        if with_rows:
            wait_for(
                lambda: services.received()[1] >= load.count,
                f"{load.count} rows are in BigQuery",
                START_TIMEOUT_S,
                every_s=0.1,
            )
            figures.bigquery_ms = _row_ms(subscriber.sent_s, services.bigquery.counts())[skipped:]
        return figures
    finally:
        server.close()


def _figures(marks: list[_Snapshot], load: "Load") -> Figures:
    if len(marks) != 2:  # noqa: PLR2004 - begin and end of the window
        raise BenchError("the readings came to an end before the window")
    a, b = marks
    seconds = b.at_s - a.at_s
    payload = (b.readings - a.readings) * _payload_bytes(1_000, load.sites)
    return Figures(
        (b.readings - a.readings) / seconds,
        {n: (b.written_bytes[n] - a.written_bytes[n]) / payload for n in a.written_bytes},
        {n: (b.cpu_ns[n] - a.cpu_ns[n]) / 1e7 / seconds for n in a.cpu_ns},
        {n: (b.wake_ups[n] - a.wake_ups[n]) / seconds for n in a.wake_ups},
    )


def _row_ms(sent_s: list[float], counts: Mapping[str, Any]) -> list[float]:
    """Return how long each reading took to its row, in order of sending.

    Rows come in the order in which the readings were received, so the n-th reading is there as
    soon as n rows are.
    """
    at_s = [at for at, _ in counts["arrivals"]]
    rows = [n for _, n in counts["arrivals"]]
    return [
        (at_s[bisect_left(rows, number)] - sent) * 1e3
        for number, sent in enumerate(sorted(sent_s), 1)
    ]


@dataclass(frozen=True)
class Load:
    """What is published."""

    rate: int
    sites: int
    window_s: float

    @property
    def count(self) -> int:
        """How many readings."""
        return int(self.rate * (WARM_UP_S + self.window_s + TAIL_S))


def sluice(load: Load, code: Path = ROOT) -> Figures:
    """Run the three programs of ``code``."""
    with rig(code) as setup:
        services = _services(setup)
        system = System.start(setup, services=services, SPOOL_RETENTION_HOURS="0")
        figures = measure(setup, services, system.processes, load)
        system.wait_delivered(load.count, START_TIMEOUT_S)
        system.check(load.count)
        return figures


def script(load: Load) -> Figures:
    """Run the single-file script."""
    with rig() as setup:
        services = _services(setup)
        setup.broker()
        return measure(setup, services, {"script": start_script(setup, services)}, load)


def peer(load: Load) -> Figures:
    """Run Node-RED, to Pub/Sub alone."""
    with rig() as setup:
        services = _services(setup)
        setup.broker()
        processes = {"node-red": node_red.start(setup, services)}
        return measure(setup, services, processes, load, with_rows=False)


def _services(setup: Rig) -> Services:
    services = Services.start(setup, arrivals=True)
    server = PubSub(
        "fake", f"127.0.0.1:{services.pubsub.port}", services.pubsub, services.pubsub.process
    )
    server.subscribe(TOPIC)
    server.close()
    return services


def syncs_per_s(load: Load, code: Path = ROOT) -> dict[str, float]:
    """Return how often each process syncs, in a run of its own: to be traced costs time."""
    tracer = shutil.which("strace")
    if tracer is None:
        raise BenchError("strace is not installed: apt-get install strace")
    with rig(code) as setup:
        system = System.start(setup, SPOOL_RETENTION_HOURS="0")
        count = int(load.rate * (WARM_UP_S + TRACE_S + TAIL_S))
        arguments = [str(setup.broker_port), str(count), str(load.rate), str(load.sites)]
        setup.start(
            Process.python(
                "live", ["bench.live_publisher", *arguments, str(_SEED)], setup.directory
            )
        )
        time.sleep(WARM_UP_S)
        traces = {}
        for name, process in system.processes.items():
            traces[name] = setup.directory / f"{name}.strace"
            command = [tracer, "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o"]
            setup.start(
                Process(
                    f"strace-{name}",
                    [*command, str(traces[name]), "-p", str(process.pid)],
                    setup.directory,
                )
            )
        time.sleep(1.0)
        before = {name: _syncs(path) for name, path in traces.items()}
        time.sleep(TRACE_S)
        return {name: (_syncs(path) - before[name]) / TRACE_S for name, path in traces.items()}


def _syncs(path: Path) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum("sync(" in line for line in lines)


def _parts(values: Mapping[str, float], digits: int = 1) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


class _Rows:
    """The rows of one rate and number of sites."""

    def __init__(self, load: Load, before: Path | None) -> None:
        name = f"calm-{load.rate}-{load.sites}"
        what = f"{load.rate:,} readings/s one by one, {load.sites} site{'s'[: load.sites > 1]}"
        self._load, self._before = load, before
        self.written = Row(
            f"{name}-written",
            f"{what}: bytes to the disk per byte of payload, all three processes"
            + (" ÷ before" if before else ""),
            "bytes",
            "",
        )
        self.cpu = Row(
            f"{name}-cpu",
            f"{what}: processor time of all three{' ÷ before' if before else ''}",
            "% of a core",
            "",
        )
        self.script = Row(
            f"{name}-cpu-script", f"{what}: the same ÷ the single-file script's", "% of a core", ""
        )
        self.peer = Row(
            f"{name}-cpu-node-red",
            f"{what}: processor time of collector and forwarder-pubsub ÷ Node-RED's, which goes to "
            "Pub/Sub alone and stores nothing",
            "% of a core",
            "",
        )
        self.latency = [
            Row(f"{name}-{to}-p{int(share * 100)}", f"{what}: to the {where}", "ms", "")
            for to, where in (("pubsub", "subscriber"), ("bigquery", "row"))
            for share in (0.5, 0.99)
        ]
        self.syncs = Row(f"{name}-syncs", f"{what}: syncs, all three", "per s", "")

    def round(self) -> None:
        """Run everything once."""
        ours = sluice(self._load)
        before = sluice(self._load, self._before) if self._before else None
        self._add(ours, before)
        if self._load.rate <= SCRIPT_RATE_MAX:
            theirs = script(self._load)
            self.script.ours.append(sum(ours.cpu_percent.values()))
            self.script.reference.append(sum(theirs.cpu_percent.values()))
            self.script.notes.append(
                f"script: Pub/Sub p50 {percentile(theirs.pubsub_ms, 0.5):.1f}, "
                f"p99 {percentile(theirs.pubsub_ms, 0.99):.1f} ms"
            )

        if node_red.installed():
            theirs = peer(self._load)
            cpu = ours.cpu_percent
            self.peer.ours.append(cpu["collector"] + cpu["forwarder-pubsub"])
            self.peer.reference.append(sum(theirs.cpu_percent.values()))
            self.peer.notes.append(
                f"Node-RED {node_red.version()}: p50 {percentile(theirs.pubsub_ms, 0.5):.1f}, "
                f"p99 {percentile(theirs.pubsub_ms, 0.99):.1f} ms"
            )

    def _add(self, ours: Figures, before: Figures | None) -> None:
        written, cpu = sum(ours.written.values()), sum(ours.cpu_percent.values())
        self.written.ours.append(written)
        self.cpu.ours.append(cpu)
        day_gb = written * ours.readings_per_s * _payload_bytes(1_000, self._load.sites) * 86_400e-9
        self.written.notes.append(f"{day_gb:.1f} GB a day; {_parts(ours.written)}")
        self.cpu.notes.append(
            f"{_parts(ours.cpu_percent)}; wake-ups a second: {_parts(ours.wake_ups_per_s, 0)}"
        )
        if before is not None:
            self.written.reference.append(sum(before.written.values()))
            self.cpu.reference.append(sum(before.cpu_percent.values()))
            self.cpu.notes.append(
                f"before: {_parts(before.cpu_percent)}; wake-ups {_parts(before.wake_ups_per_s, 0)}"
            )
        took: list[Callable[[Figures], float]] = [
            lambda f: percentile(f.pubsub_ms, 0.5),
            lambda f: percentile(f.pubsub_ms, 0.99),
            lambda f: percentile(f.bigquery_ms, 0.5),
            lambda f: percentile(f.bigquery_ms, 0.99),
        ]
        for row, value in zip(self.latency, took, strict=True):
            row.ours.append(value(ours))
            if before is not None:
                row.reference.append(value(before))

    def trace(self) -> None:
        """Count the syncs, once."""
        syncs = syncs_per_s(self._load)
        self.syncs.ours.append(sum(syncs.values()))
        self.syncs.notes.append(_parts(syncs))

    def all(self) -> list[Row]:
        """Return those that have figures."""
        made = [self.written, self.cpu, self.script, self.peer, *self.latency, self.syncs]
        return [row for row in made if row.ours]


def rows(rounds: int, count: int, rates: tuple[int, ...] = RATES) -> list[Row]:
    """Return the rows of ``rates``; ``count`` readings at most in the window."""
    named = os.environ.get(BEFORE_VARIABLE, "")
    before = Path(named).resolve() if named else None
    if before is not None and not (before / "collector").is_dir():
        raise BenchError(f"{BEFORE_VARIABLE}={named} is no checkout of Sluice")
    made = [
        _Rows(Load(rate, sites, min(WINDOW_S, count / rate)), before)
        for rate in rates
        for sites in SITES
    ]
    for _ in range(rounds):
        for one in made:
            one.round()
    for one in made:
        one.trace()
    return [row for one in made for row in one.all()]


CASES = {f"calm-{rate}": partial(rows, rates=(rate,)) for rate in RATES}
"""One rate alone."""
