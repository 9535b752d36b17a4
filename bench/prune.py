"""Row 12: ingest while a full prune runs; and the collector's ceiling without a real broker."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.fill import APP_ENV, fill
from bench.latency import percentile
from bench.processes import BenchError, Process, Usage, pause
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig
from bench.servers import NAMES

PRUNED_ROWS_PER_COUNT = 10
"""Rows in the spool per ``--count``: two million at the default, pruned within seconds."""

OLD_S = 48 * 3600.0
"""Twice SPOOL_RETENTION_HOURS, which stays at its default."""

STEADY_S = 6.0
MESSAGES_MIN = 1_000
"""Fewer do not have a 99th percentile."""

LOOK_EVERY_S = 0.02
RUN_TIMEOUT_S = 300.0
WITHOUT_SINKS = {"PUBSUB_ENABLED": "false", "BIGQUERY_ENABLED": "false"}
"""With no sink enabled nobody waits for a row, and only its age keeps it."""


@dataclass(frozen=True)
class Steady:
    """What a steady stream of messages met, in milliseconds from PUBLISH to PUBACK."""

    deleting: list[float]
    """Of those that went while rows were deleted; without a prune, of all."""
    later: list[float]
    """Of the others: while the freed space was handed back to the file system."""


def wire_broker(setup: Rig, *arguments: str) -> tuple[Process, int]:
    """Start the broker for one client; return it and its port."""
    process = setup.start(
        Process.python("wire-broker", ["bench.wire_broker", *arguments], setup.directory)
    )
    text = process.wait_output("port ", START_TIMEOUT_S)
    return process, int(text.split()[1])


def result(broker: Process) -> dict[str, Any]:
    """Return what the broker says at its end."""
    broker.wait_output("done ", RUN_TIMEOUT_S)
    said: dict[str, Any] = json.loads(broker.output().partition("done ")[2])
    if said["acked"] != said["sent"]:
        raise BenchError(f"{said['acked']} of {said['sent']} messages were acknowledged")
    return said


def _steady(filled: Path, rows_before: int, *, pruning: bool) -> Steady:
    with rig() as setup:
        shutil.copytree(filled, setup.spool_dir)
        os.sync()  # or the copy is written back while the commits are timed
        arguments = ["steady", f"--seconds={STEADY_S}", f"--first={rows_before}"]
        broker, port = wire_broker(setup, *arguments)
        environ = {"APP_ENV": APP_ENV, "MQTT_PORT": str(port), **WITHOUT_SINKS, **NAMES}
        setup.collector(**environ)
        broker.say("go")
        pruned_at = _watch(setup, broker, rows_before)
        said = result(broker)
        if setup.spool_counter("spooled") != rows_before + said["sent"]:
            raise BenchError("not all that was acknowledged is spooled")
        if pruning != (setup.spool_counter("pruned") > 0):
            raise BenchError("pruned or not, it is not as it should be")
        sent = list(zip(said["went"], said["took_ms"], strict=True))
        return Steady(
            [took for went, took in sent if went < pruned_at],
            [took for went, took in sent if went >= pruned_at],
        )


def _watch(setup: Rig, broker: Process, rows_before: int) -> float:
    """Return when the last of the old rows was pruned, in Unix time; look until the end."""
    pruned_at = float("inf")
    while "done " not in broker.output():
        if setup.spool_counter("pruned") >= rows_before:
            pruned_at = min(pruned_at, time.time())
        pause(LOOK_EVERY_S)
    return pruned_at


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 12."""
    spooled = count * PRUNED_ROWS_PER_COUNT
    what = (
        "99th percentile from PUBLISH to PUBACK, 20 messages each 10 ms, spool of "
        f"{spooled:,} rows: while"
    )
    deleting = Row("prune", f"{what} all of them are deleted ÷ without a prune", "ms", "<= 1.5")
    returning = Row(
        "prune-return", f"{what} the freed space is handed back ÷ without", "ms", "<= 1.5"
    )
    with TemporaryDirectory(prefix="sluice-bench-") as name:
        for kind, age_s in (("old", OLD_S), ("young", 0.0)):
            fill(Path(name) / kind, spooled, age_s=age_s)
        for _ in range(rounds):
            ours = _steady(Path(name) / "old", spooled, pruning=True)
            reference = _steady(Path(name) / "young", spooled, pruning=False).deleting
            for row, took in ((deleting, ours.deleting), (returning, ours.later)):
                if len(took) < MESSAGES_MIN and row is deleting:
                    raise BenchError(f"only {len(took)} messages while pruning: larger --count")
                if len(took) < MESSAGES_MIN:
                    continue
                row.ours.append(percentile(took, 0.99))
                row.reference.append(percentile(reference, 0.99))
                row.notes.append(
                    f"{len(took):,} messages; median {percentile(took, 0.5):.2f} ms, without "
                    f"{percentile(reference, 0.5):.2f} ms"
                )
    return [row for row in (deleting, returning) if row.ours]


def ceiling_rows(rounds: int, count: int) -> list[Row]:
    """Return what the collector takes when no broker stands in its way."""
    row = Row(
        "collector-ceiling",
        f"collector, {count:,} readings from a broker of prebuilt packets, each synced before its "
        "PUBACK, acknowledged in order",
        "msg/s",
        "",
    )
    for _ in range(rounds):
        with rig() as setup:
            broker, port = wire_broker(setup, "flood", f"--count={count}")
            environ = {"APP_ENV": "LOCAL", "MQTT_PORT": str(port), **WITHOUT_SINKS}
            collector = setup.collector(**environ)
            before: Usage = collector.usage()
            broker.say("go")
            said = result(broker)
            after = collector.usage()
            if not said["in_order"]:
                raise BenchError("the acknowledgements came out of order")
            if setup.spool_counter("spooled") != count:
                raise BenchError("not all that was acknowledged is spooled")
            row.ours.append(count / said["seconds"])
            row.cpu_us.append((after.cpu_s - before.cpu_s) * 1e6 / count)
            row.rss_mb.append(after.rss_bytes / 1e6)
    return [row]
