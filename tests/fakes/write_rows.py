"""Rows of the Storage Write API: messages of a type that the client describes at run time.

Which types a column takes:
https://cloud.google.com/bigquery/docs/supported-data-types#supported_protocol_buffer_data_types
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.message import DecodeError

from tests.fakes.rows import EPOCH_MAX_S, EPOCH_MIN_S, Column, Row

_F = FieldDescriptorProto
_WHOLE = frozenset({_F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT32, _F.TYPE_ENUM})
_TYPES: dict[str, frozenset[Any]] = {
    "STRING": frozenset({_F.TYPE_STRING, _F.TYPE_ENUM}),
    "INTEGER": _WHOLE,
    "FLOAT": frozenset({_F.TYPE_DOUBLE, _F.TYPE_FLOAT}),
    "BOOLEAN": frozenset({_F.TYPE_BOOL, _F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT32}),
    "TIMESTAMP": frozenset({_F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT32}),
    "BYTES": frozenset({_F.TYPE_BYTES, _F.TYPE_STRING}),
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROS = 1_000_000


class SchemaError(Exception):
    """The described type does not fit the table.

    Attributes:
        extra_fields: Whether it is for fields that the table lacks.
    """

    def __init__(self, message: str, *, extra_fields: bool = False) -> None:
        super().__init__(message)
        self.extra_fields = extra_fields


def check_schema(descriptor: DescriptorProto, columns: Mapping[str, Column]) -> None:
    """Raise SchemaError unless rows of this type can go into a table of these columns."""
    by_name = {name.lower(): column for name, column in columns.items()}
    extra = [f.name for f in descriptor.field if f.name.lower() not in by_name]
    if extra:
        text = (
            f"Input schema has more fields than BigQuery schema, extra fields: '{','.join(extra)}'"
        )
        raise SchemaError(text, extra_fields=True)
    for found in descriptor.field:
        column = by_name[found.name.lower()]
        if found.type not in _TYPES[column.type]:
            raise SchemaError(
                f"Proto schema mismatch: The field {found.name} is of type "
                f"{_F.Type.Name(found.type)}, which column type {column.type} does not take"
            )
        repeated = found.label == _F.LABEL_REPEATED
        if repeated != (column.mode == "REPEATED"):
            raise SchemaError(f"Proto schema mismatch: The field {found.name} has another mode")
    described = {f.name.lower() for f in descriptor.field}
    for name, column in by_name.items():
        if column.mode == "REQUIRED" and name not in described:
            raise SchemaError(
                f"The required field {name} is missing in the proto message. Entity: {name}"
            )


@lru_cache(maxsize=64)
def row_class(descriptor: bytes) -> Any:  # noqa: ANN401 - made at run time
    """Return the message class that a DescriptorProto describes."""
    file = descriptor_pb2.FileDescriptorProto(name="row.proto", package="rows")
    message = file.message_type.add()
    message.MergeFromString(descriptor)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"rows.{message.name}"))


def decode_rows(
    descriptor: bytes, columns: Mapping[str, Column], serialized: Sequence[bytes]
) -> tuple[list[Row], list[tuple[int, str]]]:
    """Return the rows as insertAll's fake stores them, and what is wrong with which of them."""
    make = row_class(descriptor).FromString
    by_name = {name.lower(): column for name, column in columns.items()}
    rows: list[Row] = []
    errors: list[tuple[int, str]] = []
    for index, content in enumerate(serialized):
        try:
            message = make(content)
            row, problem = _row(message, by_name)
        except (DecodeError, UnicodeDecodeError) as error:
            row, problem = {}, f"Could not parse the row: {error}"
        rows.append(row)
        if problem:
            errors.append((index, problem))
    return rows, errors


def _row(message: Any, columns: Mapping[str, Column]) -> tuple[Row, str]:  # noqa: ANN401 - made at run time
    row: Row = {}
    for field, value in message.ListFields():
        column = columns[field.name.lower()]
        if column.type == "TIMESTAMP":
            if not EPOCH_MIN_S * _MICROS <= value < (EPOCH_MAX_S + 1) * _MICROS:
                return row, f"Timestamp out of range. Field: {column.name}; Value: {value}"
            moment = _EPOCH + timedelta(microseconds=value)
            row[column.name] = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
        else:
            row[column.name] = value
    for column in columns.values():
        if column.mode == "REQUIRED" and column.name not in row:
            return row, f"Field {column.name}: NULL value for a required field."
    return row, ""
