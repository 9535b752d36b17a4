"""The hot path of the write API's sink: readings straight to the bytes of AppendRowsRequests.

Rows are protobuf messages of a type that is described at run time
(https://cloud.google.com/bigquery/docs/supported-data-types#supported_protocol_buffer_data_types):
a TIMESTAMP is an ``int64`` of microseconds since 1970 UTC. Arrow would save 1 µs a row, and cost
68 MB of memory for pyarrow.

As in :mod:`forwarder.wire`, most bytes of a row are the same for all readings of a tag, and
concatenating them costs a fraction of building objects. ``tests/test_rowproto.py`` parses the
result with Google's classes and with the very descriptor that is sent.
"""

import struct
from collections.abc import Iterable, Sequence

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto

from forwarder.table import COLUMNS, Column
from forwarder.wire import field, varint
from spool import Reading

MESSAGE_NAME = "Reading"
TAGS_CACHED = 10_000
"""So many (site, sensor, tag, topic) are remembered; a flood of invented ones starts anew."""

_TYPES = {
    "STRING": FieldDescriptorProto.TYPE_STRING,
    "TIMESTAMP": FieldDescriptorProto.TYPE_INT64,
    "FLOAT64": FieldDescriptorProto.TYPE_DOUBLE,
    "INT64": FieldDescriptorProto.TYPE_INT64,
}
_NUMBERS = {column.name: number for number, column in enumerate(COLUMNS, start=1)}

# AppendRowsRequest, AppendRowsRequest.ProtoData, ProtoSchema, ProtoRows and Int64Value:
# https://github.com/googleapis/googleapis/blob/master/google/cloud/bigquery/storage/v1/storage.proto
_WRITE_STREAM, _OFFSET, _PROTO_ROWS, _TRACE_ID = 1, 2, 4, 6
_WRITER_SCHEMA, _ROWS = 1, 2
_PROTO_DESCRIPTOR = 1
_SERIALIZED_ROWS_TAG = bytes((1 << 3 | 2,))
_INT64_VALUE_TAG = bytes((1 << 3,))

_PAIR_BITS = 14
_PAIR_MASK = (1 << _PAIR_BITS) - 1
_PAIRS = [bytes((n & 127 | 128, n >> 7 | 128)) for n in range(1 << _PAIR_BITS)]
"""Two groups of a longer varint at once: looking up is quicker than arithmetic."""

_LENGTHS = [varint(length) for length in range(4096)]
_double = struct.Struct("<d").pack


def _varint_field(name: str) -> bytes:
    return bytes((_NUMBERS[name] << 3,))


def _bytes_field(name: str) -> bytes:
    return bytes((_NUMBERS[name] << 3 | 2,))


_EVENT_ID_HEAD = _bytes_field("event_id") + varint(32)
_TIMESTAMP_TAG = _varint_field("timestamp")
_VALUE_TAG = bytes((_NUMBERS["value"] << 3 | 1,))
_PAYLOAD_TAG = _bytes_field("payload")
_RECEIVED_TAG = _varint_field("received_at")
_SEQ_TAG = _varint_field("seq")
_NO_TIME = 1 << 63
"""Beyond every int64: equal to none that is looked for."""

_NEGATIVE = 1 << 64
"""A negative int64 is encoded as its two's complement of 64 bits."""


def int64(number: int) -> bytes:
    """Return ``number`` as a varint of protobuf's int64."""
    return varint(number if number >= 0 else number + _NEGATIVE)


def row_descriptor(columns: Sequence[Column]) -> DescriptorProto:
    """Return the type of a row with these columns. Field numbers do not depend on the choice."""
    descriptor = DescriptorProto(name=MESSAGE_NAME)
    for column in columns:
        descriptor.field.add(
            name=column.name,
            number=_NUMBERS[column.name],
            type=_TYPES[column.sql_type],
            # Presence is explicit in proto2, so that a value of 0 is written and not missing.
            label=FieldDescriptorProto.LABEL_OPTIONAL,
        )
    return descriptor


class RequestEncoder:
    """Makes requests that append readings to one stream.

    Args:
        columns: Those to write; the required ones among them.
        source: INSTANCE_ID.
    """

    def __init__(self, columns: Sequence[Column], source: str) -> None:
        names = {column.name for column in columns}
        self._with_payload = "payload" in names
        self._with_received = "received_at" in names
        self._with_seq = "seq" in names
        self._constants = names & {"site_code", "sensor_id", "pi_tag", "topic"}
        source_field = field(_NUMBERS["source"], source.encode())
        self._source = source_field if "source" in names else b""
        self._schema = field(
            _WRITER_SCHEMA, field(_PROTO_DESCRIPTOR, row_descriptor(columns).SerializeToString())
        )
        self._trace_id = field(_TRACE_ID, f"sluice:{source}".encode()[:128])
        self._tails: dict[tuple[str, str, str, str], bytes] = {}
        self._high = (_NO_TIME, b"")
        self._received = (_NO_TIME, b"")

    def rows(self, rows: Iterable[Reading]) -> list[bytes]:
        """Return the readings as entries of ``ProtoRows.serialized_rows``."""
        return [self._row(row) for row in rows]

    def _row(self, row: Reading) -> bytes:
        seq, identity, received_us, timestamp_us, site, sensor, tag, value, topic, payload, _ = row
        tail = self._tails.get((site, sensor, tag, topic))
        if tail is None:
            tail = self._tail(site, sensor, tag, topic)
        if received_us != self._received[0]:
            self._received = (received_us, self._received_field(received_us))
        size = len(payload)
        content = b"".join(
            (
                _EVENT_ID_HEAD,
                identity.hex().encode(),
                _TIMESTAMP_TAG,
                self._moment(timestamp_us),
                _VALUE_TAG,
                _double(value),
                _PAYLOAD_TAG if self._with_payload else b"",
                (_LENGTHS[size] if size < 4096 else varint(size)) if self._with_payload else b"",  # noqa: PLR2004 - the table's
                payload if self._with_payload else b"",
                self._received[1],
                _SEQ_TAG + varint(seq) if self._with_seq else b"",
                tail,
            )
        )
        size = len(content)
        length = _LENGTHS[size] if size < 4096 else varint(size)  # noqa: PLR2004 - the table's
        return _SERIALIZED_ROWS_TAG + length + content

    def _moment(self, microseconds: int) -> bytes:
        """Return an int64; neighbouring times share all but its lowest four groups."""
        high = microseconds >> 2 * _PAIR_BITS
        if high != self._high[0]:
            if high <= 0:
                return int64(microseconds)
            self._high = (high, varint(high))
        return (
            _PAIRS[microseconds & _PAIR_MASK]
            + _PAIRS[microseconds >> _PAIR_BITS & _PAIR_MASK]
            + self._high[1]
        )

    def _received_field(self, received_us: int) -> bytes:
        return _RECEIVED_TAG + int64(received_us) if self._with_received else b""

    def _tail(self, site: str, sensor: str, tag: str, topic: str) -> bytes:
        """Return what all rows of a tag have in common."""
        if len(self._tails) >= TAGS_CACHED:
            self._tails.clear()
        values = {"site_code": site, "sensor_id": sensor, "pi_tag": tag, "topic": topic}
        tail = self._source + b"".join(
            field(_NUMBERS[name], text.encode())
            for name, text in values.items()
            if name in self._constants
        )
        self._tails[site, sensor, tag, topic] = tail
        return tail

    def request(self, rows: Iterable[bytes], offset: int | None, *, stream: str = "") -> bytes:
        """Return the request that appends ``rows``, each from :meth:`rows`.

        Args:
            rows: At least one.
            offset: Of the first of them; None to leave it to the service.
            stream: Its name, in the first request of a connection, which also tells the type
                of the rows; later ones leave both out.
        """
        content = b"".join(rows)
        data = (self._schema if stream else b"") + field(_ROWS, content)
        parts = [
            field(_WRITE_STREAM, stream.encode()) if stream else b"",
            b"" if offset is None else field(_OFFSET, _INT64_VALUE_TAG + varint(offset)),
            field(_PROTO_ROWS, data),
            self._trace_id if stream else b"",
        ]
        return b"".join(parts)
