"""What a row is: its columns, its identity and its checksum.

Rows travel as plain tuples in the order of the columns. At a hundred thousand rows a second
an object per row would cost more than the work done on it.
"""

import struct
from hashlib import blake2b
from typing import Any, TypeAlias
from zlib import crc32

NewReading: TypeAlias = tuple[bytes, int, int, str, str, str, float, str, bytes, int]
"""event_id, received_us, timestamp_us, site_code, sensor_id, pi_tag, value, topic, payload, crc."""

Reading: TypeAlias = tuple[int, bytes, int, int, str, str, str, float, str, bytes, int]
"""seq, then the columns of a NewReading."""

Rejection: TypeAlias = tuple[int, str, str, str, bytes, int, int, int]
"""received_us, reason, detail, topic, payload (its first bytes), payload_bytes, qos, retained."""

READING_COLUMNS = (
    "event_id, received_us, timestamp_us, site_code, sensor_id, pi_tag, value, topic, payload, crc"
)
SEQ, EVENT_ID, RECEIVED_US, TIMESTAMP_US, SITE_CODE = range(5)
TOPIC, PAYLOAD = 8, 9

EVENT_ID_BYTES = 16

LAST_SEQ = "last_seq"
"""The counter of the spool that holds the highest seq ever given in its epoch."""

SELECT_LAST_SEQ = (
    f"SELECT coalesce((SELECT value FROM counter WHERE name = '{LAST_SEQ}'), "  # noqa: S608 - our own constant
    "(SELECT seq FROM sqlite_sequence WHERE name = 'reading_row'), 0)"
)
"""The second one is for a spool that its collector has not yet brought to format 4."""

_pack_numbers = struct.Struct("<qqd").pack
_INTEGER_BOUND = 2**63
"""SQLite's integers are below this."""


def event_id(topic: bytes, payload: bytes) -> bytes:
    """Return the identity of a message: the same on redelivery, elsewhere and after a replay.

    A NUL stands between the two: MQTT forbids it in topics (3.1.1, section 1.5.3), so no two
    messages share the hashed text.
    """
    return blake2b(topic + b"\0" + payload, digest_size=EVENT_ID_BYTES).digest()


def row_crc(identity: bytes, numbers: tuple[int, int, float], names: str, payload: bytes) -> int:
    """Return the CRC-32 of a row's content.

    Args:
        identity: The event id.
        numbers: received_us and timestamp_us, in microseconds since 1970 UTC, and the value.
        names: site_code, sensor_id, pi_tag and topic, one after the other.
        payload: As received.
    """
    received_us, timestamp_us, value = numbers
    # SQLite stores -0.0 as 0.0; adding 0.0 does the same here and nothing to other values.
    packed = _pack_numbers(received_us, timestamp_us, value + 0.0)
    return crc32(packed + identity + names.encode("utf-8", "surrogatepass") + payload)


def intact(row: Reading) -> bool:
    """Return whether the row's content still has its checksum."""
    _, identity, received_us, timestamp_us, site, sensor, tag, value, topic, payload, crc = row
    try:
        # row_crc() spelled out: every row that is delivered comes through here.
        packed = _pack_numbers(received_us, timestamp_us, value + 0.0)
        names = (site + sensor + tag + topic).encode("utf-8", "surrogatepass")
        return crc32(packed + identity + names + payload) == crc
    except (TypeError, ValueError, AttributeError, struct.error):
        return False  # a flipped bit of the row's header changes a column's type


def presentable(row: Reading) -> Reading:
    """Return a damaged row with every column in its type again, so that it can be kept."""
    seq, *columns = row
    kinds = (bytes, int, int, str, str, str, float, str, bytes, int)
    return (seq, *(_forced(kind, value) for kind, value in zip(kinds, columns, strict=True)))  # type: ignore[return-value]


def _forced(kind: type[Any], value: object) -> object:
    if isinstance(value, kind):
        return value
    if kind is str and isinstance(value, bytes):
        return lenient_text(value)
    if kind is bytes and isinstance(value, str):
        return value.encode()
    if kind in {int, float} and isinstance(value, int | float) and abs(value) < _INTEGER_BOUND:
        return kind(value)
    return kind()


def lenient_text(raw: bytes) -> str:
    """Return a TEXT column of a row whose bits may have changed; the checksum tells of it."""
    return raw.decode("utf-8", "replace")
