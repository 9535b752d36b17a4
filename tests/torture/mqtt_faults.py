"""Lies of a broker, each told to a real collector between good readings."""

import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.harness import COLLECTOR, Program, Rig, assert_adds_up
from tests.torture.lying_broker import (
    PUBREL,
    SUBSCRIBE,
    LeftError,
    LyingBroker,
    packet,
)

TIMEOUT_S = 30.0
LARGEST = b"\xff\xff\xff\x7f"
"""A remaining length of 268,435,455 bytes, the most there is (section 2.2.3)."""

FLOOD = 200
MEMORY_SLACK_KIB = 16 * 1024
"""Far below what is announced; room for the interpreter's own arenas."""

Lie = Callable[[LyingBroker], None]


def _refused(code: int) -> Lie:
    def lie(broker: LyingBroker) -> None:
        broker.await_client()
        broker.say(packet(0x20, bytes([0, code])))
        broker.expect_left()

    return lie


def _instead_of_connack(data: bytes) -> Lie:
    def lie(broker: LyingBroker) -> None:
        broker.await_client()
        broker.say(data)
        broker.hang_up()

    return lie


def _unasked(data: bytes) -> Lie:
    """Tell it between two good readings; whether the collector stays is its own affair."""

    def lie(broker: LyingBroker) -> None:
        broker.welcome()
        before, behind = broker.new(2)
        broker.say(broker.message(before) + data + broker.message(behind))
        try:
            broker.expect_acknowledged([before, behind])
        except LeftError:
            return

    return lie


def _malformed(data: bytes) -> Lie:
    """Tell it behind a good reading: the collector has to leave (section 4.8)."""

    def lie(broker: LyingBroker) -> None:
        broker.welcome()
        (before,) = broker.new()
        broker.say(broker.message(before) + data)
        broker.expect_left()

    return lie


def publish_before_connack(broker: LyingBroker) -> None:
    """Send readings before the connection is accepted."""
    broker.await_client()
    (number,) = broker.new()
    broker.say(broker.message(number) + packet(0x20, b"\0\0"))
    try:
        broker.grant(broker.expect(SUBSCRIBE))
        broker.expect_acknowledged([number])
    except LeftError:
        return


def publish_before_suback(broker: LyingBroker) -> None:
    """Send readings before the subscription is granted, which is lawful (section 3.8.4)."""
    broker.await_client()
    broker.send(packet(0x20, b"\0\0"))
    body = broker.expect(SUBSCRIBE)
    (number,) = broker.new()
    broker.send(broker.message(number))
    broker.expect_acknowledged([number])
    broker.grant(body)


def suback_for_nobody(broker: LyingBroker) -> None:
    """Grant subscriptions that were never asked for, and the right one too late."""
    broker.await_client()
    broker.send(packet(0x20, b"\0\0"))
    body = broker.expect(SUBSCRIBE)
    broker.send(packet(0x90, b"\xff\xfe\1") + packet(0x90, b"\xff\xfd\x80"))
    broker.grant(body)
    broker.grant(body)
    (number,) = broker.new()
    broker.send(broker.message(number))
    broker.expect_acknowledged([number])


def suback_refused(broker: LyingBroker) -> None:
    """Refuse the subscription: the collector leaves, and comes again."""
    broker.await_client()
    broker.send(packet(0x20, b"\0\0"))
    body = broker.expect(SUBSCRIBE)
    broker.send(packet(0x90, body[:2] + b"\x80"))
    broker.expect_left()


def suback_without_codes(broker: LyingBroker) -> None:
    """Grant nothing at all."""
    broker.await_client()
    broker.send(packet(0x20, b"\0\0"))
    broker.send(packet(0x90, broker.expect(SUBSCRIBE)[:2]))
    (number,) = broker.new()
    try:
        # It may have left before this is sent, or take it: both are right.
        broker.send(broker.message(number))
        broker.expect_acknowledged([number])
    except LeftError:
        return


def dup_flood(broker: LyingBroker) -> None:
    """Send the same readings again and again, marked as repetitions."""
    broker.welcome()
    numbers = broker.new(10)
    for _ in range(FLOOD // 10):
        broker.send(b"".join(broker.message(n, dup=True) for n in numbers))
    broker.expect_acknowledged(numbers)
    broker.expect_answers()


def duplicates_without_dup(broker: LyingBroker) -> None:
    """Send the same readings under other identifiers, as a publisher that retries does."""
    broker.welcome()
    numbers = broker.new(10)
    for turn in range(FLOOD // 10):
        broker.send(b"".join(broker.message(n, mid=1 + (n * 31 + turn) % 65_535) for n in numbers))
    broker.expect_answers()


def one_identifier_for_all(broker: LyingBroker) -> None:
    """Send different readings under one identifier, none of them acknowledged yet."""
    broker.welcome()
    numbers = broker.new(50)
    broker.send(b"".join(broker.message(n, mid=7) for n in numbers))
    broker.expect_answers()


def qos_2(broker: LyingBroker) -> None:
    """Send with the QoS that was not subscribed, with all of its four packets, and twice."""
    broker.welcome()
    numbers = broker.new(20)
    broker.send(b"".join(broker.message(n, qos=2) for n in numbers))
    broker.expect_acknowledged(numbers)
    broker.send(b"".join(packet(PUBREL, struct.pack("!H", n)) for n in numbers))
    broker.send(b"".join(broker.message(n, qos=2, dup=True) for n in numbers))
    broker.expect_answers()


def cut_in_a_packet(broker: LyingBroker) -> None:
    """Break the connection within a packet; what was whole may be acknowledged, or not."""
    broker.welcome()
    stream = b"".join(broker.message(n) for n in broker.new(50))
    broker.send(stream[: broker.chance.randrange(1, len(stream))])
    broker.hang_up()


def garbage(broker: LyingBroker) -> None:
    """Send good readings, and then whatever comes."""
    broker.welcome()
    numbers = broker.new(3)
    stream = b"".join(broker.message(n) for n in numbers)
    broker.say(stream + broker.chance.randbytes(broker.chance.randrange(1, 3_000)))
    broker.finish_writing()
    broker.expect_left()


def huge_and_gone(broker: LyingBroker) -> None:
    """Announce 256 MB, send two of them, and break the connection."""
    broker.welcome()
    (before,) = broker.new()
    head = b"\x32" + LARGEST + b"\0\1t\xff\xff"
    broker.note_sent(0xFFFF)
    broker.send(broker.message(before) + head + bytes(2_000_000))
    # It is on record, as rejected, as soon as that is certain: the rest would be thrown away.
    broker.expect_answers()
    broker.hang_up()


def silent(broker: LyingBroker) -> None:
    """Keep the connection open and say nothing more: keepalive has to end it (3.1.2.10)."""
    broker.welcome()
    broker.expect_left()


def _short(command: int, size: int) -> bytes:
    return packet(command, bytes(size))


LIES: dict[str, Lie] = {
    **{f"CONNACK refuses with {code}": _refused(code) for code in (1, 2, 3, 4, 5, 6, 255)},
    **{f"CONNACK of {n} bytes": _instead_of_connack(_short(0x20, n)) for n in (0, 1, 3)},
    "SUBACK for CONNACK": _instead_of_connack(packet(0x90, b"\0\1\1")),
    "HTTP for CONNACK": _instead_of_connack(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "TLS alert for CONNACK": _instead_of_connack(b"\x15\x03\x01\x00\x02\x02\x0a"),
    "nothing for CONNACK": _instead_of_connack(b""),
    "PUBLISH before CONNACK": publish_before_connack,
    "PUBLISH before SUBACK": publish_before_suback,
    "SUBACK for nobody": suback_for_nobody,
    "SUBACK refuses": suback_refused,
    "SUBACK without codes": suback_without_codes,
    **{
        f"{name} for an unknown identifier": _unasked(packet(command, b"\x12\x34"))
        for name, command in (
            ("PUBACK", 0x40), ("PUBREC", 0x50), ("PUBREL", 0x62), ("PUBCOMP", 0x70),
            ("UNSUBACK", 0xB0), ("SUBACK", 0x90),
        )
    },
    **{
        f"a packet of type {kind} with {size} bytes": _unasked(_short(kind << 4, size))
        for kind in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
        for size in (0, 1, 2)
    },
    "PUBLISH with QoS 3": _malformed(b"\x36\x05\0\1t\0\7"),
    "PUBLISH with identifier 0": _malformed(b"\x32\x05\0\1t\0\0"),
    "PUBLISH shorter than its topic": _malformed(b"\x30\x03\0\x09t"),
    "PUBLISH without a body": _malformed(b"\x30\0"),
    "a length of five bytes": _malformed(b"\x30\xff\xff\xff\xff\x01"),
    "SUBACK of 256 MB": _malformed(b"\x90" + LARGEST),
    "CONNACK of 256 MB": _malformed(b"\x20" + LARGEST),
    "PUBLISH of 256 MB": huge_and_gone,
    "a flood of DUP": dup_flood,
    "duplicates without DUP": duplicates_without_dup,
    "one identifier for all": one_identifier_for_all,
    "QoS 2": qos_2,
    "cut in a packet": cut_in_a_packet,
    "garbage": garbage,
    "silence": silent,
}  # fmt: skip


@dataclass
class Collected:
    """A collector before a lying broker."""

    rig: Rig
    broker: LyingBroker

    def assert_kept(self) -> None:
        """Check the promise: what was acknowledged is stored, all is once there, in the end.

        Raises:
            AssertionError: It is broken.
        """
        self.broker.settle()
        assert self.broker.violations == []
        assert self.broker.unacknowledged == []
        self.assert_acknowledged_is_stored()
        values = [value for (value,) in self._values()]
        assert len(values) == len(set(values)), "a reading is in the spool twice"
        assert_adds_up(self.rig.books, ())

    def assert_acknowledged_is_stored(self) -> None:
        """Check that the spool has whatever the broker was told that it has."""
        stored = {int(value) for (value,) in self._values()}
        missing = self.broker.acknowledged - stored
        assert not missing, f"acknowledged and not in the spool: {sorted(missing)[:10]}"

    def _values(self) -> list[tuple[float]]:
        return self.rig.books.rows("spool", "SELECT value FROM reading_row")


@contextmanager
def collected(seed: int) -> Iterator[Collected]:
    """Run a hasty collector before a lying broker, until the context ends."""
    with LyingBroker(seed) as broker, Rig(APP_ENV="LOCAL") as rig:
        rig.programs[COLLECTOR] = Program(
            COLLECTOR,
            [sys.executable, "-m", "tests.torture.hasty"],
            rig.variables | {"MQTT_PORT": str(broker.port)},
            rig.directory / "collector.log",
        )
        rig.programs[COLLECTOR].start()
        yield Collected(rig, broker)


def tell(system: Collected, name: str) -> None:
    """Tell one lie, and check the promise after it.

    Raises:
        AssertionError: It is broken, or the collector has ended.
    """
    try:
        LIES[name](system.broker)
    except LeftError as error:
        raise AssertionError(f"{name}: the collector left: {error}") from error
    system.assert_acknowledged_is_stored()
    assert system.broker.violations == [], name
    assert system.rig.programs[COLLECTOR].running, f"{name}: the collector has ended"


def run(rounds: int, seed: int, say: Callable[[str], Any] = print) -> dict[str, int]:
    """Tell every lie ``rounds`` times, in random order, to one collector.

    Args:
        rounds: Times each.
        seed: Of the order, and of what each lie leaves to chance.
        say: Takes a line now and then.

    Raises:
        AssertionError: The promise is broken.
    """
    with collected(seed) as system:
        told = 0
        for turn in range(rounds):
            names = [name for name in LIES if name != "silence" or turn % 10 == 0]
            system.broker.chance.shuffle(names)
            for name in names:
                tell(system, name)
                told += 1
            system.assert_kept()
            say(f"round {turn + 1}: {told} lies, {system.broker.answers} acknowledgements")
        peak = system.rig.programs[COLLECTOR].memory_kib("VmHWM")
        say(f"the collector had at most {peak:,} KiB")
        traceback = "Traceback" in system.rig.programs[COLLECTOR].log_text
        assert not traceback, "the collector's log has a traceback"
        return {
            "lies": told,
            "connections": system.broker.connections,
            "acknowledgements": system.broker.answers,
            "violations": 0,
        }
