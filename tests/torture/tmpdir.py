"""A temporary directory without room, for all three programs: nothing may depend on it.

SQLite's statement journals spill beyond 64 KiB to SQLITE_TMPDIR, which here is a full file system:
readings of a size drawn for each round come in bursts, while those of before are pruned.
"""

import json
import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import PROGRAMS, Packet, Rig
from tests.torture.report import Report

BURST_READINGS = 400
ROUNDS_PER_SYSTEM = 6
_SIZES_BYTES = (300, 500, 900, 2_000, 6_000, 20_000, 60_000)
_BURST_BYTES = 6 * 1024 * 1024
_RETENTION_HOURS = "0.0003"
"""A second: pruning goes with what comes."""

_ROOM = ("disk is full", "SQLITE_FULL", "disk I/O error")


@contextmanager
def full_directory() -> Iterator[Path]:
    """Give out a directory on a file system of its own that has not one byte left.

    Raises:
        PermissionError: Only root may mount one.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-tmp-") as name:
        mount = Path(name)
        command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", name]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            raise PermissionError("a file system can be mounted by root only")
        try:
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={mount / 'hog'}", "bs=4k"],
                check=False,
                capture_output=True,
            )
            yield mount
        finally:
            subprocess.run(["umount", "-l", name], check=True)


def run(size: int, seed: int) -> Report:
    """Run ``size`` rounds."""
    report = Report("tmpdir", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    with full_directory() as full:
        while report.rounds < size:
            _system(full, min(ROUNDS_PER_SYSTEM, size - report.rounds), dice, report)
    return report


def _system(full: Path, rounds: int, dice: random.Random, report: Report) -> None:
    with Rig(
        SQLITE_TMPDIR=str(full), TMPDIR=str(full), SPOOL_RETENTION_HOURS=_RETENTION_HOURS
    ) as rig:
        rig.start()
        for _ in range(rounds):
            payload_bytes = dice.choice(_SIZES_BYTES)
            count = min(BURST_READINGS * 4, _BURST_BYTES // payload_bytes)
            rig.publisher.publish(padded(rig, count, payload_bytes))
            try:
                rig.wait_until_delivered()
            except AssertionError as failure:
                report.violations.append(f"{count} readings of {payload_bytes} bytes: {failure}")
                return
            report.rounds += 1
            report.counts["readings"] += count
        report.counts["pruned"] += rig.books.counter("pruned")
        try:
            rig.assert_nothing_lost()
        except AssertionError as failure:
            report.violations.append(str(failure))
        for name in PROGRAMS:
            program = rig.programs[name]
            if not program.running:
                report.violations.append(f"{name} has ended")
            report.violations += [
                f"{name}: {line}"
                for line in program.log_text.splitlines()
                if any(text in line for text in _ROOM)
            ]


def padded(rig: Rig, count: int, payload_bytes: int) -> list[Packet]:
    """Return the plant's next readings, each of about ``payload_bytes``."""
    packets = []
    for sample in rig.plant.samples(count):
        content = json.loads(sample.payload) | {"pad": "x" * max(0, payload_bytes - 180)}
        packets.append(Packet(sample.topic.encode(), json.dumps(content).encode(), sample=sample))
    return packets
