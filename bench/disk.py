"""Row 11: bytes written to the disk per byte of payload that is spooled, delivered and pruned."""

import time

from bench.processes import BenchError
from bench.publish import reading
from bench.report import Row
from bench.rig import rig, wait_for
from bench.system import System

RATE = 2_000.0
SECONDS_AT_RATE_MAX = 20
RUN_TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.1
SETTLE_S = 3.0
"""The last cursors and snapshots, which a system that goes on would write for more rows."""


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 11: at a usual rate, and at full speed."""
    few = min(count, int(RATE * SECONDS_AT_RATE_MAX))
    paced = Row(
        "disk-paced",
        f"all three processes: bytes to the disk (/proc/PID/io) per byte of payload, {few:,} "
        f"readings at {RATE:,.0f}/s, spooled, delivered to both services, pruned",
        "bytes",
        "",
    )
    full = Row("disk-full-speed", f"the same, {count:,} readings at full speed", "bytes", "")
    for _ in range(rounds):
        _one_run(paced, few, RATE)
        _one_run(full, count, 0.0)
    return [paced, full]


def _one_run(row: Row, count: int, rate: float) -> None:
    with rig() as setup:
        system = System.start(setup, SPOOL_RETENTION_HOURS="0")
        publisher = setup.publisher(count, rate=rate)
        before = {name: p.usage() for name, p in system.processes.items()}
        begun = time.perf_counter()
        publisher.say("go")
        system.wait_delivered(count, RUN_TIMEOUT_S)
        wait_for(
            lambda: setup.spool_counter("pruned") >= count,
            "all are pruned",
            RUN_TIMEOUT_S,
            LOOK_EVERY_S,
        )
        seconds = time.perf_counter() - begun
        time.sleep(SETTLE_S)
        after = {name: p.usage() for name, p in system.processes.items()}
        system.check(count)
        if setup.spool_counter("pruned") != count:
            raise BenchError("more was pruned than was there")
        payload_bytes = sum(len(reading(number)[1]) for number in range(count))
        shares = {
            name: (after[name].written_bytes - before[name].written_bytes) / payload_bytes
            for name in after
        }
        row.ours.append(sum(shares.values()))
        row.cpu_us.append(
            sum(after[name].cpu_s - before[name].cpu_s for name in after) * 1e6 / count
        )
        row.rss_mb.append(sum(usage.rss_bytes for usage in after.values()) / 1e6)
        parts = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        row.notes.append(f"{parts}; {count / seconds:,.0f} readings/s until all were pruned")
