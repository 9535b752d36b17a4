"""A session with the broker in a thread of its own, as the collector's unit tests have it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import collector.inbox
import collector.mqtt
import collector.paho_client
from collector.inbox import Delivered, Inbox
from collector.mqtt import (
    LOOP,
    BrokerSession,
)
from lifecycle import StopRequest, Watchdog, load_settings
from tests.broker_link import (
    SAFETY_S,
    Link,
    WireBroker,
)
from tests.collector_parts import Clock

FILTER = "FCTS/FAE/+/SolvExtract/+"


class WatchedInbox(Inbox):
    """The real one, that tells the test of each arrival."""

    def __init__(self, on_room: Callable[[], None]) -> None:
        super().__init__(on_room)
        self.arrivals: queue.SimpleQueue[Delivered] = queue.SimpleQueue()

    def put(self, delivered: Delivered) -> None:
        super().put(delivered)
        self.arrivals.put(delivered)


class ImpatientStop(StopRequest):
    """A real stop request whose waits take no time, but move a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout_s: float, also: object = None) -> bool:  # noqa: ARG002 - as the real one
        # A little more, so that no rounding leaves a rest that is never waited for.
        self._clock.now_s += timeout_s + 1e-6
        return self.requested


class Gate:
    """A session in a thread of its own, towards a broker that the test plays."""

    def __init__(
        self,
        port: int,
        *,
        known_filters: Sequence[str] = (),
        jitter: float = 1.0,
        clock: Clock,
        **variables: str,
    ) -> None:
        environ = {
            "APP_ENV": "LOCAL",
            "MQTT_BROKER": "127.0.0.1",
            "MQTT_PORT": str(port),
            "MQTT_CLIENT_ID": "gate-7",
        }
        self.clock = clock
        self.stop = ImpatientStop(clock)
        self.inbox = WatchedInbox(on_room=self.stop.wake)
        self.subscribed: list[tuple[str, ...]] = []
        self.beats = Clock()
        self.session = BrokerSession(
            load_settings(environ | variables, "host"),
            self.inbox,
            self.stop,
            # The writer's loop never turns here, so this never ends the test run.
            Watchdog([LOOP, "writer"], 1e6, self.beats),
            known_filters=known_filters,
            on_subscribed=self._on_subscribed,
            jitter=lambda: jitter,
        )
        self.thread = threading.Thread(target=self.session.run, name="session")

    def _on_subscribed(self, filters: Sequence[str], _weak: Sequence[str]) -> None:
        if filters:
            self.subscribed.append(tuple(filters))

    def start(self) -> None:
        self.thread.start()

    def arrival(self) -> Delivered:
        return self.inbox.arrivals.get(timeout=SAFETY_S)

    def end_run(self) -> None:
        """Ask for the stop and wait for the loop's end."""
        self.stop.request("the test")
        if self.thread.ident is not None:
            self.thread.join()

    def close(self) -> None:
        self.end_run()
        self.session.finish(lambda: True, 0.0)
        self.stop.close()


@contextmanager
def gate_maker(port: int, clock: Clock) -> Iterator[Callable[..., Gate]]:
    """Give out a maker of gates; at the end each is stopped and takes leave."""
    made: list[Gate] = []

    def make(port: int = port, **options: object) -> Gate:
        made.append(Gate(port, clock=clock, **options))  # type: ignore[arg-type]
        return made[-1]

    try:
        yield make
    finally:
        for one in made:
            one.close()


def session_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the session's loop a time that a test moves; the library's keepalive has its own."""
    made = Clock()
    times = SimpleNamespace(monotonic=made, time_ns=time.time_ns, sleep=time.sleep)
    monkeypatch.setattr(collector.mqtt, "time", times)
    return made


def subscribed_link(broker: WireBroker) -> Link:
    """Take the next connection through CONNECT and SUBSCRIBE."""
    link = broker.link()
    link.accept()
    link.grant()
    return link
