"""Storage that fails: the coarse grid of the long sweep, and what it cannot hold."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, FORWARDERS, PROGRAMS, Program, Rig, assert_adds_up
from tests.torture import storage_faults
from tests.torture.report import Report

ROUNDS = int(os.environ.get("SLUICE_FAULT_ROUNDS", "21"))
"""Each is a fault for each of the three programs; 21 hold every action once."""

SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))
DISK_MIB = 24
FULL_READINGS = 6_000
ABORTED = -signal.SIGABRT
"""What gRPC does without a descriptor for its next poll; supervisord starts it again."""


needs_strace = pytest.mark.skipif(
    not storage_faults.available(), reason="strace cannot tamper with system calls here"
)


@needs_strace
@pytest.mark.timeout(ROUNDS * 20 + 120)
def test_a_fault_at_any_call_is_ridden_out_or_ends_with_75_and_nothing_is_lost() -> None:
    report = storage_faults.run(ROUNDS, SEED)
    print(report)  # noqa: T201 - pytest shows it with a failure
    assert report.violations == []
    assert report.rounds == ROUNDS
    assert report.counts["faults met"] > ROUNDS


@needs_strace
@pytest.mark.parametrize("role", FORWARDERS)
def test_a_read_error_that_passes_is_not_taken_for_corruption(role: str) -> None:
    """SQLite reports it as SQLITE_CORRUPT, at whichever page it happens."""
    report = Report("read errors", SEED)
    with storage_faults.system() as (rig, tap):
        storage_faults.start_whole(rig)
        assert storage_faults.settle(rig, tap, report) == []
        for which in (4, 5, 7, 9):
            fault = storage_faults.Fault("pread64", "error=EIO", str(which))
            assert storage_faults.live(rig, {role: fault}, report) == []
        assert report.counts["faults met"] > 1
        assert storage_faults.settle(rig, tap, report) == []


@needs_strace
def test_a_write_that_ends_within_a_page_is_no_commit_and_is_told_with_75() -> None:
    report = Report("writes in part", SEED)
    with storage_faults.system() as (rig, tap):
        storage_faults.start_whole(rig)
        assert storage_faults.settle(rig, tap, report) == []
        for steps in ("1", "30", "200"):
            fault = storage_faults.Fault("pwrite64", storage_faults.IN_PART, steps)
            assert storage_faults.live(rig, {COLLECTOR: fault}, report) == []
        assert report.counts["faults met"] == report.counts["exit 75"] == 3
        assert storage_faults.settle(rig, tap, report) == []


@needs_strace
def test_on_a_slow_disk_the_collector_keeps_up_by_larger_groups() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.broker.start()
        readings, syncs = storage_faults.slow_disk(rig)
        # At 200 ms a sync this is 500 a second, whatever the machine.
        assert readings / syncs > 100
        assert assert_adds_up(rig.books, ()).spooled == readings


@pytest.mark.parametrize("spare", [0, 1, 2, 4])
def test_running_out_of_file_descriptors_is_not_taken_for_corruption(spare: int) -> None:
    report = Report("descriptors", SEED)
    with storage_faults.system() as (rig, tap):
        storage_faults.start_whole(rig)
        rig.publish(100)
        rig.wait_until_spooled()
        for name in PROGRAMS:
            pid = rig.programs[name].pid
            limit = len(list(Path(f"/proc/{pid}/fd").iterdir())) + spare
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limit))
        # What opens files while it runs: connections, files that were replaced, the ballast.
        rig.cloud.stop()
        rig.broker.stop()
        rig.broker.start()
        rig.cloud.start()
        rig.publish(100)
        codes: set[int] = set()
        for name in PROGRAMS:
            if rig.programs[name].running:
                codes.add(rig.programs[name].stop()[0])
        assert codes <= {0, 75, ABORTED}
        assert storage_faults.settle(rig, tap, report) == []
        assert list(rig.spool_dir.glob("*.damaged-*")) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, for root."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = f"size={DISK_MIB}m,mode=0755"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("a file system can be mounted by root only")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_disk_that_became_read_only_is_waited_for_and_nothing_is_set_aside(
    small_disk: Path,
) -> None:
    spool_dir = small_disk / "spool"
    spool_dir.mkdir(mode=0o2750)
    os.chown(spool_dir, -1, 65_534)
    with Rig(SPOOL_DIR=str(spool_dir)) as rig:
        rig.books.directory = spool_dir
        rig.start()
        rig.publish(100)
        rig.wait_until_delivered()
        for name in (*FORWARDERS, COLLECTOR):
            rig.programs[name].stop()
        rig.publish(100)
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        for name in PROGRAMS:
            rig.programs[name].start()
            assert rig.programs[name].wait() == 75, rig.programs[name].log_text
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        assert list(spool_dir.glob("*.damaged-*")) == []
        rig.start()
        rig.wait_until_delivered()
        rig.assert_nothing_lost()


@needs_strace
def test_what_a_full_disk_takes_in_part_is_lost_in_no_file(small_disk: Path) -> None:
    """A page of the write-ahead log lies across two of the disk's, of which one is to be had."""
    spool_dir = small_disk / "spool"
    spool_dir.mkdir(mode=0o2750)
    os.chown(spool_dir, -1, 65_534)
    with Rig(SPOOL_DIR=str(spool_dir)) as rig:
        rig.books.directory = spool_dir
        logs = {name: rig.directory / f"{name}.strace" for name in PROGRAMS}
        for name, log in logs.items():
            prefix = storage_faults.watching(spool_dir, name, "pwrite64", log)
            command = [*prefix, *storage_faults.command(name)]
            rig.programs[name] = Program(name, command, rig.variables, rig.programs[name].log)
        rig.start()
        rig.publish(100)
        rig.wait_until_delivered()
        hog = small_disk / "hog"
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={hog}", "bs=4k"], check=False, capture_output=True
        )
        rig.publish(FULL_READINGS)
        rig.programs[COLLECTOR].wait_for_log("the disk is full")
        assert storage_faults.taken_in_part(logs[COLLECTOR])
        hog.unlink()
        # A forwarder may have ended with 75, as supervisord would see.
        for name in FORWARDERS:
            if not rig.programs[name].running:
                assert rig.programs[name].wait() == 75
                rig.programs[name].start()
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        assert list(spool_dir.glob("*.damaged-*")) == []
