"""What a row is: its columns, its identity and its checksum.

Rows travel as plain tuples in the order of the columns. At a hundred thousand rows a second
an object per row would cost more than the work done on it.
"""

import struct
from hashlib import blake2b
from typing import TypeAlias
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
PAYLOAD = 9

EVENT_ID_BYTES = 16
_NUMBERS = struct.Struct("<qqd")


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
    packed = _NUMBERS.pack(*numbers)
    return crc32(payload, crc32(packed + identity + names.encode("utf-8", "surrogatepass")))


def intact(row: Reading) -> bool:
    """Return whether the row's content still has its checksum."""
    _, identity, received_us, timestamp_us, site, sensor, tag, value, topic, payload, crc = row
    names = site + sensor + tag + topic
    return row_crc(identity, (received_us, timestamp_us, value), names, payload) == crc
