"""The whole system: broker, three processes of Sluice, and fakes of both services."""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.fill import APP_ENV
from bench.processes import BenchError, Process
from bench.rig import START_TIMEOUT_S, Rig, wait_for
from bench.servers import NAMES, TABLE_REF, Fake, fake_bigquery
from lifecycle import SINKS

TOPIC = "projects/bench/topics/system"
LOOK_EVERY_S = 0.05


@dataclass
class Services:
    """Both services, at ports that stay the same when they come back."""

    setup: Rig
    pubsub: Fake
    bigquery: Fake
    gone: tuple[int, int] = (0, 0)
    """What was received before they last went away; a fake counts from its start."""

    @classmethod
    def start(cls, setup: Rig, *, arrivals: bool = False) -> "Services":
        """Start both, empty."""
        pubsub = Fake("pubsub", setup.directory, f"--topic={TOPIC}")
        setup.start(pubsub.process)
        bigquery = fake_bigquery(setup.directory, arrivals=arrivals)
        setup.start(bigquery.process)
        return cls(setup, pubsub, bigquery)

    def environ(self) -> dict[str, str]:
        """Return what leads the forwarders here."""
        return {
            **NAMES,
            "PUBSUB_TOPIC": TOPIC,
            "PUBSUB_EMULATOR_HOST": f"127.0.0.1:{self.pubsub.port}",
            "BIGQUERY_EMULATOR_HOST": f"http://127.0.0.1:{self.bigquery.port}",
            "BIGQUERY_STORAGE_EMULATOR_HOST": f"127.0.0.1:{self.bigquery.write_port}",
        }

    def received(self) -> tuple[int, int]:
        """Return how many readings Pub/Sub and BigQuery have received in all."""
        return (
            self.gone[0] + int(self.pubsub.counts()["topics"][TOPIC]),
            self.gone[1] + int(self.bigquery.counts()["tables"][TABLE_REF]),
        )

    def leave(self) -> None:
        """Go away, as in an outage."""
        self.gone = self.received()
        self.pubsub.process.stop()
        self.bigquery.process.stop()

    def come_back(self) -> None:
        """Serve again at the same ports."""
        directory = self.setup.directory
        self.pubsub = Fake("pubsub", directory, f"--port={self.pubsub.port}", f"--topic={TOPIC}")
        self.setup.start(self.pubsub.process)
        self.bigquery = fake_bigquery(directory, self.bigquery.port, self.bigquery.write_port)
        self.setup.start(self.bigquery.process)


@dataclass
class System:
    """Everything, running.

    Attributes:
        processes: Sluice's three, by name.
    """

    setup: Rig
    services: Services
    processes: dict[str, Process]

    @classmethod
    def start(
        cls,
        setup: Rig,
        *,
        broker: bool = True,
        services: Services | None = None,
        settings: Mapping[str, str] | None = None,
        **environ: str,
    ) -> "System":
        """Start it in ``setup``; return once it is subscribed and drains.

        Args:
            setup: Where.
            broker: Whether to start one too.
            services: Where the readings go; None for new ones.
            settings: Of the programs.
            environ: More of them.
        """
        services = services or Services.start(setup)
        if broker:
            setup.broker()
        made = {"APP_ENV": APP_ENV, **services.environ(), **(settings or {}), **environ}
        processes = {"collector": setup.collector(**made)}
        for sink in SINKS:
            process = setup.forwarder(sink, **{**made, "LOG_LEVEL": "INFO"})
            processes[f"forwarder-{sink}"] = process
        for sink in SINKS:
            processes[f"forwarder-{sink}"].wait_output('"draining"', START_TIMEOUT_S)
        return cls(setup, services, processes)

    def delivered(self) -> int:
        """Return how many readings the slower sink has delivered."""
        return min(self.setup.sink_counter(sink) for sink in SINKS)

    def wait_delivered(self, count: int, timeout_s: float) -> None:
        """Wait until both sinks have delivered ``count`` readings."""
        wait_for(
            lambda: self.delivered() >= count,
            f"{count} readings are delivered to both services",
            timeout_s,
            LOOK_EVERY_S,
        )

    def check(self, count: int, *, exactly: bool = True) -> None:
        """Raise unless all counters and both services agree on ``count``.

        Args:
            count: Readings that were published.
            exactly: Whether a service must not have a reading twice; after an outage it may.
        """
        setup = self.setup
        received = self.services.received()
        figures = {
            "received": setup.spool_counter("received"),
            "spooled": setup.spool_counter("spooled"),
            **{sink: setup.sink_counter(sink) for sink in SINKS},
        }
        lost = [
            setup.sink_counter(sink, name)
            for sink in SINKS
            for name in ("dead_lettered", "dropped")
        ]
        wrong = set(figures.values()) != {count} or any(lost) or min(received) < count
        if wrong or (exactly and max(received) != count):
            raise BenchError(f"of {count}: {figures}, at the services {received}, lost {lost}")
