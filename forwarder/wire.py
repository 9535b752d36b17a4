"""The hot path of the Pub/Sub sink: readings straight to the bytes of a PublishRequest.

Most of a message is the same for all readings of a tag: the event's names, the attributes, the
ordering key. So a tag's message is made once, as a template, and a reading only fills in its id,
times, value and seq. Building a message object per row, with a map of six attributes, takes many
times that.

The format is protobuf's wire format (https://protobuf.dev/programming-guides/encoding/), of
which only length-delimited fields are needed here:

* ``PubsubMessage``: data = 1, attributes = 2 (a map: entries with key = 1 and value = 2),
  ordering_key = 5;
* ``PublishRequest``: topic = 1, messages = 2.

``tests/test_wire.py`` parses the result with Google's own classes, field by field.
"""

from binascii import hexlify
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from forwarder.event import SCHEMA_VERSION, event_template, json_bytes, rfc3339, second
from spool import Reading

TEMPLATES_MAX_BYTES = 4 * 1024 * 1024
"""Room for the templates of some 8,000 tags; a flood of invented ones starts anew."""

_DATA, _ATTRIBUTES, _ORDERING_KEY = 1, 2, 5
_TOPIC, _MESSAGES = 1, 2
_KEY, _VALUE = 1, 2


def varint(number: int) -> bytes:
    """Return ``number`` in base 128, least significant group first."""
    if number < 128:  # noqa: PLR2004 - the continuation bit
        return bytes((number,))
    groups = bytearray()
    while number >= 128:  # noqa: PLR2004 - the continuation bit
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field (wire type 2)."""
    return bytes((number << 3 | 2,)) + varint(len(content)) + content


def attributes(values: Mapping[str, str]) -> bytes:
    """Return the entries of a message's map ``attributes``."""
    return b"".join(
        field(_ATTRIBUTES, field(_KEY, key.encode()) + field(_VALUE, value.encode()))
        for key, value in values.items()
    )


_MESSAGE_TAG = bytes((_MESSAGES << 3 | 2,))
_DATA_TAG = bytes((_DATA << 3 | 2,))
_LENGTHS = [varint(length) for length in range(4096)]
"""Messages are mostly below 4 KiB, and a look-up is quicker than arithmetic."""

_HEX_ID = b"0" * 32
_TIME = rfc3339(0).encode()
_EVENT_ID_HEAD = attributes({"event_id": _HEX_ID.decode()}).removesuffix(_HEX_ID)
_SEQ_HEADS = [attributes({"seq": "0" * digits})[:-digits] for digits in range(1, 20)]
"""By the number of digits: SQLite's integers have at most 19."""

_Template: TypeAlias = tuple[bytes, int, int]
"""The field ``messages`` with places (:meth:`MessageEncoder.request` fills them); the length of
its data without the value; the length of what surrounds the data, without the attribute seq."""


class MessageEncoder:
    """Makes the bytes of PublishRequests.

    Args:
        topic: ``projects/P/topics/T``.
        source: The attribute of that name.
    """

    def __init__(self, topic: str, source: str) -> None:
        self._head = field(_TOPIC, topic.encode())
        self._fixed = {"source": source, "schema_version": str(SCHEMA_VERSION)}
        self._templates: dict[tuple[str, str, str, str], _Template] = {}
        self._templates_bytes = 0

    def request(self, rows: Iterable[Reading]) -> bytes:
        """Return the request that publishes ``rows``, whose event ids have 16 bytes."""
        templates = self._templates
        parts = [self._head]
        received_us, received_at = 0, _TIME
        for row in rows:
            seq, event_id, row_received_us, timestamp_us, site, sensor, tag, number, topic, _, _ = (
                row
            )
            names = (site, sensor, tag, topic)
            template, size, around = templates.get(names) or self._template(*names)
            if row_received_us != received_us:  # all that one packet brought have the same
                received_us, received_at = row_received_us, rfc3339(row_received_us).encode()
            seconds, microseconds = divmod(timestamp_us, 1_000_000)
            hex_id = hexlify(event_id)
            value = json_bytes(number)
            digits = b"%d" % seq
            seq_head = _SEQ_HEADS[len(digits) - 1]
            size += len(value)
            length = _LENGTHS[size] if size < 4096 else varint(size)  # noqa: PLR2004 - the table's
            size += len(length) + around + len(seq_head) + len(digits)
            parts.append(
                template
                % (
                    _LENGTHS[size] if size < 4096 else varint(size),  # noqa: PLR2004
                    length,
                    hex_id,
                    second(seconds),
                    microseconds,
                    value,
                    received_at,
                    hex_id,
                    seq_head + digits,
                )
            )
        return b"".join(parts)

    def _template(self, site: str, sensor: str, tag: str, topic: str) -> _Template:
        """Make, and remember, what all messages of a tag have in common."""
        event = event_template(site, sensor, tag, topic)
        named = {"site_code": site, "kpi_name": tag, **self._fixed}
        tail = attributes(named) + field(_ORDERING_KEY, site.encode())
        template = b"".join(
            (
                *(_MESSAGE_TAG, b"%b", _DATA_TAG, b"%b", event),
                *(_escaped(_EVENT_ID_HEAD), b"%b", b"%b", _escaped(tail)),
            )
        )
        made = (
            template,
            len(event % (_HEX_ID, _TIME[:19], 0, b"", _TIME)),
            len(_DATA_TAG + _EVENT_ID_HEAD + _HEX_ID + tail),
        )
        self._templates_bytes += len(template)
        if self._templates_bytes > TEMPLATES_MAX_BYTES:
            self._templates.clear()
            self._templates_bytes = len(template)
        self._templates[site, sensor, tag, topic] = made
        return made


def _escaped(text: bytes) -> bytes:
    return text.replace(b"%", b"%%")
