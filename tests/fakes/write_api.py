"""A fake of the BigQuery Storage Write API: gRPC on a real socket, before the REST fake's tables.

Documented, and enforced: the routing header, requests below 10 MB, the writer schema in the first
request of a connection, offsets, all or none of a request's rows, errors inside an answer while
the connection goes on, `updated_schema` some appends after a change of the table, streams that
are finalized or forgotten. Assumed: a request that cannot be read at all (no stream, no schema,
too large, a wrong routing header) ends the call with INVALID_ARGUMENT.
https://cloud.google.com/bigquery/docs/reference/storage/rpc/google.cloud.bigquery.storage.v1
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.cloud.bigquery_storage_v1 import types
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, status_pb2  # type: ignore[import-untyped]

from tests.fakes.faults import Delay, FaultPlan, Hang, LoseAnswer
from tests.fakes.pubsub import HOST, MAX_WIRE_BYTES, WORKERS, Abort
from tests.fakes.rows import Row
from tests.fakes.tables import Table, TableStore
from tests.fakes.write_rows import SchemaError, check_schema, decode_rows
from tests.fakes.write_streams import StreamError, WriteStreams

REQUEST_MAX_BYTES = 10_000_000
ROW_ERRORS_TEXT = (
    "Errors found while processing rows. Please refer to the row_errors field for details. The "
    "list may not be complete because of the size limitations."
)
SERVICE = "google.cloud.bigquery.storage.v1.BigQueryWrite"

_AppendRowsRequest = types.AppendRowsRequest.pb()
_AppendRowsResponse = types.AppendRowsResponse.pb()
_CreateWriteStreamRequest = types.CreateWriteStreamRequest.pb()
_FinalizeWriteStreamRequest = types.FinalizeWriteStreamRequest.pb()
_FinalizeWriteStreamResponse = types.FinalizeWriteStreamResponse.pb()
_GetWriteStreamRequest = types.GetWriteStreamRequest.pb()
_StorageError = types.StorageError.pb()
_TableFieldSchema = types.TableFieldSchema.pb()
_TableSchema = types.TableSchema.pb()
_WriteStream = types.WriteStream.pb()

_SCHEMA_TYPES = {"INTEGER": "INT64", "FLOAT": "DOUBLE", "BOOLEAN": "BOOL"}


@dataclass(frozen=True, slots=True)
class InStream:
    """Answer an append with this error inside the stream; it is not carried out, or is."""

    code: str
    message: str
    carried_out: bool = False


class WriteFaults(FaultPlan):
    """Faults for the requests to come; the default call is AppendRows, where each append counts.

    Attributes:
        poison: a predicate on a row. An append with such a row is refused.
        incomplete: whether only the first bad row of an append is named.
        before_append: called with stream and offset before an append is carried out.
        after_append: called with stream and offset after it was, before the answer.
    """

    def __init__(self) -> None:
        super().__init__("AppendRows")
        self.poison: Callable[[Row], bool] | None = None
        self.incomplete = False
        self.before_append: Callable[[str, int], None] = lambda *_: None
        self.after_append: Callable[[str, int], None] = lambda *_: None

    def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        times: int | None = 1,
        calls: set[str] | None = None,
    ) -> None:
        """End the next `times` calls with `code`; for AppendRows, at an append."""
        self.add(Abort(code, details), times, calls)

    def refuse(
        self, code: str, message: str = "", times: int | None = 1, *, carried_out: bool = False
    ) -> None:
        """Answer the next `times` appends with an error inside the stream."""
        self.add(InStream(code, message or code, carried_out), times)

    def clear(self) -> None:
        """Forget every fault, the poison too, and let go of what hangs."""
        self.poison = None
        self.incomplete = False
        self.before_append = self.after_append = lambda *_: None
        super().clear()


@dataclass
class _Connection:
    """What an AppendRows call has said so far."""

    routing: str
    stream: str = ""
    descriptor: bytes = b""
    etag: str = ""
    lag: int = 0


@dataclass
class Appended:
    """One append that was carried out."""

    stream: str
    offset: int | None
    rows: int
    size: int = field(compare=False)


class FakeWriteApi:
    """A Storage Write API server on 127.0.0.1, usable as a context manager.

    Args:
        store: The tables, as in FakeBigQuery.
        port: Where to listen; 0 takes a free port and keeps it for restarts.
        latency_s: How long after its arrival an append is answered. Several may be under way.
        strict: False does not look into rows: for benchmarks.
        schema_lag: So many appends after a change of the table `updated_schema` tells of it.
    """

    def __init__(
        self,
        store: TableStore,
        port: int = 0,
        *,
        latency_s: float = 0.0,
        strict: bool = True,
        schema_lag: int = 1,
    ) -> None:
        self.port = port
        self.store = store
        self.streams = WriteStreams(store)
        self.faults = WriteFaults()
        self.latency_s = latency_s
        self.schema_lag = schema_lag
        self.appended: list[Appended] = []
        self.calls = 0
        self._strict = strict
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Start to serve."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop to serve."""
        self.stop()

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        return f"{HOST}:{self.port}"

    def start(self) -> Self:
        """Listen, on the port of last time if there was one; return once it is open."""
        if self._server is not None:
            raise RuntimeError(f"already serving at {self.address}")
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="fake-write-api")
        server = grpc.server(
            self._pool,
            handlers=[
                grpc.method_handlers_generic_handler(
                    SERVICE,
                    {
                        "CreateWriteStream": grpc.unary_unary_rpc_method_handler(
                            self._unary("CreateWriteStream", "parent", self._create)
                        ),
                        "GetWriteStream": grpc.unary_unary_rpc_method_handler(
                            self._unary("GetWriteStream", "name", self._get)
                        ),
                        "FinalizeWriteStream": grpc.unary_unary_rpc_method_handler(
                            self._unary("FinalizeWriteStream", "name", self._finalize)
                        ),
                        "AppendRows": grpc.stream_stream_rpc_method_handler(self._append_rows),
                    },
                )
            ],
            options=[
                ("grpc.so_reuseport", 0),  # a port that is taken must be an error
                ("grpc.max_receive_message_length", MAX_WIRE_BYTES),
                ("grpc.max_send_message_length", MAX_WIRE_BYTES),
                # The official clients ping; a server that calls that abuse hangs up.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self.port = server.add_insecure_port(self.address)
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """Go away: connections are refused, calls under way fail. The store stays."""
        if self._server is None or self._pool is None:
            return
        stopped = self._server.stop(grace=None)
        self.faults.release()
        stopped.wait()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server = None
        self._pool = None

    # The calls with one answer.

    def _unary(
        self, call: str, routed_by: str, handle: Callable[[bytes], tuple[str, Any]]
    ) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def serve(raw: bytes, context: grpc.ServicerContext) -> bytes:
            fault = self.faults.take(call)
            try:
                if isinstance(fault, Abort):
                    raise _ended(context, fault.code, fault.details)
                self._hold(fault, context)
                name, answer = handle(raw)
                _check_routing(context, f"{routed_by}={name}")
                if isinstance(fault, LoseAnswer):
                    raise _ended(context, grpc.StatusCode.UNAVAILABLE, "Socket closed")
            except StreamError as error:
                raise _ended(context, grpc.StatusCode[error.code], str(error)) from error
            wire: bytes = answer.SerializeToString()
            return wire

        return serve

    def _create(self, raw: bytes) -> tuple[str, Any]:
        request = _CreateWriteStreamRequest.FromString(raw)
        if request.write_stream.type_ != _WriteStream.COMMITTED:
            raise StreamError("UNIMPLEMENTED", "", "only COMMITTED streams are made here")
        stream = self.streams.create(request.parent)
        return request.parent, _shown(stream.name, stream.table)

    def _get(self, raw: bytes) -> tuple[str, Any]:
        name = _GetWriteStreamRequest.FromString(raw).name
        stream = self.streams.stream(name)
        return name, _shown(stream.name, stream.table)

    def _finalize(self, raw: bytes) -> tuple[str, Any]:
        name = _FinalizeWriteStreamRequest.FromString(raw).name
        return name, _FinalizeWriteStreamResponse(row_count=self.streams.finalize(name))

    # AppendRows.

    def _append_rows(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        self.calls += 1
        routing = dict(context.invocation_metadata()).get("x-goog-request-params", "")
        connection = _Connection(str(routing))
        if not self.latency_s:
            for raw in requests:
                yield self._append(connection, raw, context)
            return
        yield from self._answer_later(connection, requests, context)

    def _answer_later(
        self, connection: _Connection, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """Answer each append `latency_s` after it came, while others come in."""
        answers: queue.SimpleQueue[tuple[float, bytes | Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            end: Exception | None = None
            try:
                for raw in requests:
                    due = time.monotonic() + self.latency_s
                    answers.put((due, self._append(connection, raw, context)))
            except Exception as error:  # noqa: BLE001 - raised again where gRPC looks for it
                end = error
            answers.put((0.0, end))

        threading.Thread(target=work, daemon=True).start()
        while True:
            due, answer = answers.get()
            if answer is None:
                return
            if isinstance(answer, Exception):
                raise answer
            time.sleep(max(0.0, due - time.monotonic()))
            yield answer

    def _append(self, connection: _Connection, raw: bytes, context: grpc.ServicerContext) -> bytes:
        """Carry one append out; return its answer, or end the call."""
        fault = self.faults.take("AppendRows")
        if isinstance(fault, Abort):
            raise _ended(context, fault.code, fault.details)
        self._hold(fault, context)
        if isinstance(fault, InStream) and not fault.carried_out:
            return _wire(_error(fault.code, "", fault.message))
        try:
            request = _AppendRowsRequest.FromString(raw)
            self._check_request(connection, request, len(raw))
        except (StreamError, DecodeError) as error:
            code = getattr(error, "code", "INVALID_ARGUMENT")
            raise _ended(context, grpc.StatusCode[code], str(error)) from error
        answer = self._carry_out(connection, request, len(raw))
        if isinstance(fault, LoseAnswer):
            raise _ended(context, grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if isinstance(fault, InStream):
            return _wire(_error(fault.code, "", fault.message))
        return _wire(answer)

    def _hold(self, fault: object, context: grpc.ServicerContext) -> None:
        if isinstance(fault, (Hang, Delay)):
            context.add_callback(self.faults.wake)
            delay_s = fault.delay_s if isinstance(fault, Delay) else None
            if not self.faults.hold(delay_s, lambda: not context.is_active()):
                raise _ended(context, grpc.StatusCode.UNAVAILABLE, "The fake let go of it.")

    def _check_request(self, connection: _Connection, request: Any, size: int) -> None:  # noqa: ANN401 - protobuf's class
        """Raise StreamError for what ends the call."""
        if size > REQUEST_MAX_BYTES:
            text = f"AppendRows request too large: {size} limit {REQUEST_MAX_BYTES}"
            raise StreamError("INVALID_ARGUMENT", "", text)
        if request.write_stream:
            if connection.stream not in {"", request.write_stream}:
                raise StreamError("INVALID_ARGUMENT", "", "another stream on this connection")
            connection.stream = request.write_stream
        if connection.routing != f"write_stream={connection.stream}" or not connection.stream:
            text = f"routing header {connection.routing!r} for stream {connection.stream!r}"
            raise StreamError("INVALID_ARGUMENT", "", text)
        schema = request.proto_rows.writer_schema
        if schema.HasField("proto_descriptor"):
            connection.descriptor = schema.proto_descriptor.SerializeToString()
            table = self.streams.table(connection.stream)
            connection.etag, connection.lag = table.etag, 0
        if not connection.descriptor:
            raise StreamError("INVALID_ARGUMENT", "", "Schema must be specified in first request")
        if not request.proto_rows.rows.serialized_rows:
            raise StreamError("INVALID_ARGUMENT", "", "Rows must be specified")

    def _carry_out(self, connection: _Connection, request: Any, size: int) -> Any:  # noqa: ANN401 - protobuf's classes
        rows = list(request.proto_rows.rows.serialized_rows)
        offset = request.offset.value if request.HasField("offset") else None
        try:
            table = self.streams.table(connection.stream)
            self.faults.before_append(connection.stream, offset if offset is not None else -1)
            load, errors = self._read(connection, table, rows)
            if errors:
                self._check_offset(connection.stream, offset)
                answer = _error("INVALID_ARGUMENT", "", ROW_ERRORS_TEXT)
                for index, problem in errors[: 1 if self.faults.incomplete else None]:
                    answer.row_errors.add(index=index, code=1, message=problem)
                return answer
            there = self.streams.append(connection.stream, offset, len(rows), load)
        except StreamError as error:
            return _error(error.code, error.kind, str(error))
        except SchemaError as error:
            kind = "SCHEMA_MISMATCH_EXTRA_FIELDS" if error.extra_fields else ""
            return _error("INVALID_ARGUMENT", kind, f"{error} Entity: {connection.stream}")
        self.appended.append(Appended(connection.stream, there, len(rows), size))
        self.faults.after_append(connection.stream, there if there is not None else -1)
        answer = _AppendRowsResponse(write_stream=connection.stream)
        answer.append_result.SetInParent()
        if there is not None:
            answer.append_result.offset.value = there
        self._tell_schema(connection, table, answer)
        return answer

    def _check_offset(self, name: str, offset: int | None) -> None:
        """An offset is judged before the rows are; appending nothing does just that."""
        self.streams.append(name, offset, 0, list)

    def _read(
        self, connection: _Connection, table: Table, serialized: list[bytes]
    ) -> tuple[Callable[[], list[Row]], list[tuple[int, str]]]:
        descriptor, columns = connection.descriptor, dict(table.columns)
        if not self._strict:
            return lambda: decode_rows(descriptor, columns, serialized)[0], []
        parsed = types.ProtoSchema.pb()()
        parsed.proto_descriptor.MergeFromString(descriptor)
        check_schema(parsed.proto_descriptor, columns)
        rows, errors = decode_rows(descriptor, columns, serialized)
        poison = self.faults.poison
        if poison is not None:
            known = {index for index, _ in errors}
            errors += [
                (index, "poisoned, as planned")
                for index, row in enumerate(rows)
                if index not in known and poison(row)
            ]
        return lambda: rows, sorted(errors)

    def _tell_schema(self, connection: _Connection, table: Table, answer: Any) -> None:  # noqa: ANN401 - protobuf's class
        if table.etag == connection.etag:
            return
        connection.lag += 1
        if connection.lag >= self.schema_lag:
            connection.etag, connection.lag = table.etag, 0
            answer.updated_schema.CopyFrom(_schema(table))


def _schema(table: Table) -> Any:  # noqa: ANN401 - protobuf's class
    schema = _TableSchema()
    for column in table.columns.values():
        schema.fields.add(
            name=column.name,
            type_=_TableFieldSchema.Type.Value(_SCHEMA_TYPES.get(column.type, column.type)),
            mode=_TableFieldSchema.Mode.Value(column.mode),
        )
    return schema


def _shown(name: str, table: Table) -> Any:  # noqa: ANN401 - protobuf's class
    return _WriteStream(name=name, type_=_WriteStream.COMMITTED, table_schema=_schema(table))


def _error(code: str, kind: str, message: str) -> Any:  # noqa: ANN401 - protobuf's class
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
    if kind:
        number = _StorageError.StorageErrorCode.Value(kind)
        status.details.add().Pack(_StorageError(code=number, error_message=message))
    answer = _AppendRowsResponse()
    answer.error.CopyFrom(status)
    return answer


def _wire(message: Any) -> bytes:  # noqa: ANN401 - protobuf's class
    wire: bytes = message.SerializeToString()
    return wire


def _check_routing(context: grpc.ServicerContext, expected: str) -> None:
    found = dict(context.invocation_metadata()).get("x-goog-request-params", "")
    if found not in {expected, expected.replace("/", "%2F")}:
        raise StreamError("INVALID_ARGUMENT", "", f"routing header {found!r}, not {expected!r}")


def _ended(context: grpc.ServicerContext, code: grpc.StatusCode, details: str) -> Exception:
    """End the call; gRPC raises by itself, the return value is for the reader."""
    context.abort(code, details)
    return AssertionError("abort returned")
