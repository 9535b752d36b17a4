"""A real Mosquitto with small windows: waiting for more must not let its queue overflow.

Beyond ``max_queued_messages`` a broker drops what it has already acknowledged to the sensors. Who
sits out COMMIT_DELAY_MS at a full window is sent one window per delay. In most cases that is less
than the sensors send here, and their queue is too short for the rest.
"""

import re
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, Rig, assert_adds_up, wait_until

RUN_TIMEOUT_S = 60.0
SPOOLED_TIMEOUT_S = 15.0
BURST = 200
BURSTS = 8
BURST_EVERY_S = 0.5
CONNECTED = '"message": "connected"'
GATHERED = 10
"""So many readings at the least share a commit where the window holds more."""


@dataclass(frozen=True)
class Case:
    """One broker, one delay, and sensors that send more than one window per delay."""

    window: int
    delay_ms: int
    rate: int
    readings: int
    queued: int
    """``max_queued_messages``: what some two seconds bring, for a machine that has more to do."""

    def __str__(self) -> str:
        """Name the test."""
        return f"{self.window}-window-{self.delay_ms}-ms"

    def options(self) -> dict[str, str | None]:
        """Return the broker's options."""
        return {
            "max_inflight_messages": str(self.window),
            "max_queued_messages": str(self.queued),
        }


STALLING = [
    Case(window=1, delay_ms=500, rate=50, readings=350, queued=100),
    Case(window=5, delay_ms=200, rate=150, readings=1_000, queued=300),
    Case(window=20, delay_ms=500, rate=400, readings=3_000, queued=1_000),
]
"""One window per delay is less than the rate. Mosquitto 2.0.11 keeps strictly to a window of 1; to
larger ones not while readings come steadily, and then even one who waits too long loses nothing."""

ROOMY = [
    Case(window=1_000, delay_ms=200, rate=400, readings=1_000, queued=1_000),
    Case(window=20, delay_ms=0, rate=400, readings=1_000, queued=600),
]


class Commits:
    """Counts the commits to the spool, as another reader of the file sees them.

    Two between two looks count as one: it is a count from below.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        self._version = self._look()
        self.count = 0

    def _look(self) -> int:
        ((version,),) = self._connection.execute("PRAGMA data_version")
        return int(version)

    def look(self) -> None:
        """Take note of what has happened since the last look."""
        version = self._look()
        self.count += version != self._version
        self._version = version

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()


def system(case: Case) -> Rig:
    """Return the system of ``case``; the broker keeps to its window, and its queue is short."""
    delay = str(case.delay_ms)
    return Rig(APP_ENV="LOCAL", broker_options=case.options(), COMMIT_DELAY_MS=delay)


def numbers(rig: Rig) -> list[int]:
    """Return the numbers of all readings in the spool, in its order."""
    rows = rig.books.rows("spool", "SELECT value FROM reading_row ORDER BY seq")
    return [int(value) for (value,) in rows]


def assert_all_spooled(rig: Rig) -> None:
    """Check that the broker has dropped nothing of what it acknowledged, and kept the order."""
    sent = sorted(sample.number for sample in rig.publisher.samples)
    try:
        rig.wait_until_spooled(SPOOLED_TIMEOUT_S)
    except AssertionError as error:
        lost = sorted(set(sent) - set(numbers(rig)))
        raise AssertionError(f"the broker dropped {len(lost)} of {len(sent)}") from error
    assert sorted(numbers(rig)) == sent
    figures = assert_adds_up(rig.books, ())
    assert figures.spooled == len(sent)


def give_window(rig: Rig, window: int) -> None:
    """Start the broker anew with another window; returns once the collector is back."""
    collector = rig.programs[COLLECTOR]
    connections = collector.log_text.count(CONNECTED)
    file = rig.directory / "broker" / "mosquitto.conf"
    text = file.read_text(encoding="utf-8")
    option = "max_inflight_messages"
    text, found = re.subn(rf"(?m)^{option} .*$", f"{option} {window}", text)
    assert found == 1
    file.write_text(text, encoding="utf-8")
    rig.broker.stop()
    rig.broker.start()
    wait_until(
        lambda: collector.log_text.count(CONNECTED) > connections,
        RUN_TIMEOUT_S,
        "the collector connects again",
    )


def publish_steadily(rig: Rig, rate: int, readings: int) -> int:
    """Publish so many at that rate; return how many commits there were at the least."""
    with closing(Commits(rig.spool_dir / "spool.db")) as commits, rig.load(rate) as load:
        goal = load.count + readings

        def ended() -> bool:
            commits.look()
            return load.count >= goal

        wait_until(ended, RUN_TIMEOUT_S, f"{readings} are published")
        return commits.count


@pytest.mark.parametrize("case", [*STALLING, *ROOMY], ids=str)
def test_a_steady_plant_loses_nothing_to_the_brokers_queue(case: Case) -> None:
    with system(case) as rig:
        rig.start(COLLECTOR)
        commits = publish_steadily(rig, case.rate, case.readings)
        assert_all_spooled(rig)
        if case.delay_ms and case.window >= GATHERED:
            assert commits * GATHERED <= case.readings


@pytest.mark.parametrize("window", [5, 20])
def test_bursts_lose_nothing_to_the_brokers_queue(window: int) -> None:
    case = Case(window, delay_ms=500, rate=0, readings=BURST * BURSTS, queued=2 * BURST)
    with system(case) as rig:
        rig.start(COLLECTOR)
        for _ in range(BURSTS):
            rig.publish(BURST)
            time.sleep(BURST_EVERY_S)  # the sensors' clock, not a wait for something
        assert_all_spooled(rig)


def test_another_window_after_a_reconnect_loses_nothing() -> None:
    # A larger one and a smaller one: what was learnt of one broker is not true of the next.
    case = Case(window=20, delay_ms=500, rate=50, readings=250, queued=100)
    with system(case) as rig:
        rig.start(COLLECTOR)
        publish_steadily(rig, case.rate, case.readings)
        for window in (200, 1):
            give_window(rig, window)
            publish_steadily(rig, case.rate, case.readings)
        assert_all_spooled(rig)
