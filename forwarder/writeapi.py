"""The BigQuery Storage Write API below Google's client: its channel, its messages, raw calls.

The library's ``AppendRowsStream`` polls for answers with sleeps, hangs in ``send`` while the
network is away and fails everything in flight when a connection breaks. The bidirectional call
itself does none of this; what it needs beside it is a thread that reads, deadlines of our own
and a connection that is closed before the next one is opened.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.api_core.gapic_v1 import routing_header
from google.auth.exceptions import GoogleAuthError
from google.cloud.bigquery_storage_v1 import types
from google.cloud.bigquery_storage_v1.services.big_query_write import BigQueryWriteClient
from google.cloud.bigquery_storage_v1.services.big_query_write.transports import (
    BigQueryWriteGrpcTransport,
)
from google.protobuf.message import DecodeError
from google.rpc import status_pb2  # type: ignore[import-untyped]

from forwarder import authorities
from forwarder.access import cannot_build, find_credentials, grpc_fault
from forwarder.faults import PLUGIN_FAILURE, FaultError
from forwarder.sink import Fault
from lifecycle import Settings

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

CHANNEL_OPTIONS = (
    # A dead path is noticed after 40 s at the latest, not after the kernel's many minutes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A new channel must not inherit the dead connection of the one that it replaces.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
EMULATOR_OPTIONS = (
    *CHANNEL_OPTIONS,
    # It is on this machine or near it, without TLS: HTTPS_PROXY is not for it.
    ("grpc.enable_http_proxy", 0),
)
STATUS_DETAILS = "grpc-status-details-bin"
"""Where a call's status carries a google.rpc.Status with more than code and words."""

SERVICE = "/google.cloud.bigquery.storage.v1.BigQueryWrite"

AppendRowsResponse = types.AppendRowsResponse.pb()
StorageError = types.StorageError.pb()
_CreateWriteStreamRequest = types.CreateWriteStreamRequest.pb()
_FinalizeWriteStreamRequest = types.FinalizeWriteStreamRequest.pb()
_FinalizeWriteStreamResponse = types.FinalizeWriteStreamResponse.pb()
_WriteStream = types.WriteStream.pb()

DEADLINE_S = 20.0
"""Of each call with one answer, and of each answer to an append."""

READER_JOIN_S = 5.0
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallError(Exception):
    """A call ended, or an answer did not come; what was sent may or may not have been done.

    Attributes:
        code: The gRPC status by name.
        details: The service's words.
        kind: The name of the StorageError's code, if the status carries one.
        connected: Whether there may have been a connection; without one nothing was sent.
    """

    def __init__(self, code: str, details: str, kind: str = "", *, connected: bool = True) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details
        self.kind = kind
        self.connected = connected


class WriteApi:
    """The service, with one channel to it that is opened when needed.

    Args:
        settings: Emulator or endpoint, if any.
        table: ``projects/P/datasets/D/tables/T``.

    Attributes:
        target: HOST:PORT of the service itself.
    """

    def __init__(self, settings: Settings, table: str) -> None:
        self._emulator = settings.bigquery_storage_emulator_host
        self._key_file = settings.google_application_credentials
        self.target = with_port(
            settings.bigquery_storage_endpoint or BigQueryWriteClient.DEFAULT_ENDPOINT
        )
        self._table = table
        self._channel: grpc.Channel | None = None
        self._credentials: Credentials | None = None
        """Of the last channel; none for an emulator."""

    def close(self) -> None:
        """Close the channel; the next call opens another one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _connected(self) -> grpc.Channel:
        """Return the channel.

        Raises:
            FaultError: There are no credentials, or they cannot be had now.
        """
        if self._channel is not None:
            return self._channel
        transport = BigQueryWriteGrpcTransport
        channel: grpc.Channel
        if self._emulator:
            channel = grpc.insecure_channel(self._emulator, options=EMULATOR_OPTIONS)
        else:
            # Each channel reads them anew: the key file may be another one since.
            self._credentials = find_credentials(transport.AUTH_SCOPES, self._key_file)
            try:
                channel = transport.create_channel(
                    self.target,
                    credentials=self._credentials,
                    scopes=transport.AUTH_SCOPES,
                    ssl_credentials=grpc.ssl_channel_credentials(authorities.renewed()),
                    options=CHANNEL_OPTIONS,
                )
            except (GoogleAuthError, OSError, ValueError) as error:
                raise FaultError(cannot_build(error)) from error
        self._channel = channel
        return channel

    def access_fault(self, details: str) -> Fault | None:
        """Return the fault to report for a call without a token or a trusted connection.

        Args:
            details: The words of its status.

        Returns:
            None for a call that failed in another way.
        """
        return grpc_fault(details, self.target, self._credentials)

    def create_stream(self, *, pending: bool = False) -> str:
        """Make a stream whose rows are in the table once they are confirmed; return its name.

        Args:
            pending: Whether they are there only after a commit instead.

        Raises:
            CallError: The service refuses, or cannot be reached.
            FaultError: There are no credentials.
        """
        kind = _WriteStream.PENDING if pending else _WriteStream.COMMITTED
        request = _CreateWriteStreamRequest(
            parent=self._table, write_stream=_WriteStream(type_=kind)
        )
        answer = self._call("CreateWriteStream", request, _WriteStream, ("parent", self._table))
        return str(answer.name)

    def finalize_stream(self, name: str) -> int:
        """Close the stream for appends; return how many rows it has. May be repeated.

        Raises:
            CallError: The service refuses, does not know the stream, or cannot be reached.
            FaultError: There are no credentials.
        """
        request = _FinalizeWriteStreamRequest(name=name)
        answer = self._call(
            "FinalizeWriteStream", request, _FinalizeWriteStreamResponse, ("name", name)
        )
        return int(answer.row_count)

    def _call(self, method: str, request: Any, answer: Any, routed_by: tuple[str, str]) -> Any:  # noqa: ANN401 - protobuf's classes
        call = self._connected().unary_unary(
            f"{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return call(request, timeout=DEADLINE_S, metadata=(routing(*routed_by),))
        except grpc.RpcError as error:
            raise _call_error(error) from error

    def open(self, stream: str) -> "Appender":
        """Open a connection that appends to ``stream``.

        Raises:
            FaultError: There are no credentials.
        """
        call = self._connected().stream_stream(
            f"{SERVICE}/AppendRows",
            request_serializer=None,  # they are bytes already: forwarder/rowproto.py
            response_deserializer=AppendRowsResponse.FromString,
        )
        return Appender(call, stream)


class Appender:
    """One AppendRows call: requests go out, answers come back in the same order.

    Args:
        call: Starts it.
        stream: The stream's name.
    """

    def __init__(self, call: Callable[..., Any], stream: str) -> None:
        self.stream = stream
        self.fresh = True
        """Whether nothing was sent yet: the first request carries name and schema."""
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._end: CallError | None = None
        self._call = call(
            iter(self._requests.get, None),
            metadata=(routing("write_stream", stream),),
        )
        self._reader = threading.Thread(target=self._read, name="answers", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        end = CallError("UNAVAILABLE", "the service ended the connection")
        try:
            for answer in self._call:
                self._answers.put(answer)
        except grpc.RpcError as error:
            end = _call_error(error)
        except Exception as error:  # noqa: BLE001 - a silent reader would be taken for a slow service
            end = CallError("UNKNOWN", f"{type(error).__name__}: {error}")
        finally:
            self._end = end
            self._answers.put(end)

    @property
    def ended(self) -> bool:
        """Whether the service, or the network, has ended the call."""
        return self._end is not None

    def send(self, request: bytes) -> None:
        """Send one request; whether it arrives only its answer tells."""
        self.fresh = False
        self._requests.put(request)

    def receive(self) -> Any:  # noqa: ANN401 - an AppendRowsResponse, which has no type
        """Return the answer to the oldest request that has none yet.

        Raises:
            CallError: None comes any more, or none came in time.
        """
        try:
            answer = self._answers.get(timeout=DEADLINE_S)
        except queue.Empty:
            raise CallError("DEADLINE_EXCEEDED", f"no answer within {DEADLINE_S:g} s") from None
        if isinstance(answer, CallError):
            self._answers.put(answer)  # for whoever asks again
            raise answer
        return answer

    def close(self) -> None:
        """End the call."""
        self._requests.put(None)
        self._call.cancel()
        # Its thread belongs to the channel, which is closed next.
        with contextlib.suppress(RuntimeError):
            self._reader.join(READER_JOIN_S)


def _call_error(error: grpc.RpcError) -> CallError:
    kind = ""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                kind = storage_error(status_pb2.Status.FromString(value))
    code, details = error.code().name, error.details() or ""
    return CallError(code, details, kind, connected=not _never_connected(error, details))


_NOT_CONNECTED = (
    "failed to connect to all addresses",
    "errors resolving",
    "DNS resolution failed",
    PLUGIN_FAILURE,
)
"""The words of gRPC's core, and of its Python part for a call that had no access token, about a
call that had no connection to send anything over."""


def _never_connected(error: grpc.RpcError, details: str) -> bool:
    """Return whether the call ended before it had a connection.

    A service may say the same of services behind it, but sends metadata with it as a rule.
    """
    return (
        error.code() is grpc.StatusCode.UNAVAILABLE
        and details.startswith(_NOT_CONNECTED)
        and not error.trailing_metadata()
    )


def routing(parameter: str, value: str) -> tuple[str, str]:
    """Return the metadata by which Google routes a request, as its own clients make it.

    The value is percent-encoded: gRPC refuses to send what is not ASCII (INTERNAL: Invalid
    metadata), and the service reads the header as a query string.

    Args:
        parameter: The field of the request that it is routed by.
        value: That field's value.
    """
    key, header = routing_header.to_grpc_metadata({parameter: value})  # type: ignore[no-untyped-call]
    return str(key), str(header)


def with_port(host: str) -> str:
    """Return ``host`` with the port of HTTPS, unless it names one; a colon may be IPv6's."""
    return host if host.rpartition(":")[2].isdigit() else f"{host}:443"


def code_name(code: int) -> str:
    """Return the name of a gRPC status."""
    return str(_CODE_NAMES.get(code, "UNKNOWN"))


def storage_error(status: Any) -> str:  # noqa: ANN401 - a google.rpc.Status, which has no type
    """Return the name of the StorageError's code in an answer's error; empty if it has none.

    https://cloud.google.com/bigquery/docs/reference/storage/rpc/google.cloud.bigquery.storage.v1#storageerror
    """
    for detail in status.details:
        found = StorageError()
        if not detail.Is(StorageError.DESCRIPTOR):
            continue
        try:
            detail.Unpack(found)
            return str(StorageError.StorageErrorCode.Name(found.code))
        except DecodeError:
            continue
        except ValueError:
            return f"STORAGE_ERROR_{found.code}"  # newer than this library
    return ""
