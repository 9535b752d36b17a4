"""Rows of the Storage Write API: messages of a type that the client describes at run time.

Which types a column takes:
https://cloud.google.com/bigquery/docs/supported-data-types#supported_protocol_buffer_data_types
The wrapper types of google.protobuf are not understood here; a schema with one is refused.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
from google.protobuf.message import DecodeError

from tests.fakes.rows import (
    EPOCH_MAX_S,
    EPOCH_MIN_S,
    WRITE_API_PAST,
    Column,
    Row,
    numeric_problem,
    partition_bounds,
    partition_problem,
)

_F = FieldDescriptorProto
_INT32, _INT64, _UINT32, _UINT64 = _F.TYPE_INT32, _F.TYPE_INT64, _F.TYPE_UINT32, _F.TYPE_UINT64
_TYPES: dict[str, frozenset[Any]] = {
    "STRING": frozenset({_F.TYPE_STRING, _F.TYPE_ENUM}),
    "INTEGER": frozenset({_INT32, _INT64, _UINT32, _F.TYPE_ENUM}),
    "FLOAT": frozenset({_F.TYPE_DOUBLE, _F.TYPE_FLOAT}),
    "BOOLEAN": frozenset({_F.TYPE_BOOL, _INT32, _INT64, _UINT32, _UINT64}),
    "TIMESTAMP": frozenset({_INT32, _INT64, _UINT32}),
    "BYTES": frozenset({_F.TYPE_BYTES, _F.TYPE_STRING}),
    "NUMERIC": frozenset(
        {_INT32, _INT64, _UINT32, _UINT64, _F.TYPE_DOUBLE, _F.TYPE_FLOAT, _F.TYPE_STRING}
        | {_F.TYPE_BYTES}
    ),
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIN_US, _MAX_US = EPOCH_MIN_S * 1_000_000, EPOCH_MAX_S * 1_000_000 + 999_999
_MICROSECOND = timedelta(microseconds=1)
_NUMERIC_SCALE = 9

_Judge = Callable[[Any], str]
_Convert = Callable[[Any], object]


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
        repeated = found.label == _F.LABEL_REPEATED
        if found.type not in _TYPES[column.type] or repeated != (column.mode == "REPEATED"):
            name = _F.Type.Name(found.type).removeprefix("TYPE_").lower()
            raise SchemaError(
                f"The proto field mismatched with BigQuery field at "
                f"{descriptor.name}.{found.name}, the proto field type "
                f"{'repeated ' if repeated else ''}{name}, BigQuery field type "
                f"{'REPEATED ' if column.mode == 'REPEATED' else ''}{column.type}"
            )
    described = {f.name.lower() for f in descriptor.field}
    for name, column in by_name.items():
        if column.mode == "REQUIRED" and name not in described:
            raise SchemaError(f"The required field {column.name} is missing in the proto message.")


@lru_cache(maxsize=64)
def row_class(descriptor: bytes) -> Any:  # noqa: ANN401 - made at run time
    """Return the message class that a DescriptorProto describes; proto2, as documented.

    Raises:
        SchemaError: It cannot stand for itself, as ProtoSchema asks.
    """
    file = descriptor_pb2.FileDescriptorProto(name="BqMessage.proto", package="rows")
    message = file.message_type.add()
    message.MergeFromString(descriptor)
    pool = descriptor_pool.DescriptorPool()
    try:
        pool.Add(file)
        found = pool.FindMessageTypeByName(f"rows.{message.name}")
    except (KeyError, TypeError) as error:
        raise SchemaError(f"Invalid proto schema: BqMessage.proto: {error}") from error
    return message_factory.GetMessageClass(found)


class RowReader:
    """Judges and reads rows of one type for one state of a table's columns.

    Args:
        descriptor: The DescriptorProto, serialized.
        columns: The table's.
        check: False looks only for what reading needs, and takes no offence at the schema.

    Raises:
        SchemaError: The type does not fit.
    """

    def __init__(self, descriptor: bytes, columns: Sequence[Column], *, check: bool = True) -> None:
        if check:
            check_schema(DescriptorProto.FromString(descriptor), {c.name: c for c in columns})
        self._make = row_class(descriptor).FromString
        by_name = {column.name.lower(): column for column in columns}
        self._required: list[tuple[str, str]] = []
        self._judges: list[tuple[str, str, _Judge, bool]] = []
        self._converts: dict[str, tuple[str, _Convert | None]] = {}
        for found in row_class(descriptor).DESCRIPTOR.fields:
            column = by_name.get(found.name.lower())
            if column is None:
                continue
            if column.mode == "REQUIRED":
                self._required.append((found.name, column.name))
            judge = _judge_of(found.type, column.type)
            repeated = column.mode == "REPEATED"
            if judge is not None:
                self._judges.append((found.name, column.name, judge, repeated))
            convert = _convert_of(found, column.type)
            if repeated:
                convert = _each(convert)
            self._converts[found.name] = (column.name, convert)

    def errors(
        self, serialized: Sequence[bytes], partition_column: str | None = None
    ) -> list[tuple[int, str]]:
        """Return the index of each bad row, and what is wrong with it.

        Args:
            serialized: The rows.
            partition_column: The TIMESTAMP column that the table is partitioned by, if any. That
                a row is refused for it is documented; that it is a row error, and its words, which
                are insertAll's, are assumed.
        """
        errors = []
        judge = self._partition_judge(partition_column) if partition_column else _judge_nothing
        for index, content in enumerate(serialized):
            problem = self._problem(content) or judge(content)
            if problem:
                errors.append((index, problem))
        return errors

    def rows(self, serialized: Sequence[bytes]) -> list[Row]:
        """Return the rows as insertAll's fake stores them; they must be good."""
        return [self._row(self._make(content)) for content in serialized]

    def _partition_judge(self, column: str) -> Callable[[bytes], str]:
        first, last = ((m - _EPOCH) // _MICROSECOND for m in partition_bounds(WRITE_API_PAST))
        field = next((f for f, (c, _) in self._converts.items() if c == column), "")

        def judge(content: bytes) -> str:
            message = self._make(content)
            micros = getattr(message, field) if field and message.HasField(field) else first
            if first <= micros <= last:
                return ""
            return partition_problem(micros, column, WRITE_API_PAST)

        return judge

    def _problem(self, content: bytes) -> str:
        try:
            message = self._make(content)
        except DecodeError:
            return "The row could not be parsed with the writer schema."
        has = message.HasField
        for field, column in self._required:
            if not has(field):
                return f"Field value of {column} cannot be empty on field {column}."
        for field, column, judge, repeated in self._judges:
            value = getattr(message, field)
            for each in value if repeated else (value,):
                problem = judge(each)
                # What is absent reads as 0, which every judge likes, or as an empty text.
                if problem and (repeated or has(field)):
                    return f"{problem} on field {column}."
        return ""

    def _row(self, message: Any) -> Row:  # noqa: ANN401 - made at run time
        row: Row = {}
        for field, value in message.ListFields():
            column, convert = self._converts.get(field.name, ("", None))
            if column:
                row[column] = value if convert is None else convert(value)
        return row


@lru_cache(maxsize=64)
def row_reader(descriptor: bytes, columns: tuple[Column, ...], *, check: bool = True) -> RowReader:
    """Return the reader for a type and columns, which is worth remembering."""
    return RowReader(descriptor, columns, check=check)


def _judge_nothing(_: bytes) -> str:
    return ""


def _judge_of(field_type: int, column_type: str) -> _Judge | None:
    if column_type == "TIMESTAMP":
        return _judge_timestamp
    if column_type == "NUMERIC":
        return _judge_numeric_bytes if field_type == _F.TYPE_BYTES else numeric_problem
    return _judge_text if field_type == _F.TYPE_STRING else None


def _judge_text(value: str | bytes) -> str:
    # Of proto2's strings, protobuf gives those that are no UTF-8 as bytes.
    return "Invalid UTF-8 string" if isinstance(value, bytes) else ""


def _judge_timestamp(value: int) -> str:
    if _MIN_US <= value <= _MAX_US:
        return ""
    return f"Timestamp field value is out of range: {value}"


def _judge_numeric_bytes(value: bytes) -> str:
    return numeric_problem(_numeric(value))


def _convert_of(field: Any, column_type: str) -> _Convert | None:  # noqa: ANN401 - a FieldDescriptor
    if column_type == "TIMESTAMP":
        return _timestamp
    if column_type == "NUMERIC":
        return _numeric if field.type == _F.TYPE_BYTES else str
    if column_type == "BYTES":
        return _base64
    if column_type == "BOOLEAN":
        return bool
    if column_type == "STRING" and field.type == _F.TYPE_ENUM:
        names = {value.number: value.name for value in field.enum_type.values}
        return lambda number: names.get(number, str(number))
    return None


def _each(convert: _Convert | None) -> _Convert:
    if convert is None:
        return list
    return lambda values: [convert(value) for value in values]


def _timestamp(value: int) -> str:
    moment = _EPOCH + timedelta(microseconds=value)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _numeric(value: bytes) -> str:
    """Read what BigDecimalByteStringEncoder writes: little-endian, in units of the ninth digit."""
    number = int.from_bytes(value, "little", signed=True)
    return str(Decimal(number).scaleb(-_NUMERIC_SCALE).normalize())


def _base64(value: bytes | str) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()
