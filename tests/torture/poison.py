"""Publishers whose readings a service refuses, or nearly: the other ones' arrive all the same.

The whole system, as processes: broker, collector, both forwarders. Each round one publisher sends
what is refused, in a burst, among others or all alone, from a site of its own or from everybody's,
and healthy readings follow. A refused one is a dead letter, a healthy one is at both services,
and no sink stands on hold in the end.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.harness import (
    IMPATIENT,
    SITES,
    Packet,
    Rig,
    assert_adds_up,
    assert_all_received,
    assert_in_order,
    wait_until,
)

METHODS = ("storage", "insert_all", "storage_default")
WAYS = ("burst", "among", "alone")
SENSOR = "poison/1"
"""What the services refuse, in addition to times that no partition takes."""

HEALTHY = 60
SOON_S = 40.0
_ODD_SITE = "ODD"
_NUMBER = -1
"""The value of each poisonous reading: it tells them from the healthy ones."""


def _reading(site: str, tag: str, **fields: object) -> Packet:
    payload = {"site_code": site, "sensor_id": SENSOR, "value": _NUMBER} | fields
    topic = f"FCTS/FAE/{site}/SolvExtract/{tag}".encode()
    return Packet(topic, json.dumps(payload).encode())


def odd() -> Iterator[Packet]:
    """Yield what a publisher may send that is lawful, or nearly, and never healthy to look at."""
    now = "2026-11-20T00:00:00Z"
    for number, text in enumerate(
        (b"1e400", b"-1e400", b"-0.0", b"-9007199254740993", b"-1" + b"0" * 400, b"-1e-320")
    ):
        topic = f"FCTS/FAE/{_ODD_SITE}/SolvExtract/V-{number}".encode()
        yield Packet(
            topic,
            b'{"site_code":"%s","sensor_id":"s","timestamp":"%s","value":%s}'
            % (_ODD_SITE.encode(), now.encode(), text),
        )
    for number, site in enumerate(("X" * 1_025, "\U0001f600" * 300, "a\u202eb", "é" * 513)):
        yield _reading(site, f"T-{number}", timestamp=now, sensor_id="s\U0001f525")
    yield _reading(_ODD_SITE, "T" * 1_025, timestamp=now, sensor_id="s")
    yield _reading(_ODD_SITE, "T", timestamp=now, sensor_id="\\u0000" * 50)
    for moment in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "1970-01-01T00:00:00Z"):
        yield _reading(_ODD_SITE, "clock", timestamp=moment, sensor_id="s")


@contextmanager
def poisoned(method: str) -> Iterator[Rig]:
    """Run a system whose services refuse the readings of SENSOR, until the context ends."""
    with Rig(forwarder=IMPATIENT, BIGQUERY_WRITE_METHOD=method) as rig:
        rig.cloud.pubsub.faults.poison = lambda data: json.loads(data)["sensor_id"] == SENSOR
        rig.cloud.poison_bigquery(lambda row: row["sensor_id"] == SENSOR)
        rig.start()
        rig.publish(HEALTHY)
        rig.wait_until_delivered()
        yield rig


def poison(rig: Rig, way: str, chance: random.Random) -> int:
    """Have one publisher send what is refused, and the others go on; return how many it was.

    Raises:
        AssertionError: A healthy reading is lost or waits, or a refused one is not put aside.
    """
    count = chance.choice([30, 150, 400])
    site = chance.choice([SITES[0], "POISON"])
    clock = chance.random() < 0.5
    year = 1970 if clock else 2026
    batch = [
        _reading(site, f"P-{n}", timestamp=f"{year}-11-20T00:00:00.{time.time_ns() % 10**6:06d}Z")
        for n in range(count)
    ]
    before = {sink: figures.dead_lettered for sink, figures in rig.books.figures().sinks.items()}
    if way == "among":
        for begin in range(0, count, 10):
            rig.publisher.publish(batch[begin : begin + 10])
            rig.publish(1)
    else:
        rig.publisher.publish(batch)
    if way == "alone":
        rig.wait_until_spooled()
        # Held, or put aside already: that is the service's word against one publisher's.
        wait_until(
            lambda: rig.books.backlog("pubsub")["state"] in {"on hold", "delivering"},
            SOON_S,
            "the poison was tried",
        )
    rig.publish(HEALTHY)
    rig.wait_until_delivered(timeout_s=SOON_S)
    for sink, figures in assert_adds_up(rig.books, rig.sinks).sinks.items():
        assert figures.dead_lettered == before[sink] + count, f"{sink}: {figures}"
    check(rig)
    return count


def check(rig: Rig) -> None:
    """Hold both services to the healthy readings, and the forwarders to their running."""
    for sink in rig.sinks:
        received = [r for r in rig.cloud.received(sink) if r.number > 0 and r.site in SITES]
        assert_all_received(rig.publisher.samples, received)
        if sink == "bigquery":
            received = sorted(received, key=lambda one: one.seq)
        assert_in_order(received)
        wait_until(
            lambda sink=sink: rig.books.backlog(sink)["state"] == "delivering",  # type: ignore[misc]
            SOON_S,
            f"{sink} delivers",
        )
    assert rig.cloud.pubsub.violations == []
    assert rig.cloud.write_api.violations == []


def oddities(rig: Rig) -> int:
    """Have a publisher send odd readings, and the others go on; return how many it was."""
    packets = list(odd())
    rig.publisher.publish(packets)
    rig.publish(HEALTHY)
    rig.wait_until_delivered(timeout_s=SOON_S)
    assert_adds_up(rig.books, rig.sinks)
    check(rig)
    return len(packets)


def run(rounds: int, seed: int, say: Callable[[str], Any] = print) -> dict[str, int]:
    """Let ``rounds`` publishers poison each way of writing, in random order.

    Args:
        rounds: Publishers per write method.
        seed: Of the order, the numbers and the places.
        say: Takes a line about each.

    Raises:
        AssertionError: The promise is broken; the last line said by what.
    """
    chance = random.Random(seed)  # noqa: S311 - a test's dice
    count = 0
    for method in METHODS:
        with poisoned(method) as rig:
            say(f"{method}: odd readings: {oddities(rig)}")
            for _ in range(rounds):
                way = chance.choice(WAYS)
                begun = time.monotonic()
                readings = poison(rig, way, chance)
                count += readings
                say(f"{method}: {way}: {readings} in {time.monotonic() - begun:.1f} s")
    return {"poisonous": count, "violations": 0}
