"""The bytes of AppendRowsRequests, parsed with Google's classes and the descriptor they carry."""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from google.cloud.bigquery_storage_v1 import types
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from forwarder.rowproto import MESSAGE_NAME, TAGS_CACHED, RequestEncoder, row_descriptor
from forwarder.table import COLUMNS, Column
from spool import Reading

AppendRowsRequest = types.AppendRowsRequest.pb()
STREAM = "projects/p-1/datasets/d/tables/t/streams/s"

INT64 = st.integers(-(2**63), 2**63 - 1)
# A lone surrogate is no text: the collector refuses it, and SQLite cannot give it back.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
READINGS = st.tuples(
    st.integers(1, 2**63 - 1),
    st.binary(min_size=16, max_size=16),
    INT64,
    INT64,
    TEXT,
    TEXT,
    TEXT,
    st.floats(allow_nan=False),
    TEXT,
    TEXT.map(str.encode),
    st.just(0),
)


def messages(request: bytes, columns: Sequence[Column]) -> list[Any]:
    """Return the rows of a request, read with the descriptor that belongs to the columns."""
    parsed = AppendRowsRequest.FromString(request)
    proto = parsed.proto_rows.writer_schema.proto_descriptor
    assert proto == row_descriptor(columns)
    row = row_class(proto.SerializeToString())
    return [row.FromString(content) for content in parsed.proto_rows.rows.serialized_rows]


@cache
def row_class(descriptor: bytes) -> Any:  # noqa: ANN401 - made at run time
    file = descriptor_pb2.FileDescriptorProto(name="row.proto", package="rows")
    file.message_type.add().MergeFromString(descriptor)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"rows.{MESSAGE_NAME}"))


def expected(row: Reading, source: str) -> dict[str, object]:
    seq, identity, received_us, timestamp_us, site, sensor, tag, value, topic, payload, _ = row
    return {
        "event_id": identity.hex(),
        "site_code": site,
        "sensor_id": sensor,
        "pi_tag": tag,
        "timestamp": timestamp_us,
        "value": value,
        "topic": topic,
        "payload": payload.decode(),
        "received_at": received_us,
        "source": source,
        "seq": seq,
    }


def bits(value: object) -> object:
    """Return a float as its bits: 0.0 and -0.0 are equal otherwise."""
    return struct.pack("<d", value) if isinstance(value, float) else value


@given(st.lists(READINGS, min_size=1, max_size=6))
def test_every_column_of_every_row_comes_out_as_it_went_in(rows: list[Reading]) -> None:
    encoder = RequestEncoder(COLUMNS, "gate-1")
    request = encoder.request(encoder.rows(rows), 7, stream=STREAM)
    for message, row in zip(messages(request, COLUMNS), rows, strict=True):
        for name, value in expected(row, "gate-1").items():
            assert message.HasField(name), f"{name} is present, also where it is 0 or empty"
            assert bits(getattr(message, name)) == bits(value), name


@given(st.lists(READINGS, min_size=1, max_size=3), st.sets(st.sampled_from(COLUMNS)))
def test_columns_that_the_table_lacks_are_not_written(
    rows: list[Reading], lacking: set[Column]
) -> None:
    columns = [c for c in COLUMNS if c.required or c not in lacking]
    encoder = RequestEncoder(columns, "gate-1")
    request = encoder.request(encoder.rows(rows), 0, stream=STREAM)
    for message, row in zip(messages(request, columns), rows, strict=True):
        assert {f.name for f, _ in message.ListFields()} == {c.name for c in columns}
        for column in columns:
            assert getattr(message, column.name) == expected(row, "gate-1")[column.name]


READING: Reading = (1, bytes(16), 2, 3, "S", "T", "P", 4.5, "t", b"{}", 0)


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**40])
def test_a_request_names_stream_schema_and_offset(offset: int) -> None:
    encoder = RequestEncoder(COLUMNS, "gate-1")
    parsed = AppendRowsRequest.FromString(
        encoder.request(encoder.rows([READING]), offset, stream=STREAM)
    )
    assert parsed.write_stream == STREAM
    assert parsed.HasField("offset"), "an offset of 0 is one"
    assert parsed.offset.value == offset
    assert parsed.trace_id == "sluice:gate-1"
    assert len(parsed.proto_rows.rows.serialized_rows) == 1


def test_a_later_request_leaves_out_what_the_connection_knows() -> None:
    encoder = RequestEncoder(COLUMNS, "gate-1")
    parsed = AppendRowsRequest.FromString(encoder.request(encoder.rows([READING] * 3), 5))
    assert not parsed.write_stream
    assert not parsed.proto_rows.HasField("writer_schema")
    assert len(parsed.proto_rows.rows.serialized_rows) == 3


def test_the_default_stream_gets_no_offset() -> None:
    encoder = RequestEncoder(COLUMNS, "gate-1")
    request = encoder.request(encoder.rows([READING]), None, stream=STREAM)
    assert not AppendRowsRequest.FromString(request).HasField("offset")


def test_a_flood_of_tags_does_not_fill_the_memory() -> None:
    encoder = RequestEncoder(COLUMNS, "gate-1")
    for number in range(TAGS_CACHED + 10):
        (content,) = encoder.rows([(*READING[:5], f"T{number}", *READING[6:])])
        assert f"T{number}".encode() in content
    assert len(encoder._tails) <= TAGS_CACHED  # noqa: SLF001 - the claim is about the inside


def test_neighbouring_times_and_strangers_do_not_mix() -> None:
    """What is remembered of one time must not leak into another."""
    times = [1_795_512_846_223_306, 1_795_512_846_223_307, 5, -5, 1_795_512_846_223_306, 2**62]
    rows: list[Reading] = [(n, *READING[1:2], t, t, *READING[4:]) for n, t in enumerate(times, 1)]
    encoder = RequestEncoder(COLUMNS, "gate-1")
    request = encoder.request(encoder.rows(rows), 0, stream=STREAM)
    assert [m.timestamp for m in messages(request, COLUMNS)] == times
    assert [m.received_at for m in messages(request, COLUMNS)] == times
