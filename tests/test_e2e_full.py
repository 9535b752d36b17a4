"""A full spool and a full disk: nothing is lost with block, what is dropped is counted."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, IMPATIENT, Rig, assert_adds_up, wait_until

SMALL = "1MiB"
READINGS = 6_000
"""About twice what SMALL holds."""

TIMEOUT_S = 60.0
DISK_MIB = 24
STEP = 500


def health(rig: Rig) -> set[str]:
    return {name for (name,) in rig.books.rows("spool", "SELECT name FROM health")}


def test_block_takes_nothing_more_until_there_is_room_and_loses_nothing() -> None:
    with Rig(forwarder=IMPATIENT, SPOOL_MAX_BYTES=SMALL) as rig:
        rig.cloud.stop()
        rig.start()
        rig.publish(READINGS)
        rig.programs[COLLECTOR].wait_for_log("the spool is full: no message is acknowledged")
        spooled = rig.books.counter("spooled")
        assert 0 < spooled < READINGS
        assert (rig.spool_dir / "spool.db").stat().st_size < 1.5 * 2**20
        assert rig.programs[COLLECTOR].running
        wait_until(lambda: "spool_full" in health(rig), TIMEOUT_S, "health says so")
        rig.cloud.start()
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        wait_until(lambda: not health(rig), TIMEOUT_S, "health is empty again")
        log = rig.programs[COLLECTOR].log_text
        assert "there is room again" in log
        assert log.count('"message": "started"') == 1, "it went on by itself"


def test_a_stop_while_the_spool_is_full_is_quick_and_loses_nothing() -> None:
    with Rig(forwarder=IMPATIENT, SPOOL_MAX_BYTES=SMALL) as rig:
        rig.cloud.stop()
        rig.start()
        rig.publish(READINGS)
        collector = rig.programs[COLLECTOR]
        collector.wait_for_log("the spool is full")
        code, seconds = collector.stop()
        assert code == 0
        assert seconds < 10
        rig.cloud.start()
        rig.start(COLLECTOR)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()


def test_drop_oldest_keeps_taking_and_each_sink_counts_what_it_lost() -> None:
    with Rig(forwarder=IMPATIENT, SPOOL_MAX_BYTES=SMALL, SPOOL_FULL_POLICY="drop-oldest") as rig:
        rig.cloud.pubsub.stop()
        rig.start()
        for _ in range(READINGS // STEP):
            # A healthy sink keeps up; at full speed it would lose its share of the oldest too.
            rig.publish(STEP)
            rig.wait_until_delivered("bigquery")
        rig.cloud.pubsub.start()
        rig.wait_until_delivered()
        figures = assert_adds_up(rig.books, rig.sinks)
        assert figures.spooled == READINGS
        lost = figures.sinks["pubsub"].dropped
        assert 0 < lost < READINGS
        assert figures.sinks["bigquery"].dropped == 0
        newest = {s.number for s in rig.publisher.samples[-100:]}
        assert newest <= {one.number for one in rig.cloud.received("pubsub")}
        gaps = rig.books.rows("pubsub", "SELECT last_seq - first_seq + 1, reason FROM gap")
        assert sum(gap[0] for gap in gaps) == lost
        assert "drop-oldest" in gaps[0][1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is quickly full."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = f"size={DISK_MIB}m,mode=0755"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("a file system can be mounted by root only")  # its own machine, in CI
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_is_survived_without_a_restart(small_disk: Path) -> None:
    spool_dir = small_disk / "spool"
    spool_dir.mkdir(mode=0o2750)
    os.chown(spool_dir, -1, 65_534)
    with Rig(forwarder=IMPATIENT, SPOOL_DIR=str(spool_dir), BIGQUERY_ENABLED="false") as rig:
        rig.books.directory = spool_dir
        rig.start()
        rig.publish(100)
        rig.wait_until_delivered("pubsub")
        hog = small_disk / "hog"
        filled = subprocess.run(
            ["dd", "if=/dev/zero", f"of={hog}", "bs=4k"], check=False, capture_output=True
        )
        assert b"No space left" in filled.stderr
        rig.publish(READINGS)
        collector = rig.programs[COLLECTOR]
        collector.wait_for_log("the disk is full")
        assert collector.running
        wait_until(lambda: "disk_full" in health(rig), TIMEOUT_S, "health says so")
        hog.unlink()
        rig.wait_until_delivered("pubsub")
        rig.assert_nothing_lost()
        wait_until(lambda: not health(rig), TIMEOUT_S, "health is empty again")
        assert collector.log_text.count('"message": "started"') == 1


def test_a_stop_while_the_disk_is_full_is_clean(small_disk: Path) -> None:
    spool_dir = small_disk / "spool"
    spool_dir.mkdir(mode=0o2750)
    with Rig(APP_ENV="LOCAL", SPOOL_DIR=str(spool_dir)) as rig:
        rig.books.directory = spool_dir
        rig.start(COLLECTOR)
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={small_disk / 'hog'}", "bs=4k"],
            check=False,
            capture_output=True,
        )
        rig.publish(READINGS)
        collector = rig.programs[COLLECTOR]
        collector.wait_for_log("the disk is full")
        code, seconds = collector.stop()
        assert code == 0
        assert seconds < 10
        (small_disk / "hog").unlink()
        rig.start(COLLECTOR)
        rig.wait_until_spooled()
        # The counters of a commit that failed are those of the rows that it did not store.
        assert assert_adds_up(rig.books, ()).spooled == READINGS
