"""The write API's fake with Google's generated client before it, for the fake's own tests."""

import queue
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Self

import grpc
from google.cloud.bigquery_storage_v1 import types
from google.cloud.bigquery_storage_v1.services.big_query_write import BigQueryWriteClient
from google.cloud.bigquery_storage_v1.services.big_query_write.transports import (
    BigQueryWriteGrpcTransport,
)
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from tests.fakes import FakeBigQuery, FakeWriteApi
from tests.fakes.rows import Column

REF = "p.d.readings"
TABLE = "projects/p/datasets/d/tables/readings"
DEFAULT = f"{TABLE}/streams/_default"
HEADER = "x-goog-request-params"
SERVICE = "/google.cloud.bigquery.storage.v1.BigQueryWrite"
DEADLINE_S = 10.0

F = FieldDescriptorProto
COLUMNS = (
    Column("name", "STRING", "REQUIRED"),
    Column("at", "TIMESTAMP", "REQUIRED"),
    Column("value", "FLOAT64"),
    Column("n", "INT64"),
    Column("ok", "BOOL"),
    Column("raw", "BYTES"),
    Column("price", "NUMERIC"),
    Column("tags", "STRING", "REPEATED"),
)
FIELDS: dict[str, Any] = {
    "name": F.TYPE_STRING,
    "at": F.TYPE_INT64,
    "value": F.TYPE_DOUBLE,
    "n": F.TYPE_INT64,
    "ok": F.TYPE_BOOL,
    "raw": F.TYPE_BYTES,
    "price": F.TYPE_STRING,
    "tags": F.TYPE_STRING,
}
NOW = datetime.now(UTC).replace(microsecond=123456)
NOW_US = (NOW - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)

Row = dict[str, Any]

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def descriptor(fields: dict[str, Any]) -> descriptor_pb2.DescriptorProto:
    """Describe a type of row; `tags` is the one repeated field."""
    made = descriptor_pb2.DescriptorProto(name="Reading")
    for number, (field, kind) in enumerate(fields.items(), start=1):
        label = F.LABEL_REPEATED if field == "tags" else F.LABEL_OPTIONAL
        made.field.add(name=field, number=number, type=kind, label=label)
    return made


def serialized(rows: Iterable[Row], fields: dict[str, Any] | None = None) -> list[bytes]:
    """Return rows in protobuf."""
    file = descriptor_pb2.FileDescriptorProto(name="test.proto", package="test")
    file.message_type.add().CopyFrom(descriptor(fields or FIELDS))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    make = message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Reading"))
    return [make(**row).SerializeToString() for row in rows]


def reading(name: str = "a", **others: object) -> Row:
    """Return a good row."""
    return {"name": name, "at": NOW_US, **others}


def request(  # noqa: PLR0913 - each is a part of the request
    rows: Iterable[Row] = (),
    offset: int | None = None,
    *,
    stream: str = "",
    fields: dict[str, Any] | None = None,
    raw: Sequence[bytes] = (),
    trace_id: str = "",
) -> types.AppendRowsRequest:
    """Return a request.

    Args:
        rows: What to append.
        offset: Where, if it is said.
        stream: To which stream, if it is said.
        fields: The writer schema, if there is to be one.
        raw: Rows as they are, behind the others.
        trace_id: As it is.
    """
    made = types.AppendRowsRequest(write_stream=stream, trace_id=trace_id)
    made.proto_rows.rows.serialized_rows = [*serialized(rows, fields), *raw]
    if fields is not None:
        made.proto_rows.writer_schema.proto_descriptor = descriptor(fields)
    if offset is not None:
        made.offset = wrappers_pb2.Int64Value(value=offset)
    return made


def storage_error(status: object) -> types.StorageError | None:
    """Return the StorageError in the details of a google.rpc.Status, or of an exception."""
    for detail in getattr(status, "details"):  # noqa: B009 - neither class has types
        if detail.Is(types.StorageError.pb().DESCRIPTOR):
            found = types.StorageError()
            detail.Unpack(types.StorageError.pb(found))
            return found
    return None


def kind_of(status: object) -> str:
    """Return the name of the StorageError's code in the details of a status or an exception."""
    found = storage_error(status)
    return "" if found is None else found.code.name


def error_of(answer: types.AppendRowsResponse) -> tuple[str, str, str]:
    """Return code, StorageError's code and message of an answer's error."""
    assert "error" in answer, "the append was carried out"
    status = answer.error
    return _CODES[status.code], kind_of(status), status.message


class Call:
    """One AppendRows call of Google's client, whose first request brings stream and schema."""

    def __init__(
        self,
        client: BigQueryWriteClient,
        stream: str,
        *,
        header: str | None = None,
        fields: dict[str, Any] | None = None,
        trace_id: str = "",
    ) -> None:
        self._first: dict[str, Any] = {
            "stream": stream,
            "fields": fields or FIELDS,
            "trace_id": trace_id,
        }
        self._requests: queue.SimpleQueue[types.AppendRowsRequest | None] = queue.SimpleQueue()
        self._client = client
        self._header = f"write_stream={stream}" if header is None else header
        self._answers: Iterator[types.AppendRowsResponse] | None = None

    def send(self, rows: Iterable[Row] = (), offset: int | None = None, **more: object) -> None:
        """Send rows; `more` goes to `request`."""
        self.send_request(request(rows, offset, **{**self._first, **more}))

    def send_request(self, made: types.AppendRowsRequest) -> None:
        """Send a request as it is."""
        self._first = {}
        self._requests.put(made)

    def receive(self) -> types.AppendRowsResponse:
        """Return the next answer; the first one opens the call."""
        if self._answers is None:
            self._answers = iter(
                self._client.append_rows(
                    iter(self._requests.get, None),
                    retry=None,
                    timeout=DEADLINE_S,
                    metadata=((HEADER, self._header),),
                )
            )
        return next(self._answers)

    def append(
        self, rows: Iterable[Row] = (), offset: int | None = None, **more: object
    ) -> types.AppendRowsResponse:
        """Send rows and return the next answer."""
        self.send(rows, offset, **more)
        return self.receive()

    def close(self) -> None:
        """Send nothing more."""
        self._requests.put(None)


class Api:
    """Both fakes before one table, and Google's client.

    Args:
        how: For FakeWriteApi.
    """

    def __init__(self, **how: Any) -> None:  # noqa: ANN401 - whatever FakeWriteApi takes
        self.tables = FakeBigQuery()
        self.tables.create_table(REF, COLUMNS, partition_by=None)
        self.fake = FakeWriteApi(self.tables.store, **how)
        self._calls: list[Call] = []

    def __enter__(self) -> Self:
        """Serve, and connect."""
        self.tables.start()
        self.fake.start()
        options = [("grpc.max_send_message_length", -1), ("grpc.max_reconnect_backoff_ms", 100)]
        self.channel = grpc.insecure_channel(self.fake.address, options=options)
        self.client = BigQueryWriteClient(
            transport=BigQueryWriteGrpcTransport(channel=self.channel)
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End all calls and both fakes."""
        for call in self._calls:
            call.close()
        self.channel.close()
        self.fake.stop()
        self.tables.stop()

    @cached_property
    def stream(self) -> str:
        """One stream of the table, made when it is first asked for."""
        return self.create().name

    def create(self, table: str = TABLE, kind: str = "COMMITTED") -> types.WriteStream:
        """Create a stream."""
        return self.client.create_write_stream(
            parent=table,
            write_stream=types.WriteStream(type_=types.WriteStream.Type[kind]),  # type: ignore[misc] # proto-plus' enums are none to mypy
            retry=None,
            timeout=DEADLINE_S,
        )

    def get(self, name: str, view: str = "BASIC") -> types.WriteStream:
        """Get a stream."""
        return self.client.get_write_stream(
            request={"name": name, "view": view}, retry=None, timeout=DEADLINE_S
        )

    def finalize(self, name: str) -> int:
        """Finalize a stream; return its row count."""
        return self.client.finalize_write_stream(
            name=name, retry=None, timeout=DEADLINE_S
        ).row_count

    def open(self, stream: str = "", **how: Any) -> Call:  # noqa: ANN401 - whatever Call takes
        """Open an AppendRows call; without a name, for `self.stream`."""
        call = Call(self.client, stream or self.stream, **how)
        self._calls.append(call)
        return call

    def names(self, ref: str = REF) -> list[object]:
        """Return the name of each row of a table."""
        return [row["name"] for row in self.tables.rows(ref)]
