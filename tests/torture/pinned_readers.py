"""Readers that are left open: on any of the files, at any moment, several at a time.

In every round some ``sqlite3 -readonly`` processes read into pipes that are not read, while
readings come, and their log's owner is killed now and then. No reading may be lost, dropped or
refused for good; the log keeps to its bound; health and the log name the process; and when the
readers have ended everything goes on by itself.
"""

import random
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness import COLLECTOR, Rig, wait_until
from tests.harness.short_logs import KEPT_BYTES, pager, shorten
from tests.torture.report import Report

if TYPE_CHECKING:
    import subprocess

FILES = ("spool", "pubsub", "bigquery")
POLICIES = ("block", "drop-oldest")
SPOOL_MAX = "1MiB"
BOUND_BYTES = KEPT_BYTES + 2**20
OVERSHOOT_BYTES = 2**20
"""What one take of the inbox may bring over the bound, and what is written at it."""

STEP = 150
STEPS_MAX = 25
TIMEOUT_S = 60.0
AT_BOUND = "write-ahead log is at its bound"
_OWNERS = {"spool": COLLECTOR, "pubsub": "forwarder-pubsub", "bigquery": "forwarder-bigquery"}


def run(size: int, seed: int) -> Report:
    """Run ``size`` rounds."""
    report = Report("pinned_readers", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    for number in range(size):
        name, policy = FILES[number % len(FILES)], dice.choice(POLICIES)
        with Rig(SPOOL_MAX_BYTES=SPOOL_MAX, SPOOL_FULL_POLICY=policy) as rig:
            shorten(rig)
            rig.start()
            try:
                _round(rig, name, dice, report)
            except AssertionError as failure:
                report.violations.append(f"{name}.db, {policy}: {failure}")
        report.rounds += 1
        report.counts[f"{name}.db"] += 1
    return report


def _round(rig: Rig, name: str, dice: random.Random, report: Report) -> None:
    owner = rig.programs[_OWNERS[name]]
    path = rig.spool_dir / f"{name}.db"
    rig.publish(dice.randrange(1, 400))
    rig.wait_until_delivered()
    restarts = 0
    with ExitStack() as readers:
        open_now = [readers.enter_context(pager(path)) for _ in range(dice.randrange(1, 3))]
        for _ in range(STEPS_MAX):
            # What is taken is delivered before more comes: drop-oldest would drop it by right.
            rig.publish(STEP)
            wait_until(lambda: _settled(rig) or AT_BOUND in owner.log_text, TIMEOUT_S, "taken")
            if AT_BOUND in owner.log_text:
                break
            if not dice.randrange(8) and not restarts:
                restarts += 1
                owner.signal(signal.SIGKILL)
                owner.wait()
                owner.start()
            if not dice.randrange(6):
                open_now.append(readers.enter_context(pager(path)))
        if AT_BOUND in owner.log_text:
            report.counts["at the bound"] += 1
            _check_told(rig, name, open_now)
        log_bytes = _log(path).stat().st_size
        assert log_bytes < BOUND_BYTES + OVERSHOOT_BYTES, f"the log has {log_bytes} bytes"
        report.counts["readers"] += len(open_now)
        report.counts["kills"] += restarts
    rig.wait_until_delivered()
    rig.publish(STEP)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()
    figures = rig.books.figures()
    assert rig.books.counter("dropped") == 0, "dropped for the log's bytes"
    assert all(sink.dropped == 0 for sink in figures.sinks.values()), figures
    wait_until(lambda: _health(rig, name) == [], TIMEOUT_S, "health is empty again")
    wait_until(
        lambda: _log(path).stat().st_size <= KEPT_BYTES + OVERSHOOT_BYTES, TIMEOUT_S, "it shrinks"
    )
    report.counts["readings"] += figures.spooled


def _settled(rig: Rig) -> bool:
    figures = rig.books.figures()
    taken = figures.spooled == len(rig.publisher.acknowledged)
    return taken and all(sink.pending == 0 for sink in figures.sinks.values())


def _check_told(rig: Rig, name: str, readers: "list[subprocess.Popen[bytes]]") -> None:
    (shown,) = wait_until(
        lambda: [h for h in _health(rig, name) if h["severity"] == "CRITICAL"],
        TIMEOUT_S,
        "health says so",
    )
    assert any(f"process {r.pid} (sqlite3" in shown["detail"] for r in readers), shown
    lines = rig.programs[_OWNERS[name]].log_text.splitlines()
    assert any(f"process {r.pid} (sqlite3" in li for r in readers for li in lines if AT_BOUND in li)


def _health(rig: Rig, name: str) -> list[dict[str, str]]:
    return rig.books.as_operator("select * from health", name)


def _log(path: Path) -> Path:
    return path.with_name(path.name + "-wal")
