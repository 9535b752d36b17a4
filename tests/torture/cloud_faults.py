"""A whole system whose ways to the cloud lead through breaking proxies."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.harness import FORWARDERS, IMPATIENT, Rig, wait_until
from tests.torture.proxy import Fault, Proxy

READINGS = 300
SOON_S = 25.0
METHODS = ("storage", "insert_all")


@dataclass
class Cloudy:
    """A system, and the proxies before the services that it delivers to."""

    rig: Rig
    proxies: tuple[Proxy, ...]
    faults: int = 0

    def begin(self, fault: Fault, cut_after_bytes: int = 0) -> None:
        """Let every way to the cloud be broken."""
        self.faults += 1
        for proxy in self.proxies:
            proxy.begin(fault, cut_after_bytes=cut_after_bytes)

    def mend(self) -> None:
        """Let every way be well again."""
        for proxy in self.proxies:
            proxy.mend()

    def wait_until_seen(self, state: str, *sinks: str) -> None:
        """Wait until the operator sees this state of the sinks, all if none is named."""
        for sink in sinks or self.rig.sinks:
            wait_until(
                lambda sink=sink: self.rig.books.backlog(sink)["state"] == state,  # type: ignore[misc]
                SOON_S,
                f"{sink} is {state}",
            )

    def arrived(self) -> dict[str, int]:
        """Return how many readings each service has."""
        return {sink: len(self.rig.cloud.received(sink)) for sink in self.rig.sinks}


@contextmanager
def cloudy(method: str, **variables: str) -> Iterator[Cloudy]:
    """Run a system that writes to BigQuery by ``method``, until the context ends."""
    with ExitStack() as stack:
        pubsub, rest, write_api = (stack.enter_context(Proxy()) for _ in range(3))
        rig = Rig(
            forwarder=IMPATIENT,
            BIGQUERY_WRITE_METHOD=method,
            PUBSUB_EMULATOR_HOST=pubsub.address,
            BIGQUERY_EMULATOR_HOST=f"http://{rest.address}",
            BIGQUERY_STORAGE_EMULATOR_HOST=write_api.address,
            broker_options=None,
            **variables,
        )
        pubsub.target = rig.cloud.pubsub.port
        rest.target = rig.cloud.bigquery.port
        write_api.target = rig.cloud.write_api.port
        stack.enter_context(rig)
        rig.start()
        # Connections that stand, and a table that is known: faults hit the delivery itself.
        rig.publish(READINGS)
        rig.wait_until_delivered()
        yield Cloudy(rig, (pubsub, rest, write_api))


def suffer(system: Cloudy, fault: Fault, chance: random.Random) -> None:
    """Have one fault hit a delivery, end, and everything arrive after it.

    Raises:
        AssertionError: Something is lost, out of order, or twice where it must not be.
    """
    rig = system.rig
    if fault is Fault.CUT_DURING:
        system.begin(fault, chance.randrange(1, 40_000))
        rig.publish(READINGS)
        # Whether a connection gets as far as its cut is up to how much the batch needs.
        rig.wait_until_spooled()
    elif fault is Fault.LOSE_ANSWERS:
        # Connections have to stand: a new one's own answers would be lost, and nothing sent.
        rig.publish(READINGS)
        rig.wait_until_delivered()
        before = system.arrived()
        system.begin(fault)
        rig.publish(READINGS)
        # Of the first batch: the later ones wait for its answer.
        wait_until(
            lambda: all(n > before[sink] for sink, n in system.arrived().items()),
            SOON_S,
            "the services have carried out what they were asked",
        )
        system.wait_until_seen("retrying")
    else:
        system.begin(fault)
        rig.publish(READINGS)
        rig.wait_until_spooled()
        system.wait_until_seen("retrying")
    system.mend()
    rig.wait_until_delivered()
    rig.assert_nothing_lost()
    system.wait_until_seen("delivering")


def run(rounds: int, seed: int, say: Callable[[str], Any] = print) -> dict[str, int]:
    """Let ``rounds`` faults hit each way of writing, in random order.

    Args:
        rounds: Faults per write method.
        seed: Of the order, and of the places of cuts.
        say: Takes a line about each fault.

    Raises:
        AssertionError: The promise is broken; the last line said which fault it was.
    """
    chance = random.Random(seed)  # noqa: S311 - a test's dice
    count = 0
    for method in METHODS:
        with cloudy(method) as system:
            for _ in range(rounds):
                fault = chance.choice([f for f in Fault if f is not Fault.NONE])
                begun = time.monotonic()
                suffer(system, fault, chance)
                count += 1
                say(f"{method}: {fault.value}: {time.monotonic() - begun:.1f} s")
            programs = [system.rig.programs[name] for name in FORWARDERS]
            assert all(program.running for program in programs)
    return {"faults": count, "violations": 0}
