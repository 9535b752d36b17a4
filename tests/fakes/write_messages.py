"""The write API's messages: the raw protobuf classes, and how errors and schemas are written."""

from collections.abc import Iterable
from typing import Any

from google.cloud.bigquery_storage_v1 import types
from google.rpc import code_pb2, status_pb2  # type: ignore[import-untyped]

from tests.fakes.tables import Table
from tests.fakes.write_streams import StreamError, WriteStream

AppendRowsRequest = types.AppendRowsRequest.pb()
AppendRowsResponse = types.AppendRowsResponse.pb()
CreateWriteStreamRequest = types.CreateWriteStreamRequest.pb()
FinalizeWriteStreamRequest = types.FinalizeWriteStreamRequest.pb()
FinalizeWriteStreamResponse = types.FinalizeWriteStreamResponse.pb()
GetWriteStreamRequest = types.GetWriteStreamRequest.pb()
StorageError = types.StorageError.pb()
WriteStreamMessage = types.WriteStream.pb()
FULL_VIEW = types.WriteStreamView.FULL

_TableFieldSchema = types.TableFieldSchema.pb()
_TableSchema = types.TableSchema.pb()
_FIELDS_ERROR = types.RowError.pb().FIELDS_ERROR
_TYPES = {"INTEGER": "INT64", "FLOAT": "DOUBLE", "BOOLEAN": "BOOL"}

ROW_ERRORS_TEXT = (
    "Errors found while processing rows. Please refer to the row_errors field for details. The "
    "list may not be complete because of the size limitations."
)


def schema_message(table: Table) -> Any:  # noqa: ANN401 - protobuf's class
    """Return a table's schema as a TableSchema."""
    schema = _TableSchema()
    for column in table.columns.values():
        schema.fields.add(
            name=column.name,
            type_=_TableFieldSchema.Type.Value(_TYPES.get(column.type, column.type)),
            mode=_TableFieldSchema.Mode.Value(column.mode),
            description=column.description,
        )
    return schema


def stream_message(stream: WriteStream, *, full: bool) -> Any:  # noqa: ANN401 - protobuf's class
    """Return a stream as a WriteStream; only the full view has the table's schema."""
    kind = WriteStreamMessage.PENDING if stream.pending else WriteStreamMessage.COMMITTED
    shown = WriteStreamMessage(name=stream.name, type_=kind)
    shown.write_mode = WriteStreamMessage.INSERT
    shown.create_time.FromMilliseconds(stream.created_ms)
    if not stream.pending:
        shown.commit_time.CopyFrom(shown.create_time)
    if full:
        shown.table_schema.CopyFrom(schema_message(stream.table))
    return shown


def status_message(
    code: str, message: str, kind: str = "", entity: str = "", detail: str = ""
) -> Any:  # noqa: ANN401 - protobuf's class
    """Return a google.rpc.Status, with a StorageError if ``kind`` names its code."""
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=message)
    if kind:
        number = StorageError.StorageErrorCode.Value(kind)
        error = StorageError(code=number, entity=entity, error_message=detail or message)
        status.details.add().Pack(error)
    return status


def status_of(error: StreamError) -> Any:  # noqa: ANN401 - protobuf's class
    """Return the google.rpc.Status of what a stream refuses."""
    return status_message(error.code, str(error), error.kind, error.entity, error.detail)


def append_answer(stream: str, offset: int | None) -> Any:  # noqa: ANN401 - protobuf's class
    """Return the answer to an append that was carried out; the default stream has no offset."""
    answer = AppendRowsResponse(write_stream=stream)
    answer.append_result.SetInParent()
    if offset is not None:
        answer.append_result.offset.value = offset
    return answer


def error_answer(stream: str, status: Any) -> Any:  # noqa: ANN401 - protobuf's classes
    """Return the answer to an append that failed."""
    answer = AppendRowsResponse(write_stream=stream)
    answer.error.CopyFrom(status)
    return answer


def row_errors_answer(stream: str, errors: Iterable[tuple[int, str]]) -> Any:  # noqa: ANN401 - protobuf's class
    """Return the answer to an append with bad rows, each by its index."""
    text = f"{ROW_ERRORS_TEXT} Entity: {stream}"
    answer = error_answer(stream, status_message("INVALID_ARGUMENT", text))
    for index, problem in errors:
        answer.row_errors.add(index=index, code=_FIELDS_ERROR, message=problem)
    return answer


def on_wire(message: Any) -> bytes:  # noqa: ANN401 - protobuf's class
    """Return a message's bytes."""
    wire: bytes = message.SerializeToString()
    return wire
