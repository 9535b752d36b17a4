"""Rows 1 and 2: from the broker to the disk, beside subscribers that store nothing."""

import shutil
import time
from dataclasses import dataclass

from bench.processes import BenchError, Process
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for

RUN_TIMEOUT_S = 300.0
SUBSCRIBED_S = 0.5
"""mosquitto_sub says nothing when it has subscribed; on loopback this is long."""


@dataclass(frozen=True)
class Run:
    """One subscriber's run."""

    per_s: float
    cpu_us: float
    rss_mb: float


def _timed(setup: Rig, subscriber: Process, count: int, *, paho: bool) -> Run:
    publisher = setup.publisher(count)
    begun = time.perf_counter()
    publisher.say("go")
    if paho:
        subscriber.wait_output(f"done {count}", RUN_TIMEOUT_S)
    elif subscriber.wait(RUN_TIMEOUT_S) != 0:
        raise BenchError(f"mosquitto_sub failed: {subscriber.output()}")
    return Run(count / (time.perf_counter() - begun), 0.0, 0.0)


def mosquitto_sub(count: int) -> Run:
    """Run Mosquitto's own subscriber (C), its output thrown away."""
    binary = shutil.which("mosquitto_sub")
    if binary is None:
        raise BenchError("mosquitto_sub is not installed: apt-get install mosquitto-clients")
    with rig() as setup:
        setup.broker()
        command = f"exec {binary} -q 1 -p {setup.broker_port} -t FCTS/# -C {count} > /dev/null"
        subscriber = setup.start(Process("sub", ["/bin/sh", "-c", command], setup.directory))
        time.sleep(SUBSCRIBED_S)
        return _timed(setup, subscriber, count, paho=False)


def plain_paho(count: int) -> Run:
    """Run a plain paho subscriber, which stores nothing."""
    with rig() as setup:
        setup.broker()
        arguments = ["bench.paho_subscriber", str(setup.broker_port), str(count)]
        subscriber = setup.start(Process.python("paho", arguments, setup.directory))
        subscriber.wait_output("subscribed", START_TIMEOUT_S)
        return _timed(setup, subscriber, count, paho=True)


def collector(count: int, **environ: str) -> Run:
    """Run the collector: every message validated, committed, synced, and then acknowledged."""
    with rig() as setup:
        setup.broker()
        process = setup.collector(PUBSUB_ENABLED="false", BIGQUERY_ENABLED="false", **environ)
        publisher = setup.publisher(count)
        before = process.usage()
        begun = time.perf_counter()
        publisher.say("go")
        wait_for(lambda: setup.spool_counter("received") >= count, "all are spooled", RUN_TIMEOUT_S)
        seconds = time.perf_counter() - begun
        after = process.usage()
        spooled = setup.spool_counter("spooled")
        if spooled != count or setup.spool_counter("received") != count:
            raise BenchError(f"{spooled} of {count} spooled")
        return Run(
            count / seconds,
            (after.cpu_s - before.cpu_s) * 1e6 / count,
            after.rss_bytes / 1e6,
        )


def rows(rounds: int, count: int) -> list[Row]:
    """Return rows 1 and 2, the three subscribers taking turns."""
    c_row = Row(
        "ingest",
        f"collector, {count:,} readings, each synced before its PUBACK ÷ mosquitto_sub -q 1 "
        "to /dev/null",
        "msg/s",
        ">= 1.0",
    )
    paho_row = Row(
        "ingest-paho", "the same ÷ a plain paho subscriber that stores nothing", "msg/s", ">= 3.0"
    )
    for _ in range(rounds):
        ours = collector(count)
        for row, reference in ((c_row, mosquitto_sub(count)), (paho_row, plain_paho(count))):
            row.ours.append(ours.per_s)
            row.reference.append(reference.per_s)
            row.cpu_us.append(ours.cpu_us)
            row.rss_mb.append(ours.rss_mb)
    return [c_row, paho_row]
