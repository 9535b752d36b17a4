"""Row 12: ingest while the spool is pruned; and the collector's ceiling without a real broker."""

import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.fill import APP_ENV, fill
from bench.ingest import Run
from bench.latency import AT_ONCE, percentile
from bench.processes import BenchError, Process
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig
from bench.servers import NAMES
from spool import SpoolWriter, spool_path

PRUNED_ROWS_PER_COUNT = 10
"""Rows in the spool per ``--count``: two million at the default."""

OLD_S = 48 * 3600.0
"""Twice SPOOL_RETENTION_HOURS, which stays at its default."""

STEADY_S = 6.0
DELETE_STEP_ROWS = 20_000
RUN_TIMEOUT_S = 300.0
WITHOUT_SINKS = {"PUBSUB_ENABLED": "false", "BIGQUERY_ENABLED": "false"}
"""With no sink enabled nobody waits for a row, and only its age keeps it."""


@dataclass(frozen=True)
class Steady:
    """What a steady stream of messages met."""

    took_ms: list[float]
    """From PUBLISH to PUBACK, of each message."""
    pruned: int
    """Rows that left meanwhile."""
    returned_bytes: int
    """By how much the file became smaller, or what it has free became less."""


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


def _steady(filled: Path, rows_before: int) -> Steady:
    """Have the collector take a steady stream into a copy of ``filled``."""
    with rig() as setup:
        broker = _collector_on(setup, filled, "steady", f"--seconds={STEADY_S}", rows_before)
        pruned_before, free_before = setup.spool_counter("pruned"), _free_bytes(setup)
        broker.say("go")
        said = result(broker)
        pruned = setup.spool_counter("pruned") - pruned_before
        if setup.spool_counter("spooled") != rows_before + said["sent"]:
            raise BenchError("not all that was acknowledged is spooled")
        return Steady(said["took_ms"], pruned, free_before - _free_bytes(setup))


def _flood(filled: Path, rows_before: int, count: int) -> tuple[float, int]:
    """Have the collector take ``count`` at full speed; return messages per second and rows gone."""
    with rig() as setup:
        broker = _collector_on(setup, filled, "flood", f"--count={count}", rows_before)
        pruned_before = setup.spool_counter("pruned")
        broker.say("go")
        said = result(broker)
        return count / said["seconds"], setup.spool_counter("pruned") - pruned_before


def _collector_on(setup: Rig, filled: Path, mode: str, how_much: str, first: int) -> Process:
    shutil.copytree(filled, setup.spool_dir)
    os.sync()  # or the copy is written back while the commits are timed
    broker, port = wire_broker(setup, mode, how_much, f"--first={first}")
    # Each commit at once: what is timed is the commit, not the wait for it.
    settings = {"APP_ENV": APP_ENV, "MQTT_PORT": str(port), **WITHOUT_SINKS, **NAMES, **AT_ONCE}
    setup.collector(**settings)
    return broker


def _free_bytes(setup: Rig) -> int:
    path = spool_path(setup.spool_dir)
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as conn:
        (pages,) = conn.execute("PRAGMA freelist_count").fetchone()
        (page_bytes,) = conn.execute("PRAGMA page_size").fetchone()
    return int(pages) * int(page_bytes)


def _spools(root: Path, count: int) -> dict[str, Path]:
    """Make three spools of as many rows: all due to be pruned, none, and all pruned just now."""
    for name, age_s in (("due", OLD_S), ("young", 0.0), ("pruned", OLD_S)):
        fill(root / name, count, age_s=age_s)
    writer = SpoolWriter.open(root / "pruned")
    for seq in range(DELETE_STEP_ROWS, count + DELETE_STEP_ROWS, DELETE_STEP_ROWS):
        writer.delete_through(min(seq, count), "pruned")
    writer.checkpoint()
    writer.close()
    return {name: root / name for name in ("due", "young", "pruned")}


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 12."""
    spooled = count * PRUNED_ROWS_PER_COUNT
    what = (
        "99th percentile from PUBLISH to PUBACK, 20 messages each 10 ms, spool of "
        f"{spooled:,} rows: while"
    )
    pruning = Row("prune", f"{what} they are pruned ÷ without a prune", "ms", "<= 1.5")
    returning = Row("prune-return", f"{what} freed space is handed back ÷ without", "ms", "<= 1.5")
    pace = Row(
        "prune-pace",
        f"rows pruned ÷ readings taken, {count:,} readings at full speed, {spooled:,} rows due",
        "rows",
        ">= 1.0",
    )
    speed = Row("prune-speed", "the same: readings taken while pruning ÷ without", "msg/s", "")
    with TemporaryDirectory(prefix="sluice-bench-") as name:
        spools = _spools(Path(name), spooled)
        for _ in range(rounds):
            reference = _steady(spools["young"], spooled)
            for row, kind in ((pruning, "due"), (returning, "pruned")):
                ours = _steady(spools[kind], spooled)
                if not (ours.pruned if row is pruning else ours.returned_bytes > 0):
                    raise BenchError(f"nothing of it happened: {ours.pruned} rows went")
                row.ours.append(percentile(ours.took_ms, 0.99))
                row.reference.append(percentile(reference.took_ms, 0.99))
                row.notes.append(
                    f"{len(ours.took_ms):,} messages; median {percentile(ours.took_ms, 0.5):.2f} "
                    f"ms, without {percentile(reference.took_ms, 0.5):.2f} ms; "
                    f"{ours.pruned / STEADY_S:,.0f} rows pruned a second, "
                    f"{ours.returned_bytes / 1e6:,.0f} MB handed back"
                )
            per_s, gone = _flood(spools["due"], spooled, count)
            pace.ours.append(gone)
            pace.reference.append(count)
            speed.ours.append(per_s)
            speed.reference.append(_flood(spools["young"], spooled, count)[0])
    return [pruning, returning, pace, speed]


def ceiling_rows(rounds: int, count: int) -> list[Row]:
    """Return what the collector takes, and plain paho, when no broker stands in their way."""
    row = Row(
        "collector-ceiling",
        f"collector, {count:,} readings from a broker of prebuilt packets, each synced before its "
        "PUBACK, acknowledged in order ÷ a plain paho subscriber that stores nothing",
        "msg/s",
        "",
    )
    for _ in range(rounds):
        ours, theirs = _collector_flooded(count), _paho_flooded(count)
        row.ours.append(ours.per_s)
        row.cpu_us.append(ours.cpu_us)
        row.rss_mb.append(ours.rss_mb)
        row.reference.append(theirs.per_s)
        row.notes.append(f"CPU of the reference: {theirs.cpu_us:.1f} µs a message")
    return [row]


def _collector_flooded(count: int) -> Run:
    with rig() as setup:
        broker, port = wire_broker(setup, "flood", f"--count={count}")
        environ = {"APP_ENV": "LOCAL", "MQTT_PORT": str(port), **WITHOUT_SINKS}
        run = _flooded(broker, setup.collector(**environ), count)
        if setup.spool_counter("spooled") != count:
            raise BenchError("not all that was acknowledged is spooled")
        return run


def _paho_flooded(count: int) -> Run:
    with rig() as setup:
        broker, port = wire_broker(setup, "flood", f"--count={count}")
        # One more than will come: it would leave before its last acknowledgement.
        arguments = ["bench.paho_subscriber", str(port), str(count + 1)]
        subscriber = setup.start(Process.python("paho", arguments, setup.directory))
        subscriber.wait_output("subscribed", START_TIMEOUT_S)
        return _flooded(broker, subscriber, count)


def _flooded(broker: Process, client: Process, count: int) -> Run:
    before = client.usage()
    broker.say("go")
    said = result(broker)
    after = client.usage()
    if not said["in_order"]:
        raise BenchError("the acknowledgements came out of order")
    cpu_us = (after.cpu_s - before.cpu_s) * 1e6 / count
    return Run(count / said["seconds"], cpu_us, after.rss_bytes / 1e6)
