"""Rows 6 and 7: what ten million readings of backlog change. Nothing, if all is well.

The spool with the backlog is made once and kept in the directory for temporary files
(``SLUICE_BENCH_KEEP`` names another, ``SLUICE_BENCH_BACKLOG`` another number of readings); each
ingest adds to it. A drain begins behind the backlog, at a cursor that leaves as many readings
as the drain of the small spool has.
"""

import os
import shutil
import sqlite3
import statistics
import subprocess
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from bench.drain import forwarder
from bench.fill import APP_ENV, fill
from bench.processes import BenchError, Process
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for
from bench.servers import NAMES, TABLE_REF, PubSub, bigquery_environ, fake_bigquery, fake_pubsub
from lifecycle import SINKS
from spool import Settlement, SinkState, SpoolReader, sink_path, spool_path

BACKLOG_ROWS = int(os.environ.get("SLUICE_BENCH_BACKLOG", "10000000"))
RUN_TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.02
VIEW_REPEATS = 15
KEPT_FOR_EVER = {"SPOOL_RETENTION_HOURS": "87600", "SPOOL_MAX_BYTES": "100GiB"}
VIEW_LIMIT_MS = 20
START_LIMIT_S = 1.5


def kept_spool() -> Path:
    """Return the spool with the backlog; make it if it is not there."""
    root = Path(os.environ.get("SLUICE_BENCH_KEEP", tempfile.gettempdir()))
    directory = root / f"sluice-bench-backlog-{BACKLOG_ROWS}"
    fill(directory, BACKLOG_ROWS)
    os.sync()
    return directory


def last_seq(directory: Path) -> int:
    """Return the last seq of a spool; 0 where there is none yet."""
    if not spool_path(directory).exists():
        return 0
    reader = SpoolReader.open(directory)
    try:
        return reader.last_seq()
    finally:
        reader.close()


def _forget_sinks(directory: Path) -> None:
    for sink in SINKS:
        for path in directory.glob(f"{sink_path(directory, sink).name}*"):
            path.unlink()


@dataclass(frozen=True)
class Ingest:
    """One run of the collector."""

    per_s: float
    cpu_us: float
    rss_mb: float


def ingest(spool_dir: Path | None, count: int) -> Ingest:
    """Have the collector take ``count`` new readings into a kept spool, or into a new one."""
    with rig() as setup:
        setup.spool_dir = spool_dir or setup.spool_dir
        _forget_sinks(setup.spool_dir)
        # New numbers: what the collector remembers of the last run would be duplicates.
        first = last_seq(setup.spool_dir)
        setup.broker()
        collector = setup.collector(APP_ENV=APP_ENV, **NAMES, **KEPT_FOR_EVER)
        had = setup.spool_counter("spooled")
        publisher = setup.publisher(count, first)
        before = collector.usage()
        begun = time.perf_counter()
        publisher.say("go")
        wait_for(
            lambda: setup.spool_counter("spooled") >= had + count,
            "all are spooled",
            RUN_TIMEOUT_S,
            LOOK_EVERY_S,
        )
        seconds = time.perf_counter() - begun
        after = collector.usage()
        collector.stop()
        if (last := last_seq(setup.spool_dir)) != first + count:
            raise BenchError(f"the last seq is {last}, not {first + count}")
        cpu_us = (after.cpu_s - before.cpu_s) * 1e6 / count
        return Ingest(count / seconds, cpu_us, after.rss_bytes / 1e6)


def drain(spool_dir: Path | None, server: PubSub, count: int) -> Ingest:
    """Drain the last ``count`` readings of a kept spool, or all of a new one."""
    with rig() as setup:
        if spool_dir is None:
            fill(setup.spool_dir, count)
        setup.spool_dir = spool_dir or setup.spool_dir
        _forget_sinks(setup.spool_dir)
        first = last_seq(setup.spool_dir) - count
        _set_cursor(setup, first)
        os.sync()
        topic = server.new_topic()
        run = forwarder(setup, "pubsub", count, first, server.environ(topic))
        if (arrived := server.count(topic, count)) != count:
            raise BenchError(f"{arrived} of {count} arrived")
        return Ingest(run.per_s, run.cpu_us, run.rss_mb)


def _set_cursor(setup: Rig, seq: int) -> None:
    reader = SpoolReader.open(setup.spool_dir)
    epoch = reader.epoch
    reader.close()
    state = SinkState.open(setup.spool_dir, "pubsub")
    state.settle(Settlement(epoch, seq))
    state.close()


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 6: ingest and drain."""
    kept = kept_spool()
    made = [
        Row(
            f"backlog-{what}",
            f"{text}, {count:,} readings, with {BACKLOG_ROWS:,} rows of backlog ÷ with an empty "
            "spool",
            "msg/s",
            ">= 0.95",
        )
        for what, text in (("ingest", "ingest"), ("drain", "drain to Pub/Sub (in-repo fake)"))
    ]
    with fake_pubsub() as server:
        for _ in range(rounds):
            pairs = (
                (ingest(kept, count), ingest(None, count)),
                (drain(kept, server, count), drain(None, server, count)),
            )
            for row, (full, empty) in zip(made, pairs, strict=True):
                row.ours.append(full.per_s)
                row.reference.append(empty.per_s)
                row.cpu_us.append(full.cpu_us)
                row.rss_mb.append(full.rss_mb)
    return made


def look_rows(rounds: int, _count: int) -> list[Row]:
    """Return row 7: the view, and each process's start."""
    kept = kept_spool()
    view = Row(
        "backlog-view",
        f"the view backlog by sqlite3 -readonly, everything running, {BACKLOG_ROWS:,} rows; what "
        "the command takes for `select 1` is subtracted",
        "ms",
        f"<= {VIEW_LIMIT_MS}",
    )
    starts = {
        name: Row(
            f"start-{name}",
            f"{name}: from its start until it works, {BACKLOG_ROWS:,} rows spooled",
            "s",
            f"<= {START_LIMIT_S}",
        )
        for name in ("collector", "forwarder-pubsub", "forwarder-bigquery")
    }
    for _ in range(rounds):
        with rig() as setup, fake_pubsub() as server:
            setup.spool_dir = kept
            _forget_sinks(kept)
            setup.broker()
            for name, seconds in _started(setup, server).items():
                starts[name].ours.append(seconds)
            view.ours.append(_view_ms(setup))
    return [view, *starts.values()]


def _started(setup: Rig, server: PubSub) -> dict[str, float]:
    """Start all three, one after the other; return how long each took."""
    bigquery = fake_bigquery(setup.directory)
    setup.start(bigquery.process)
    # The forwarders stand still at their first batch's pace, so the backlog stays.
    environ = {
        **bigquery_environ(bigquery),
        **server.environ(server.new_topic()),
        "APP_ENV": APP_ENV,
        "MAX_DRAIN_RATE": "100",
        **KEPT_FOR_EVER,
    }
    took = {}
    begun = time.perf_counter()
    setup.collector(**environ)
    took["collector"] = time.perf_counter() - begun
    for sink in SINKS:
        begun = time.perf_counter()
        process: Process = setup.forwarder(sink, **{**environ, "LOG_LEVEL": "INFO"})
        process.wait_output('"draining"', START_TIMEOUT_S)
        took[f"forwarder-{sink}"] = time.perf_counter() - begun
    wait_for(
        lambda: bigquery.counts()["tables"][TABLE_REF] > 0,
        "BigQuery receives",
        START_TIMEOUT_S,
        LOOK_EVERY_S,
    )
    return took


def _view_ms(setup: Rig) -> float:
    """Return the median of what the view takes beyond the command's own start."""
    binary = shutil.which("sqlite3")
    if binary is None:
        raise BenchError("sqlite3 is not installed: apt-get install sqlite3")
    path = spool_path(setup.spool_dir)
    wait_for(lambda: _pending(path) >= BACKLOG_ROWS // 2, "the view tells the backlog", 10.0, 0.2)

    def timed(statement: str) -> float:
        begun = time.perf_counter()
        subprocess.run([binary, "-readonly", str(path), statement], check=True, capture_output=True)  # noqa: S603 - our own argument list
        return (time.perf_counter() - begun) * 1e3

    differences = [timed("select * from backlog") - timed("select 1") for _ in range(VIEW_REPEATS)]
    return statistics.median(differences)


def _pending(path: Path) -> int:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as conn:
        rows = conn.execute("SELECT pending FROM backlog").fetchall()
    return min((int(row[0]) for row in rows), default=0) if len(rows) == 2 else 0  # noqa: PLR2004 - both sinks
