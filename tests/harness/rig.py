"""One whole system: broker, collector, forwarders, cloud, publisher, books."""

import grp
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lifecycle import SINKS, Settings
from tests.harness.books import Books
from tests.harness.broker import Broker
from tests.harness.checks import (
    assert_adds_up,
    assert_all_received,
    assert_in_order,
    assert_once,
)
from tests.harness.cloud import Cloud
from tests.harness.plant import Plant
from tests.harness.programs import Program
from tests.harness.publisher import Load, Publisher
from tests.harness.waiting import HOST, wait_until

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

COLLECTOR = "collector"
FORWARDERS = tuple(f"forwarder-{sink}" for sink in SINKS)
PROGRAMS = (COLLECTOR, *FORWARDERS)
IMPATIENT = "tests.harness.impatient"
MORTAL = "tests.harness.mortal"
COMMIT_DELAYS_MS = ("0", str(Settings(app_env="LOCAL").commit_delay_ms))
"""Each reading at once, and the default: what holds must hold at both."""

DRAIN_TIMEOUT_S = 45.0
START_TIMEOUT_S = 30.0
_SPOOL_MODE = 0o2750

_live: list["Rig"] = []
_kept: list[tuple[str, str]] = []


def last_words() -> list[tuple[str, str]]:
    """Return name and end of each log, for a failure's report.

    Those of the rigs that stand, and of those that an exception has just taken down.
    """
    kept = [*_kept]
    _kept.clear()
    return kept + [log for rig in _live for log in rig.logs()]


class Rig:
    """A system in a directory of its own; a context manager that takes everything down.

    Nothing runs at first but the cloud's fakes.

    Args:
        broker_options: Replace those of deploy/mosquitto.conf.
        forwarder: The module that runs as forwarder.
        variables: Environment variables beside the usual ones.
    """

    def __init__(
        self,
        *,
        broker_options: dict[str, str | None] | None = None,
        forwarder: str = "forwarder",
        **variables: str,
    ) -> None:
        # A short path: a Unix socket's is limited. Open, so that strangers reach the spool.
        self.directory = Path(tempfile.mkdtemp(prefix="sluice-"))
        self.directory.chmod(0o755)
        self.spool_dir = self.directory / "spool"
        self._make_spool_dir()
        self.books = Books(self.spool_dir)
        self.broker = Broker(self.directory / "broker", broker_options)
        self.cloud = Cloud()
        self.plant = Plant()
        self.publisher = Publisher(self.broker.port)
        self.variables = {
            "APP_ENV": "DEV",
            "INSTANCE_ID": "rig",
            "MQTT_BROKER": HOST,
            "MQTT_PORT": str(self.broker.port),
            "SPOOL_DIR": str(self.spool_dir),
            **self.cloud.environment(),
            **variables,
        }
        self.sinks = tuple(s for s in SINKS if variables.get(f"{s.upper()}_ENABLED") != "false")
        modules = {COLLECTOR: ["collector"]}
        modules |= {f"forwarder-{sink}": [forwarder, sink] for sink in SINKS}
        self.programs = {
            name: Program(
                name,
                [sys.executable, "-m", *arguments],
                self.variables,
                self.directory / f"{name}.log",
            )
            for name, arguments in modules.items()
        }

    def _make_spool_dir(self) -> None:
        self.spool_dir.mkdir()
        if os.getuid() == 0:
            # As installed: a group of its own, which every file inherits.
            os.chown(self.spool_dir, -1, grp.getgrnam("nogroup").gr_gid)
        self.spool_dir.chmod(_SPOOL_MODE)

    def __enter__(self) -> Self:
        """Let the cloud serve."""
        self.cloud.start()
        _live.append(self)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Take everything down."""
        _live.remove(self)
        if kind is not None:
            _kept[:] = self.logs()
        self.publisher.close()
        for program in (*self.programs.values(), self.broker):
            program.kill()
        self.cloud.pubsub.faults.clear()
        self.cloud.mend_bigquery()
        self.cloud.stop()
        shutil.rmtree(self.directory)

    def start(self, *names: str) -> None:
        """Start the broker, if it is down, and the named programs; all if none is named.

        Returns once the collector has its subscription: from then on nothing may be lost.
        """
        if not self.broker.running:
            self.broker.start()
        for name in names or PROGRAMS:
            self.programs[name].start()
        if not names or COLLECTOR in names:
            self.programs[COLLECTOR].wait_for_log('"message": "connected"', START_TIMEOUT_S)
            self.wait_for_session()

    def wait_for_session(self) -> None:
        """Wait until the broker keeps a session for the collector."""
        wait_until(
            lambda: self.books.rows("spool", "SELECT 1 FROM meta WHERE key = 'mqtt_subscription'"),
            START_TIMEOUT_S,
            "the collector has subscribed",
        )

    def load(self, rate: int) -> "AbstractContextManager[Load]":
        """Return a context in which the plant publishes ``rate`` readings a second."""
        return Load(self.publisher, self.plant.packets, rate).running()

    def publish(self, count: int) -> None:
        """Publish the plant's next readings; returns once the broker has taken them."""
        self.publisher.publish(self.plant.packets(count))

    def wait_until_spooled(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Wait until everything the broker acknowledged is spooled."""
        sent = len(self.publisher.acknowledged)
        wait_until(
            lambda: self.books.counter("spooled") + self.books.counter("rejected") >= sent,
            timeout_s,
            f"{sent} messages are spooled or rejected",
        )

    def wait_until_delivered(self, *sinks: str, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Wait until the sinks (all if none is named) have everything that was published."""
        self.wait_until_spooled(timeout_s)

        def done() -> bool:
            figures = self.books.figures()
            return all(figures.sinks[sink].pending == 0 for sink in sinks or self.sinks)

        wait_until(done, timeout_s, f"{sinks or self.sinks} have everything")

    def assert_nothing_lost(self, *, order_by: str = "number") -> None:
        """Check ledger, services and books against each other, once all is delivered."""
        figures = assert_adds_up(self.books, self.sinks)
        assert figures.spooled == len(self.publisher.samples), figures
        for sink in self.sinks:
            received = self.cloud.received(sink)
            assert_all_received(self.publisher.samples, received)
            if sink == "bigquery" and self.variables.get("BIGQUERY_WRITE_METHOD") == "insert_all":
                # Its requests run side by side: the table has the order of its column seq.
                received = sorted(received, key=lambda one: one.seq)
            elif sink == "bigquery":
                assert_once(received)
            assert_in_order(received, by=order_by)
        assert self.cloud.pubsub.violations == []
        assert self.cloud.write_api.violations == []

    def logs(self) -> Iterator[tuple[str, str]]:
        """Yield a name and the last words of everything that has a log."""
        for log in sorted(self.directory.rglob("*.log")):
            yield log.name, log.read_text(errors="replace")[-6_000:]
