"""Rows 3 and 4: from the disk to the services, beside the official clients."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime

from bench.fill import APP_ENV, fill
from bench.processes import BenchError, Process
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for
from bench.servers import (
    TABLE_REF,
    Fake,
    PubSub,
    bigquery_environ,
    fake_bigquery,
    fake_pubsub,
    pubsub_servers,
)
from spool import sink_path

RUN_TIMEOUT_S = 600.0
DISTANCE_MS = 20.0
"""What a service adds that is not on this machine: the way there and back, and its own work."""

LOOK_EVERY_S = 0.05
"""Each look opens the sink's file; more often would take time from what is measured."""


@dataclass(frozen=True)
class Run:
    """One drain."""

    per_s: float
    cpu_us: float
    rss_mb: float = 0.0
    service_us: float = 0.0
    """Processor time that the service took for each row; 0 where nobody looked."""


def draining_since(process: Process) -> float:
    """Return when the forwarder logged that it begins, in seconds since 1970."""
    text = process.wait_output('"draining"', START_TIMEOUT_S)
    for line in text.splitlines():
        if line.startswith("{") and (entry := json.loads(line))["message"] == "draining":
            return datetime.fromisoformat(entry["time"]).timestamp()
    raise BenchError(f"no line of {process.name} says 'draining':\n{text[-2000:]}")


def cursor(setup: Rig, sink: str) -> tuple[int, float]:
    """Return the sink's position, and when it was reached, in seconds since 1970."""
    path = sink_path(setup.spool_dir, sink)
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as conn:
        row = conn.execute("SELECT seq, updated_us FROM cursor").fetchone()
    return (int(row[0]), int(row[1]) / 1e6) if row else (0, 0.0)


def forwarder(setup: Rig, sink: str, count: int, first: int, environ: Mapping[str, str]) -> Run:
    """Have the forwarder drain what follows ``first``; from its first look to its last sync."""
    process = setup.forwarder(sink, APP_ENV=APP_ENV, LOG_LEVEL="INFO", **environ)
    begun = draining_since(process)
    before = process.usage()
    wait_for(
        lambda: cursor(setup, sink)[0] >= first + count,
        f"the cursor of {sink} stands at {first + count}",
        RUN_TIMEOUT_S,
        LOOK_EVERY_S,
    )
    after = process.usage()
    seq, ended = cursor(setup, sink)
    delivered = setup.sink_counter(sink)
    dead = setup.sink_counter(sink, "dead_lettered") + setup.sink_counter(sink, "dropped")
    if (seq, delivered, dead) != (first + count, count, 0):
        raise BenchError(f"{sink}: cursor {seq}, delivered {delivered} of {count}, lost {dead}")
    cpu_us = (after.cpu_s - before.cpu_s) * 1e6 / count
    return Run(count / (ended - begun), cpu_us, after.rss_bytes / 1e6)


def reference(setup: Rig, arguments: list[str], count: int, **environ: str) -> Run:
    """Run a reference program, which prepares its messages and prints its seconds."""
    name = arguments[0].rpartition(".")[2]
    process = setup.start(Process.python(name, arguments, setup.directory, environ))
    process.wait_output("ready", RUN_TIMEOUT_S)
    process.say("go")
    process.wait_output("done ", RUN_TIMEOUT_S)
    seconds, cpu_s = map(float, process.output().rpartition("done ")[2].split())
    return Run(count / seconds, cpu_s * 1e6 / count)


def to_pubsub(server: PubSub, count: int) -> Run:
    """Fill a spool and drain it to a new topic of ``server``."""
    with rig() as setup:
        fill(setup.spool_dir, count)
        topic = server.new_topic()
        run = forwarder(setup, "pubsub", count, 0, server.environ(topic))
        _all_arrived(server.count(topic, count), count, "the forwarder")
        return run


def official_pubsub(server: PubSub, count: int) -> Run:
    """Publish the same with the official client."""
    with rig() as setup:
        topic = server.new_topic()
        run = reference(
            setup,
            ["bench.official_publisher", topic, str(count)],
            count,
            PUBSUB_EMULATOR_HOST=server.address,
        )
        _all_arrived(server.count(topic, count), count, "the official publisher")
        return run


def ready_made_pubsub(server: PubSub, count: int) -> Run:
    """Publish the same in requests made beforehand."""
    with rig() as setup:
        topic = server.new_topic()
        arguments = ["bench.ready_made", "pubsub", server.address, topic, str(count)]
        run = reference(setup, arguments, count)
        _all_arrived(server.count(topic, count), count, "the ready-made requests")
        return run


def to_bigquery(count: int, delay_ms: float = 0.0, method: str = "insert_all") -> Run:
    """Fill a spool and drain it to a new fake of BigQuery."""
    with rig() as setup:
        fill(setup.spool_dir, count)
        fake = fake_bigquery(setup.directory, delay_ms=delay_ms)
        setup.start(fake.process)
        environ = {**bigquery_environ(fake), "BIGQUERY_WRITE_METHOD": method}
        before_s = fake.process.usage().cpu_s
        run = forwarder(setup, "bigquery", count, 0, environ)
        return _with_service(run, fake, before_s, count)


def plain_bigquery(count: int, delay_ms: float = 0.0) -> Run:
    """Insert the same rows in a plain loop."""
    with rig() as setup:
        fake = fake_bigquery(setup.directory, delay_ms=delay_ms)
        setup.start(fake.process)
        url = f"http://127.0.0.1:{fake.port}"
        before_s = fake.process.usage().cpu_s
        run = reference(setup, ["bench.insert_rows_loop", url, TABLE_REF, str(count)], count)
        return _with_service(run, fake, before_s, count)


def ready_made_bigquery(count: int) -> Run:
    """Insert the same rows in requests made beforehand."""
    with rig() as setup:
        fake = fake_bigquery(setup.directory)
        setup.start(fake.process)
        before_s = fake.process.usage().cpu_s
        arguments = ["bench.ready_made", "bigquery", f"127.0.0.1:{fake.port}", TABLE_REF]
        run = reference(setup, [*arguments, str(count)], count)
        return _with_service(run, fake, before_s, count)


def _with_service(run: Run, fake: Fake, before_s: float, count: int) -> Run:
    """Return the run with what it cost the service, which must have received all of it."""
    service_us = (fake.process.usage().cpu_s - before_s) * 1e6 / count
    _all_arrived(fake.counts()["tables"][TABLE_REF], count, "a client of BigQuery")
    return replace(run, service_us=service_us)


def _all_arrived(arrived: int, count: int, who: str) -> None:
    if arrived != count:
        raise BenchError(f"{arrived} of {count} messages of {who} arrived")


def _add(row: Row, ours: Run, theirs: Run) -> None:
    row.ours.append(ours.per_s)
    row.reference.append(theirs.per_s)
    row.cpu_us.append(ours.cpu_us)
    row.rss_mb.append(ours.rss_mb)
    row.notes[1:] = [f"CPU of the reference: {theirs.cpu_us:.1f} µs a message (last round)"]


def pubsub_rows(rounds: int, count: int) -> list[Row]:
    """Return row 3, one per server; and one for a service that is far away."""
    rows = []
    with pubsub_servers() as servers, fake_pubsub(DISTANCE_MS) as distant:
        for server in (*servers, distant):
            suffix = "" if server is servers[0] else "-emulator"
            row = Row(
                f"drain-pubsub{'-distant' if server is distant else suffix}",
                f"forwarder pubsub, {count:,} readings of 8 sites, ordered ÷ the official "
                "PublisherClient.publish() with ordering keys",
                "msg/s",
                "" if server is distant else ">= 10",
                notes=[f"server: {server.name}, counted there; cursor at the end"],
            )
            # The first run of a Java server is its slowest.
            official_pubsub(server, count)
            for _ in range(rounds):
                _add(row, to_pubsub(server, count), official_pubsub(server, count))
            rows.append(row)
    return rows


def ceiling_rows(rounds: int, count: int) -> list[Row]:
    """Return what the servers of rows 3 and 4 take of somebody who only sends."""
    rows = []
    what = f"{count:,} readings in requests made beforehand, nothing read, checked or noted ÷"
    with pubsub_servers() as servers:
        for server in servers:
            row = Row(
                f"ceiling-pubsub{'' if server is servers[0] else '-emulator'}",
                f"{what} the official PublisherClient.publish() with ordering keys",
                "msg/s",
                "",
                notes=[f"server: {server.name}, counted there"],
            )
            official_pubsub(server, count)
            for _ in range(rounds):
                _add(row, ready_made_pubsub(server, count), official_pubsub(server, count))
            rows.append(row)
    row = Row("ceiling-bigquery", f"{what} a plain loop of insert_rows_json", "rows/s", "")
    row.notes.append("server: in-repo fake, counted there")
    for _ in range(rounds):
        _add(row, ready_made_bigquery(count), plain_bigquery(count))
    return [*rows, row]


def bigquery_rows(rounds: int, count: int) -> list[Row]:
    """Return row 4, with the service on this machine, and with one that is far away."""
    return _bigquery_rows("drain-bigquery", "insert_all", ">= 3", rounds, count)


def storage_rows(rounds: int, count: int) -> list[Row]:
    """Return the same by the write API, exactly once."""
    return _bigquery_rows("drain-storage", "storage", ">= 5", rounds, count)


def _bigquery_rows(name: str, method: str, target: str, rounds: int, count: int) -> list[Row]:
    rows = []
    for delay_ms, suffix in ((0.0, ""), (DISTANCE_MS, "-distant")):
        late = f", answers {delay_ms:.0f} ms later" if delay_ms else ""
        row = Row(
            f"{name}{suffix}",
            f"forwarder bigquery by {method}, {count:,} readings ÷ a plain loop of "
            "insert_rows_json with 500 rows a call",
            "rows/s",
            target,
            notes=[f"server: in-repo fake{late}, counted there; cursor at the end"],
        )
        for _ in range(rounds):
            ours, theirs = to_bigquery(count, delay_ms, method), plain_bigquery(count, delay_ms)
            _add(row, ours, theirs)
            row.notes.append(
                f"CPU of the service: {ours.service_us:.1f} µs a row for ours, "
                f"{theirs.service_us:.1f} for the reference (last round)"
            )
        rows.append(row)
    return rows
