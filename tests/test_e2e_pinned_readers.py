"""A reader that is left open: no reading is lost for it, it is named, and all goes on after it."""

import time
from typing import TYPE_CHECKING

import pytest

from tests.harness import COLLECTOR, Rig, assert_adds_up, wait_until
from tests.harness.short_logs import KEPT_BYTES, pager, shorten

if TYPE_CHECKING:
    import subprocess

SMALL = "2MiB"
BOUND_BYTES = KEPT_BYTES + 2**21
RATE = 60
STEP = 300
AFTER_BOUND = 200
GOES_ON_S = 5.0
"""Two seconds on a machine of its own."""

STAYS_S = 2.0
"""Four stretched commits: that nothing happens has no event."""

TIMEOUT_S = 60.0
AT_BOUND = "write-ahead log is at its bound"


def health(rig: Rig, name: str) -> list[dict[str, str]]:
    return rig.books.as_operator("select * from health", name)


def log_bytes(rig: Rig, name: str) -> int:
    return (rig.spool_dir / f"{name}.db-wal").stat().st_size


def assert_names(text: str, reader: "subprocess.Popen[bytes]") -> None:
    assert f"process {reader.pid}" in text
    assert "sqlite3 -readonly" in text


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_a_reader_left_open_on_the_spool_loses_nothing_and_is_named(policy: str) -> None:
    with Rig(SPOOL_MAX_BYTES=SMALL, SPOOL_FULL_POLICY=policy) as rig:
        shorten(rig)
        rig.start()
        rig.publish(STEP)
        rig.wait_until_delivered()
        collector = rig.programs[COLLECTOR]
        with pager(rig.spool_dir / "spool.db") as reader:
            with rig.load(RATE):
                collector.wait_for_log("write-ahead log is pinned by a reader")
            assert log_bytes(rig, "spool") < BOUND_BYTES
            wait_until(
                lambda: [h["severity"] for h in health(rig, "spool")] == ["WARNING"],
                TIMEOUT_S,
                "health says so",
            )
            rig.wait_until_delivered()
            # What is taken is delivered before more comes: else drop-oldest would rightly drop.
            while AT_BOUND not in collector.log_text:
                rig.publish(STEP)
                wait_until(
                    lambda: (
                        AT_BOUND in collector.log_text
                        or rig.books.counter("spooled") == len(rig.publisher.acknowledged)
                    ),
                    TIMEOUT_S,
                    "the readings are taken, or the log is at its bound",
                )
            (critical,) = [line for line in collector.log_text.splitlines() if AT_BOUND in line]
            assert '"severity": "CRITICAL"' in critical
            assert_names(critical, reader)
            assert "cloud" not in critical
            (shown,) = wait_until(
                lambda: [h for h in health(rig, "spool") if h["severity"] == "CRITICAL"],
                TIMEOUT_S,
                "health says so",
            )
            assert shown["name"] == "log_pinned"
            assert_names(shown["detail"], reader)
            assert str(reader.pid) in shown["remedy"]
            spooled = rig.books.counter("spooled")
            rig.publish(AFTER_BOUND)
            until = time.monotonic() + STAYS_S
            while time.monotonic() < until:
                assert rig.books.counter("spooled") == spooled, "nothing is taken at the bound"
            assert collector.running
            assert log_bytes(rig, "spool") < BOUND_BYTES + 2**19
        wait_until(
            lambda: rig.books.counter("spooled") > spooled,
            GOES_ON_S,
            "it goes on by itself after the reader has ended",
        )
        wait_until(lambda: health(rig, "spool") == [], TIMEOUT_S, "health is empty again")
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        assert rig.books.counter("dropped") == 0
        assert log_bytes(rig, "spool") <= KEPT_BYTES + 2**19
        assert "write-ahead log is no longer pinned" in collector.log_text
        assert collector.log_text.count('"message": "started"') == 1
        assert all(s.dropped == 0 for s in assert_adds_up(rig.books, rig.sinks).sinks.values())


@pytest.mark.parametrize("sink", ["pubsub", "bigquery"])
def test_a_reader_left_open_on_a_sinks_file_holds_that_sink_alone(sink: str) -> None:
    other = {"pubsub": "bigquery", "bigquery": "pubsub"}[sink]
    with Rig(SPOOL_MAX_BYTES="512KiB", COMMIT_DELAY_MS="0") as rig:
        shorten(rig)
        rig.start()
        rig.publish(10)
        rig.wait_until_delivered()
        forwarder = rig.programs[f"forwarder-{sink}"]
        with pager(rig.spool_dir / f"{sink}.db") as reader, rig.load(100):
            forwarder.wait_for_log(AT_BOUND, 90.0)
            (shown,) = wait_until(
                lambda: [
                    h
                    for h in health(rig, sink)
                    if h["severity"] == "CRITICAL" and h["name"] == "log_pinned"
                ],
                TIMEOUT_S,
                "health says so",
            )
            assert_names(shown["detail"], reader)
            wait_until(lambda: rig.books.backlog(sink)["state"] == "on hold", TIMEOUT_S, "it holds")
            assert_names(rig.books.backlog(sink)["detail"], reader)
            delivered = rig.books.figures().sinks[sink].delivered
            taken = rig.books.figures().sinks[other].delivered
            wait_until(
                lambda: rig.books.figures().sinks[other].delivered > taken + 20,
                TIMEOUT_S,
                "the other sink is not affected",
            )
            assert rig.books.figures().sinks[sink].delivered == delivered
            assert health(rig, other) == []
            # That of the whole installation has this sink's rows and no others.
            rows = health(rig, "spool")
            assert {(row["subject"], row["name"]) for row in rows} == {
                (sink, "log_pinned"),
                (sink, "sink_on_hold"),
            }
        wait_until(
            lambda: rig.books.figures().sinks[sink].delivered > delivered,
            GOES_ON_S,
            "it goes on by itself after the reader has ended",
        )
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        wait_until(lambda: health(rig, sink) == [], TIMEOUT_S, "health is empty again")
        assert log_bytes(rig, sink) <= KEPT_BYTES + 2**19
        assert forwarder.log_text.count('"message": "started"') == 1
