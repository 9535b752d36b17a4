"""Random bytes for the packet reader and for validation, each judged by a second opinion.

The second opinions are written for clearness, not for speed, and share no line with the product:
a parser of MQTT packets that looks at the whole stream at once, and Python's own json and
datetime.
"""

import json
import math
import random
import re
import struct
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from collector.packets import (
    KEPT_OF_OVERSIZED_BYTES,
    TOPIC_MAX_BYTES,
    Message,
    Packet,
    PacketReader,
)
from collector.validation import Validator
from spool import REJECTED_PAYLOAD_BYTES, Rejection, event_id, intact

LIMIT = 300
"""MAX_PAYLOAD_BYTES of the fuzzed reader: small, so that much is beyond it."""

BUFFERED_MAX_BYTES = LIMIT + TOPIC_MAX_BYTES + 4
OVERSIZED_SHARE = 0.002
TOPIC = b"FCTS/FAE/S1/SolvExtract/T-1"


# --- packets ------------------------------------------------------------------------------


def _length(number: int) -> bytes:
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | (0x80 if number else 0))
        if not number:
            return bytes(encoded)


def _random_packet(chance: random.Random) -> bytes:
    """Return a packet: lawful, nearly lawful, or anything."""
    dice = chance.random()
    if dice < OVERSIZED_SHARE:
        size = BUFFERED_MAX_BYTES + chance.randrange(-2, 200_000)
        body = struct.pack("!H", 5) + b"topic\0\7" + bytes(size - 9)
        return bytes([chance.choice((0x30, 0x32, 0x34, 0x36, 0x90))]) + _length(size) + body
    if dice < 0.6:
        qos = chance.randrange(3)
        topic = chance.randbytes(chance.randrange(12))
        mid = struct.pack("!H", chance.randrange(1, 65_536)) if qos else b""
        payload = chance.randbytes(chance.choice((0, 1, 5, 100, 119, 120, 121, 400)))
        body = struct.pack("!H", len(topic)) + topic + mid + payload
        return bytes([0x30 | qos << 1 | chance.choice((0, 1, 8, 9))]) + _length(len(body)) + body
    if dice < 0.9:
        body = chance.randbytes(chance.randrange(6))
        return bytes([chance.randrange(256)]) + _length(len(body)) + body
    return chance.randbytes(chance.randrange(1, 20))


def random_stream(chance: random.Random) -> bytes:
    """Return some packets in a row, sometimes with a few bytes changed, added or cut off."""
    stream = bytearray(b"".join(_random_packet(chance) for _ in range(chance.randrange(1, 7))))
    if chance.random() < 0.4:
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(stream))
            action = chance.randrange(3)
            if action == 0:
                stream[at] = chance.randrange(256)
            elif action == 1:
                stream[at:at] = chance.randbytes(chance.randrange(1, 4))
            elif len(stream) > 1:
                del stream[at]
    return bytes(stream)


def _announced(stream: bytes, at: int) -> tuple[int, int] | None:
    """Return the remaining length, -1 if it is malformed, and where the body begins."""
    length = 0
    for digit in range(4):
        if at + 1 + digit >= len(stream):
            return None
        byte = stream[at + 1 + digit]
        length += (byte & 0x7F) << 7 * digit
        if byte < 0x80:
            return length, at + 2 + digit
    return -1, 0


def second_opinion(stream: bytes) -> tuple[list[Message], list[Packet], bool]:
    """Return the messages (whole payloads), the other packets, and whether it is malformed."""
    messages: list[Message] = []
    others: list[Packet] = []
    at = 0
    malformed = False
    while not malformed and (announced := _announced(stream, at)) is not None:
        length, body_at = announced
        command = stream[at]
        is_publish = command >> 4 == 3
        large = length > BUFFERED_MAX_BYTES
        needed = min(length, TOPIC_MAX_BYTES + 4 + KEPT_OF_OVERSIZED_BYTES) if large else length
        body = stream[body_at : body_at + length]
        at = body_at + length
        if length < 0 or (large and not is_publish):
            malformed = True
        elif len(body) < needed:
            break
        elif not is_publish:
            others.append(Packet(command, body))
        elif (message := _taken_apart(command, body, length)) is not None:
            messages.append(message)
        else:
            malformed = True
    return messages, others, malformed


def _taken_apart(command: int, body: bytes, length: int) -> Message | None:
    qos = command >> 1 & 3
    head = 4 if qos else 2
    if qos == 3 or length < head:
        return None
    (topic_bytes,) = struct.unpack_from("!H", body)
    if length < head + topic_bytes:
        return None
    mid = 0
    if qos:
        (mid,) = struct.unpack_from("!H", body, 2 + topic_bytes)
        if mid == 0:
            return None
    start = head + topic_bytes
    return Message(
        body[2 : 2 + topic_bytes],
        body[start:],
        qos,
        bool(command & 1),
        mid,
        length - start,
    )


def check_stream(stream: bytes, chance: random.Random) -> None:
    """Feed ``stream`` in random pieces, and compare with the second opinion.

    Raises:
        AssertionError: They differ, or more is kept in memory than may be.
    """
    reader = PacketReader(LIMIT)
    messages: list[Message] = []
    others: list[Packet] = []
    at = 0
    # Byte by byte only what is short: a piece costs the same whatever it holds.
    pieces = chance.choice((1, 2, 3, 50, min(len(stream), 1_000)))
    largest = max(1, 2 * len(stream) // pieces)
    while at < len(stream) and not reader.malformed:
        piece = stream[at : at + chance.randrange(1, largest + 1)]
        at += len(piece)
        more, rest = reader.feed(piece)
        messages += more
        others += rest
        held = reader._have  # noqa: SLF001 - what it holds is the claim
        assert held <= BUFFERED_MAX_BYTES + KEPT_OF_OVERSIZED_BYTES + 8 + len(piece), "memory"
    expected, expected_others, malformed = second_opinion(stream)
    assert bool(reader.malformed) is malformed, (reader.malformed, malformed)
    assert others == expected_others
    assert len(messages) == len(expected)
    for got, wanted in zip(messages, expected, strict=True):
        assert got._replace(payload=b"") == wanted._replace(payload=b"")
        if wanted.size <= LIMIT:
            assert got.payload == wanted.payload
        else:
            assert got.payload == wanted.payload[: len(got.payload)]
            assert len(got.payload) >= min(wanted.size, KEPT_OF_OVERSIZED_BYTES)


def fuzz_packets(inputs: int, seed: int) -> int:
    """Check ``inputs`` random streams; return how many bytes they had.

    Raises:
        AssertionError: A stream was read wrongly; it says seed and number.
    """
    size = 0
    for number in range(inputs):
        chance = random.Random(seed * 1_000_003 + number)  # noqa: S311 - a test's dice
        stream = random_stream(chance)
        size += len(stream)
        try:
            check_stream(stream, chance)
        except Exception as error:
            error.add_note(f"seed {seed}, stream {number}: {stream[:400]!r}")
            raise
    return size


# --- validation ---------------------------------------------------------------------------

_WORDS: tuple[bytes, ...] = (
    b'"site_code"', b'"sensor_id"', b'"timestamp"', b'"value"', b'"S1"', b'""', b"null", b"true",
    b"1e308", b"1e309", b"-0", b"0.1", b"1E400", b"NaN", b"Infinity", b"9" * 400, b"{", b"}", b"[",
    b"]", b":", b",", b" ", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\ud83d\\ude00", b"\xff",
    b"\x00",
    b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\xe2\x80\xae", b"\x1b[2J", b"'; DROP TABLE x; --",
    b"%s%n", b"../../etc/passwd", b"$(reboot)", b"=cmd|' /C calc'!A0", b"\xef\xbb\xbf",
    b'"2026-01-01T00:00:00Z"', b'"2026-01-01T00:00:00+14:00"', b'"2026-02-30T00:00:00Z"',
    b'"2026-12-31T23:59:60Z"', b'"0001-01-01T00:00:00+01:00"', b'"9999-12-31T23:59:59.9999999Z"',
    b'"2026-01-01t00:00:00z"', b'"2026-01-01 00:00:00Z"', b'"2026-01-01T00:00:00+0200"',
    b'"2026-01-01T24:00:00Z"', b'"2026-01-01T00:00Z"', b"1795500000", b"-1", b"[" * 2_000,
)  # fmt: skip


def _random_object(chance: random.Random) -> bytes:
    """Return a payload that is nearly, or quite, a reading."""
    number = b"%d" % chance.randrange(10**6)
    if chance.random() < 0.5:
        number = b"%r" % chance.uniform(-1e9, 1e9)
    members = [
        name + b":" + (chance.choice(_WORDS) if chance.random() < 0.1 else good)
        for name, good in (
            (b'"site_code"', chance.choice((b'"S1"', b'"\\u0053"', b'"S\xc3\x9cD"'))),
            (b'"sensor_id"', b'"PT-1"'),
            (b'"timestamp"', _random_time(chance)),
            (b'"value"', number),
        )
    ]
    if chance.random() < 0.3:
        members.append(b'"note":' + chance.choice(_WORDS))
    if chance.random() < 0.1:
        members.append(chance.choice(members))
    if chance.random() < 0.1:
        del members[chance.randrange(len(members))]
    chance.shuffle(members)
    return b"{" + b",".join(members) + b"}"


def _random_time(chance: random.Random) -> bytes:
    moment = datetime(1, 1, 2, tzinfo=UTC) + timedelta(seconds=chance.randrange(315_000_000_000))
    text = moment.isoformat(timespec=chance.choice(("seconds", "milliseconds", "microseconds")))
    return json.dumps(text.replace("+00:00", chance.choice(("Z", "+00:00", "-11:30", "")))).encode()


def random_payload(chance: random.Random) -> bytes:
    """Return bytes that a sensor, a broken one or an enemy may publish."""
    dice = chance.random()
    if dice < 0.05:
        return chance.randbytes(chance.randrange(60))
    payload = bytearray(_random_object(chance))
    if dice < 0.5:
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(payload) + 1)
            payload[at : at + chance.randrange(4)] = chance.choice(_WORDS)
    return bytes(payload)


def random_topic(chance: random.Random) -> bytes:
    """Return a topic: mostly the right shape."""
    if chance.random() < 0.7:
        return TOPIC
    part = chance.choice(_WORDS)
    return chance.choice(
        (
            b"FCTS/FAE/" + part + b"/SolvExtract/T-1",
            b"FCTS/FAE/S1/SolvExtract/" + part,
            TOPIC + part,
            chance.randbytes(chance.randrange(40)),
        )
    )


_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CONTROL = {chr(c) for c in (*range(0x20), *range(0x7F, 0xA0))}


def check_message(validator: Validator, topic: bytes, payload: bytes) -> bool:
    """Check one message's outcome; return whether it is a reading.

    Raises:
        AssertionError: The outcome is not one that the contract allows.
    """
    message = Message(topic, payload, 1, retained=False, mid=1, size=len(payload))
    identity = event_id(topic, payload)
    reading, rejection, site_differs = validator.check(message, identity, 1_000)
    assert (reading is None) != (rejection is None)
    if rejection is not None:
        _check_rejection(rejection)
        return False
    assert reading is not None
    _, _, timestamp_us, site, sensor, tag, value, text, kept, _ = reading
    assert intact((1, *reading))
    assert kept == payload
    assert text.encode() == topic
    assert text.split("/")[4] == tag
    assert site_differs == (text.split("/")[2] != site)
    assert not _CONTROL & set(site + sensor + tag + text), "a control character"
    content = json.loads(payload, parse_constant=_no_constants)
    assert (content["site_code"], content["sensor_id"]) == (site, sensor)
    assert site
    assert sensor
    assert not isinstance(content["value"], bool)
    assert math.isfinite(value)
    assert float(content["value"]) == value
    assert _RFC3339.fullmatch(content["timestamp"]), content["timestamp"]
    assert timestamp_us == _microseconds(content["timestamp"]), content["timestamp"]
    return True


def _check_rejection(rejection: Rejection) -> None:
    _, reason, detail, topic, kept, _, _, _ = rejection
    assert reason
    assert detail
    assert len(kept) <= REJECTED_PAYLOAD_BYTES
    for text in (reason, detail, topic):
        assert text.encode().decode() == text, "it cannot be stored as text"
    assert not _CONTROL & set(detail), f"a control character in {detail!r}"


def _no_constants(name: str) -> float:
    raise AssertionError(f"{name} was taken for a number")


def _microseconds(text: str) -> int:
    """Return the moment; what is finer than a microsecond is rounded to the nearest."""
    match = _RFC3339.fullmatch(text)
    assert match is not None
    plain = text.upper().replace(match[2] or "", "", 1).replace(" ", "T")
    whole = datetime.fromisoformat(plain)
    since = whole - _EPOCH
    fraction = round(float("0" + match[2]) * 1_000_000) if match[2] else 0
    return (since.days * 86_400 + since.seconds) * 1_000_000 + fraction


def fuzz_validation(inputs: int, seed: int) -> int:
    """Check ``inputs`` random messages; return how many of them were readings.

    Raises:
        AssertionError: An outcome is wrong; it says seed and number.
    """
    validator = Validator(max_payload_bytes=64 * 1024)
    readings = 0
    for number in range(inputs):
        chance = random.Random(seed * 1_000_003 + number)  # noqa: S311 - a test's dice
        topic, payload = random_topic(chance), random_payload(chance)
        try:
            readings += check_message(validator, topic, payload)
        except Exception as error:
            error.add_note(f"seed {seed}, message {number}: {topic!r} {payload[:400]!r}")
            raise
    return readings


def run(rounds: int, seed: int, say: Callable[[str], Any] = print) -> dict[str, int]:
    """Fuzz both with ``rounds`` inputs each.

    Args:
        rounds: Inputs of each kind.
        seed: Of all of them.
        say: Takes a line at the end.

    Raises:
        AssertionError: An input was judged wrongly.
    """
    size = fuzz_packets(rounds, seed)
    readings = fuzz_validation(rounds, seed)
    say(f"{rounds} streams with {size} bytes, {rounds} messages of which {readings} are readings")
    return {"streams": rounds, "messages": rounds, "readings": readings, "violations": 0}


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
