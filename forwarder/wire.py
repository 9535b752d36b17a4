"""The hot path of the Pub/Sub sink: a reading straight to the bytes of a PubsubMessage.

Building a message object per row, with a map of six attributes, takes several times what
concatenating its bytes takes, because most of them are the same for all readings of a tag.
The format is protobuf's wire format (https://protobuf.dev/programming-guides/encoding/), of
which only length-delimited fields are needed here:

* ``PubsubMessage``: data = 1, attributes = 2 (a map: entries with key = 1 and value = 2),
  ordering_key = 5;
* ``PublishRequest``: topic = 1, messages = 2.

``tests/test_wire.py`` parses the result with Google's own classes, field by field.
"""

from collections.abc import Iterable, Mapping

from forwarder.event import SCHEMA_VERSION, kpi_event
from spool import Reading

TAGS_CACHED = 10_000
"""So many (site, tag) pairs are remembered; a flood of invented ones starts anew."""

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

_EVENT_ID_HEX_BYTES = 32
_EVENT_ID_HEAD = attributes({"event_id": "0" * _EVENT_ID_HEX_BYTES})[:-_EVENT_ID_HEX_BYTES]
_SEQ_HEADS = [attributes({"seq": "0" * digits})[:-digits] for digits in range(1, 20)]
"""By the number of digits: SQLite's integers have at most 19."""


class MessageEncoder:
    """Makes the bytes of PublishRequests.

    Args:
        topic: ``projects/P/topics/T``.
        source: The attribute of that name.
    """

    def __init__(self, topic: str, source: str) -> None:
        self._head = field(_TOPIC, topic.encode())
        self._fixed = {"source": source, "schema_version": str(SCHEMA_VERSION)}
        self._tails: dict[tuple[str, str], bytes] = {}

    def message(self, row: Reading) -> bytes:
        """Return the reading as the field ``messages`` of a PublishRequest."""
        site, tag = row[4], row[6]
        tail = self._tails.get((site, tag))
        if tail is None:
            tail = self._tail(site, tag)
        data = kpi_event(row)
        seq = str(row[0]).encode()
        size = len(data)
        length = _LENGTHS[size] if size < 4096 else varint(size)  # noqa: PLR2004 - the table's
        message = b"".join(
            (
                _DATA_TAG,
                length,
                data,
                _EVENT_ID_HEAD,
                row[1].hex().encode(),
                _SEQ_HEADS[len(seq) - 1],
                seq,
                tail,
            )
        )
        size = len(message)
        return _MESSAGE_TAG + (_LENGTHS[size] if size < 4096 else varint(size)) + message  # noqa: PLR2004

    def _tail(self, site: str, tag: str) -> bytes:
        """Return what all messages of a tag have in common."""
        if len(self._tails) >= TAGS_CACHED:
            self._tails.clear()
        named = {"site_code": site, "kpi_name": tag, **self._fixed}
        tail = attributes(named) + field(_ORDERING_KEY, site.encode())
        self._tails[site, tag] = tail
        return tail

    def request(self, messages: Iterable[bytes]) -> bytes:
        """Return the request that publishes ``messages``, each from :meth:`message`."""
        return self._head + b"".join(messages)
