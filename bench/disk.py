"""Row 11: bytes written to the disk per byte of payload that is spooled, delivered and pruned.

At a usual rate each reading comes alone, and what a commit and a cursor cost is shared by few. At
full speed it is shared by thousands. So the rates are measured apart, with readings that come one
by one, as from sensors, and not in bursts. COMMIT_DELAY_MS is at its default, and at 0 for the
figures that are to be compared with those of earlier releases.
"""

import time

from bench.latency import AT_ONCE, DELAY_VARIABLE
from bench.processes import BenchError, Process
from bench.publish import reading, reading_at
from bench.report import Row
from bench.rig import START_TIMEOUT_S, rig, wait_for
from bench.system import System

RATES = (200.0, 1_000.0, 2_000.0)
SECONDS_AT_RATE = 15
RUN_TIMEOUT_S = 600.0
LOOK_EVERY_S = 0.1
SETTLE_S = 3.0
"""The last cursors and snapshots, which a system that goes on would write for more rows."""


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 11: at usual rates, and at full speed."""
    what = (
        "all three processes: bytes to the disk (/proc/PID/io) per byte of payload, readings "
        "spooled, delivered to both services, pruned"
    )
    paced = {
        rate: Row(f"disk-{rate:.0f}", f"{what}, {rate:,.0f}/s one by one", "bytes", "")
        for rate in RATES
    }
    at_once = {
        rate: Row(f"disk-{rate:.0f}-at-once", f"{row.what}, {DELAY_VARIABLE} 0", "bytes", "")
        for rate, row in paced.items()
    }
    full = Row("disk-full-speed", f"{what}, {count:,} at full speed", "bytes", "")
    for _ in range(rounds):
        for rate, row in paced.items():
            few = min(count, int(rate * SECONDS_AT_RATE))
            _one_run(row, few, rate)
            _one_run(at_once[rate], few, rate, **AT_ONCE)
        _one_run(full, count, 0.0)
    return [*paced.values(), *at_once.values(), full]


def _one_run(row: Row, count: int, rate: float, **settings: str) -> None:
    with rig() as setup:
        system = System.start(setup, settings={"SPOOL_RETENTION_HOURS": "0"} | settings)
        publisher = None if rate else setup.publisher(count)
        before = {name: p.usage() for name, p in system.processes.items()}
        begun = time.perf_counter()
        if publisher is None:
            arguments = ["bench.live_publisher", str(setup.broker_port), str(count), str(rate)]
            live = setup.start(Process.python("live", arguments, setup.directory))
            if live.wait(START_TIMEOUT_S + count / rate) != 0:
                raise BenchError(f"the publisher failed: {live.output()}")
        else:
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
        readings = (
            reading_at(n, time.time_ns() // 1000) if rate else reading(n) for n in range(count)
        )
        payload_bytes = sum(len(payload) for _, payload in readings)
        shares = {
            name: (after[name].written_bytes - before[name].written_bytes) / payload_bytes
            for name in after
        }
        row.ours.append(sum(shares.values()))
        row.cpu_us.append(
            sum(after[name].cpu_s - before[name].cpu_s for name in after) * 1e6 / count
        )
        row.rss_mb.append(sum(usage.rss_bytes for usage in after.values()) / 1e6)
        parts = ", ".join(
            f"{name} {share:.2f} bytes, "
            f"{100 * (after[name].cpu_s - before[name].cpu_s) / seconds:.1f} % of a core"
            for name, share in shares.items()
        )
        row.notes.append(f"{parts}; {count / seconds:,.0f} readings/s until all were pruned")
