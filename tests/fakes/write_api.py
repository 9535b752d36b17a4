"""A fake of the BigQuery Storage Write API: gRPC on a real socket, before the REST fake's tables.

CreateWriteStream (COMMITTED, and PENDING without a commit), GetWriteStream, FinalizeWriteStream,
AppendRows with protobuf rows, the default stream.

Documented, and enforced: the routing header, the size of a request, stream and writer schema in
the first request of a connection, offsets, all or none of a request's rows, no offset on the
default stream, column types, `updated_schema` some appends after a change of the table, one
connection at a time for each application-created stream, streams that are finalized or expire.
https://cloud.google.com/bigquery/docs/reference/storage/rpc/google.cloud.bigquery.storage.v1
https://cloud.google.com/bigquery/docs/write-api-best-practices

Errors of offsets and of rows come in the answer, and the connection goes on: documented with
AppendRowsResponse, and so do Google's integration tests of Java and Go see it, which the words of
the messages are taken from. A schema with extra fields and a request that is too large end the
call: so do those of Node and Go see it. Assumed is that the same holds for each other request
that is malformed and for a stream or table that is not found; `FakeWriteApi.ending` chooses.
Not documented, and therefore not enforced: how old rows may be in a partitioned table. A stream
that was finalized says so in the answer, which is assumed as well.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError

from tests.fakes.faults import LoseAnswer
from tests.fakes.pubsub import HOST, MAX_WIRE_BYTES, WORKERS
from tests.fakes.tables import TableStore
from tests.fakes.write_calls import EndOfCallError, check_routing, cut_off, end_call, meet_fault
from tests.fakes.write_connection import Connection
from tests.fakes.write_faults import WriteFaults
from tests.fakes.write_messages import (
    FULL_VIEW,
    CreateWriteStreamRequest,
    FinalizeWriteStreamRequest,
    FinalizeWriteStreamResponse,
    GetWriteStreamRequest,
    WriteStreamMessage,
    on_wire,
    status_message,
    status_of,
    stream_message,
)
from tests.fakes.write_streams import MalformedError, StreamError, WriteStreams

SERVICE = "google.cloud.bigquery.storage.v1.BigQueryWrite"


@dataclass
class Appended:
    """One append that was carried out."""

    stream: str
    offset: int | None
    rows: int
    size: int = field(compare=False)  # bytes of the request


@dataclass(frozen=True, slots=True)
class Violation:
    """A request that no client may send: it broke a documented rule, whatever the state."""

    stream: str
    text: str


class FakeWriteApi:
    """A Storage Write API server on 127.0.0.1, usable as a context manager.

    Args:
        store: The tables, as in FakeBigQuery.
        port: Where to listen; 0 takes a free port and keeps it for restarts.
        latency_s: How long after its arrival an append is answered. It is carried out at once,
            and several may be under way. May be changed at any time.
        strict: False looks neither into rows nor at the schema: for benchmarks.
        schema_lag: So many appends after a change of the table `updated_schema` tells of it.

    Attributes:
        ending: The StorageErrorCodes, by name, whose errors end the call instead of being
            answered; the empty name stands for errors without such a code, which are a writer
            schema that does not fit the table, and Arrow.
        appended: What was carried out, in this order.
        connections: Each AppendRows call so far.
        violations: Each request that no client may send.
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
        self.strict = strict
        self.schema_lag = schema_lag
        self.ending = {"", "SCHEMA_MISMATCH_EXTRA_FIELDS", "STREAM_NOT_FOUND", "TABLE_NOT_FOUND"}
        self.appended: list[Appended] = []
        self.connections: list[Connection] = []
        self.violations: list[Violation] = []
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
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

    @property
    def calls(self) -> int:
        """How many AppendRows calls there were."""
        return len(self.connections)

    @property
    def requests(self) -> int:
        """How many appends arrived, whatever became of them."""
        return sum(connection.received for connection in list(self.connections))

    @property
    def in_flight_max(self) -> int:
        """How many appends waited for their answers at once, on one connection."""
        return max((c.in_flight_max for c in list(self.connections)), default=0)

    def start(self) -> Self:
        """Listen, on the port of last time if there was one; return once it is open."""
        if self._server is not None:
            raise RuntimeError(f"already serving at {self.address}")
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="fake-write-api")
        server = grpc.server(
            self._pool,
            handlers=[grpc.method_handlers_generic_handler(SERVICE, self._handlers())],
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

    def stop(self, grace_s: float | None = None) -> None:
        """Go away: connections are refused, calls under way fail. The store stays.

        Args:
            grace_s: How long calls under way may go on after clients were told (GOAWAY).
        """
        if self._server is None or self._pool is None:
            return
        # What hangs or waits is woken by the end of its call.
        self._server.stop(grace=grace_s).wait()
        self._pool.shutdown()
        self._server = None
        self._pool = None

    def restart(self, grace_s: float | None = None) -> None:
        """Go away and come back at once, as a server that is replaced by another one."""
        self.stop(grace_s)
        self.start()

    def note_append(self, stream: str, offset: int | None, rows: int, size: int) -> None:
        """Remember that an append was carried out."""
        with self._lock:
            self.appended.append(Appended(stream, offset, rows, size))

    def note_violation(self, stream: str, text: str) -> None:
        """Remember a request that no client may send."""
        with self._lock:
            self.violations.append(Violation(stream, text))

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        calls: dict[str, tuple[str, Callable[[bytes], Any], Callable[[Any], Any]]] = {
            "CreateWriteStream": ("parent", CreateWriteStreamRequest.FromString, self._create),
            "GetWriteStream": ("name", GetWriteStreamRequest.FromString, self._get),
            "FinalizeWriteStream": ("name", FinalizeWriteStreamRequest.FromString, self._finalize),
        }
        handlers = {
            call: grpc.unary_unary_rpc_method_handler(self._guarded(call, *how))
            for call, how in calls.items()
        }
        handlers["AppendRows"] = grpc.stream_stream_rpc_method_handler(self._append_rows)
        return handlers

    def _guarded(
        self,
        call: str,
        routed_by: str,
        parse: Callable[[bytes], Any],
        handle: Callable[[Any], Any],
    ) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        """Wrap a call with one answer so that faults and refusals become its status."""

        def serve(raw: bytes, context: grpc.ServicerContext) -> bytes:
            fault = self.faults.take(call)
            name = ""
            try:
                meet_fault(self.faults, fault, context)
                request = parse(raw)
                name = getattr(request, routed_by)
                check_routing(context, routed_by, name)
                answer = on_wire(handle(request))
                if isinstance(fault, LoseAnswer):
                    raise cut_off()
            except EndOfCallError as end:
                end_call(context, end.status)
            except StreamError as error:
                if isinstance(error, MalformedError):
                    self.note_violation(name, str(error))
                end_call(context, status_of(error))
            except DecodeError:
                end_call(context, status_message("INTERNAL", "Failed parsing the request."))
            return answer

        return serve

    def _create(self, request: Any) -> Any:  # noqa: ANN401 - protobuf's classes
        kind = request.write_stream.type_
        if kind not in {WriteStreamMessage.COMMITTED, WriteStreamMessage.PENDING}:
            text = "This fake makes only streams of type COMMITTED or PENDING."
            raise StreamError("UNIMPLEMENTED", "", text, request.parent)
        pending = kind == WriteStreamMessage.PENDING
        return stream_message(self.streams.create(request.parent, pending=pending), full=True)

    def _get(self, request: Any) -> Any:  # noqa: ANN401 - protobuf's classes
        return stream_message(self.streams.stream(request.name), full=request.view == FULL_VIEW)

    def _finalize(self, request: Any) -> Any:  # noqa: ANN401 - protobuf's classes
        return FinalizeWriteStreamResponse(row_count=self.streams.finalize(request.name))

    def _append_rows(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        connection = Connection(self, next(self._numbers), context)
        self.connections.append(connection)
        return connection.answers(requests)
