"""Eight solvent extraction sites that publish readings with QoS 1.

It counts what the broker has acknowledged, and nothing else: that is what a sensor may rely
on, and so what Sluice must account for.
"""

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from demo.errors import DemoError

SITES = tuple(f"SX{number:02}" for number in range(1, 9))
READINGS_PER_S = 100

_REPEAT_EVERY, _REPEAT_AT = 211, 100
_FAULT_EVERY, _FAULT_AT = 307, 150
"""Odd strides, so that every site and tag has its turn."""

_CONNECT_TIMEOUT_S = 10.0
_UNACKED_MAX = 5_000
"""With so many on the way the sensors wait, as their own small buffers would make them."""

Kind = Literal["good", "repeated", "faulty"]


class Tag(NamedTuple):
    """One kind of measurement, as a random walk that returns to ``usual``."""

    pi_tag: str
    sensor_id: str
    unit: str
    usual: float
    step: float


TAGS = (
    Tag("FEED_PRESSURE", "PIT-101", "kPa", 215.0, 2.5),
    Tag("PLS_FLOW", "FIT-201", "m3/h", 640.0, 6.0),
    Tag("ORGANIC_FLOW", "FIT-202", "m3/h", 655.0, 6.0),
    Tag("SETTLER_LEVEL", "LIT-301", "%", 72.0, 0.6),
    Tag("PLS_PH", "AIT-401", "pH", 1.85, 0.02),
    Tag("COPPER_GRADE", "AIT-402", "g/L", 3.4, 0.05),
    Tag("REDOX", "AIT-403", "mV", 410.0, 3.0),
    Tag("TEMPERATURE", "TIT-501", "degC", 24.5, 0.2),
)


class Message(NamedTuple):
    """A message to publish, and what should become of it."""

    kind: Kind
    topic: str
    payload: bytes


class Plant:
    """Makes messages, one after the other, site by site and tag by tag."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._values = {(site, tag): tag.usual for site in SITES for tag in TAGS}
        self._points = list(self._values)
        self._made = 0
        self._last: Message | None = None

    def next_message(self, now: datetime) -> Message:
        """Return the next message.

        Now and then a gateway sends a reading again, byte for byte, and now and then a sensor
        is broken and has no value.
        """
        number, self._made = self._made, self._made + 1
        if self._last is not None and number % _REPEAT_EVERY == _REPEAT_AT:
            return self._last._replace(kind="repeated")
        site, tag = self._points[number % len(self._points)]
        faulty = number % _FAULT_EVERY == _FAULT_AT
        message = self._message(site, tag, now, faulty=faulty)
        if not faulty:
            self._last = message
        return message

    def _message(self, site: str, tag: Tag, now: datetime, *, faulty: bool) -> Message:
        value = self._values[site, tag]
        value += self._random.gauss(0, tag.step) + (tag.usual - value) * 0.1
        self._values[site, tag] = value
        reading = {
            "site_code": site,
            "sensor_id": f"{site}-{tag.sensor_id}",
            "timestamp": now.isoformat(timespec="microseconds"),
            "value": None if faulty else round(value, 4),
            "unit": tag.unit,
            "quality": "bad" if faulty else "good",
        }
        topic = f"FCTS/FAE/{site}/SolvExtract/{tag.pi_tag}"
        return Message("faulty" if faulty else "good", topic, json.dumps(reading).encode())


@dataclass(frozen=True)
class Published:
    """How many messages the broker has acknowledged, and how many it has not."""

    good: int = 0
    repeated: int = 0
    faulty: int = 0
    unacked: int = 0

    @property
    def total(self) -> int:
        """All that was acknowledged."""
        return self.good + self.repeated + self.faulty


class Simulator:
    """Publishes the plant's messages at a steady rate, from a thread of its own."""

    def __init__(self, host: str, port: int, rate: int = READINGS_PER_S, seed: int = 1) -> None:
        self._address = (host, port)
        self._interval_s = 1 / rate
        self._plant = Plant(seed)
        self._connected = threading.Event()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._all_acked = threading.Condition(self._lock)
        self._unacked: dict[int, Kind] = {}
        self._acked_early: set[int] = set()
        self._acked: Counter[Kind] = Counter()
        self._thread = threading.Thread(target=self._run, name="simulator", daemon=True)
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, "sluice-demo-sites")
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.reconnect_delay_set(min_delay=1, max_delay=2)

    def connect(self) -> None:
        """Connect to the broker.

        Raises:
            DemoError: It does not answer.
        """
        self._client.connect_async(*self._address)
        self._client.loop_start()
        if not self._connected.wait(_CONNECT_TIMEOUT_S):
            raise DemoError("the simulator cannot connect to the broker")

    def announce(self) -> None:
        """Publish one reading as retained.

        Whenever the collector subscribes, before or after, it gets this one; so once it has
        it, nothing that follows can find the broker without a subscriber.
        """
        self._publish(retain=True)

    def start(self) -> None:
        """Begin with the steady flow."""
        self._thread.start()

    def check(self) -> None:
        """Raise DemoError if the flow has broken off."""
        if self._failure is not None:
            raise DemoError(f"the simulator failed: {self._failure!r}") from self._failure

    def stop(self, timeout_s: float) -> None:
        """End the flow, wait for outstanding acknowledgements, disconnect."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._all_acked:
            self._all_acked.wait_for(lambda: not self._unacked, timeout_s)
        self._client.disconnect()
        self._client.loop_stop()

    def published(self) -> Published:
        """Return the counts so far."""
        with self._lock:
            acked = self._acked
            return Published(acked["good"], acked["repeated"], acked["faulty"], len(self._unacked))

    def _run(self) -> None:
        try:
            due_s = time.monotonic()
            while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
                due_s += self._interval_s
                if self.published().unacked < _UNACKED_MAX:
                    self._publish()
        except BaseException as error:  # noqa: BLE001 - told by check(), in the main thread
            self._failure = error

    def _publish(self, *, retain: bool = False) -> None:
        message = self._plant.next_message(datetime.now(UTC))
        # Not under our lock: paho calls on_publish under one of its own, which publish()
        # wants too. So the acknowledgement may come before publish() has returned.
        info = self._client.publish(message.topic, message.payload, qos=1, retain=retain)
        with self._lock:
            if info.mid in self._acked_early:
                self._acked_early.remove(info.mid)
                self._acked[message.kind] += 1
            else:
                self._unacked[info.mid] = message.kind

    def _on_connect(
        self,
        client: mqtt.Client,
        _userdata: object,
        _flags: mqtt.ConnectFlags,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        del client
        if not reason.is_failure:
            self._connected.set()

    def _on_publish(
        self,
        client: mqtt.Client,
        _userdata: object,
        mid: int,
        _reason: ReasonCode,
        _properties: Properties,
    ) -> None:
        del client
        with self._all_acked:
            if mid in self._unacked:
                self._acked[self._unacked.pop(mid)] += 1
            else:
                self._acked_early.add(mid)
            self._all_acked.notify_all()
