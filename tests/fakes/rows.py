"""Judges rows by a table's schema, with the words of BigQuery's streaming API.

`judge_row` is the rule. `fast_body_decoder` is a shortcut for the usual case that
a whole request is good: msgspec parses and checks it in one go. What it takes is
a subset of what `judge_row` takes (a test holds them together), and whatever it
does not take is judged row by row.
"""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import msgspec

# The bounds for rows streamed into a table partitioned by a column, as the
# service's own message names them.
PARTITION_PAST = timedelta(days=1825)
PARTITION_FUTURE = timedelta(days=366)
# Of the Storage Write API, ten years back:
# https://cloud.google.com/bigquery/docs/write-api#time-unit_column_partitioning
WRITE_API_PAST = timedelta(days=3652)

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EPOCH_MIN_S, EPOCH_MAX_S = -62135596800, 253402300799  # years 1 to 9999
# https://cloud.google.com/bigquery/docs/reference/standard-sql/data-types#decimal_types
NUMERIC_SCALE, NUMERIC_WHOLE_DIGITS = 9, 29

_INTEGER = r"^-?[0-9]{1,18}\Z"  # 19 digits are judged by value
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z"
_NOT_FINITE = frozenset({"nan", "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity"})
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d(?:\.\d{1,9})?) ?(Z|z|UTC|[+-]\d\d(?::?\d\d)?)?"
)

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table. Types go by their legacy names, as the REST API returns them."""

    name: str
    type: str
    mode: str = "NULLABLE"
    description: str = ""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row was not inserted, in the service's vocabulary."""

    reason: str
    location: str
    message: str


def parse_timestamp(value: object) -> datetime:
    """Read a TIMESTAMP as the service does; raise ValueError if it would not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not EPOCH_MIN_S <= value <= EPOCH_MAX_S:
            raise ValueError("outside of the years 1 to 9999")
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=value)
    match = _TIMESTAMP.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a timestamp")
    day, time_of_day, zone = match.groups()
    if zone in (None, "Z", "z", "UTC"):
        zone = "Z"
    elif len(zone) == len("+00"):
        zone += ":00"
    try:
        return msgspec.convert(f"{day}T{time_of_day}{zone}", datetime)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def judge_row(
    row: Mapping[str, object],
    columns: Mapping[str, Column],
    partition_column: str | None,
    *,
    ignore_unknown: bool,
) -> list[RowError]:
    """Return what is wrong with a row; nothing means that the table takes it."""
    errors: list[RowError] = []
    if not ignore_unknown:
        errors.extend(
            RowError("invalid", name, f"no such field: {name}.")
            for name in row
            if name not in columns
        )
    for column in columns.values():
        if column.name not in row:
            if column.mode == "REQUIRED":
                message = f"Missing required field: {column.name}."
                errors.append(RowError("invalid", "", message))
            continue
        problem = _judge_value(row[column.name], column)
        if problem:
            errors.append(RowError("invalid", column.name, problem))
    if not errors and partition_column is not None and row.get(partition_column) is not None:
        errors.extend(_judge_partition(row[partition_column], partition_column))
    return errors


def partition_bounds(past: timedelta = PARTITION_PAST) -> tuple[datetime, datetime]:
    """Return the first and last instant that can be streamed to a partitioned table now."""
    now = datetime.now(UTC)
    return now - past, now + PARTITION_FUTURE


def partition_problem(micros: int, name: str, past: timedelta) -> str:
    """Return what the service says of a time that it does not stream to a partitioned table."""
    return (
        f"Value {micros} for partition column {name} of the destination table is outside the "
        f"allowed bounds. You can only stream to partitions of date range within "
        f"{past.days} days in the past and {PARTITION_FUTURE.days} days in the future "
        "relative to the current date."
    )


def fast_body_decoder(columns: Sequence[Column]) -> Callable[[bytes], "Body"] | None:
    """Build a parser for whole insertAll requests that are good throughout, if it can be."""
    fields: list[tuple[str, object, object]] = []
    names: dict[str, str] = {}
    for index, column in enumerate(columns):
        field_type = _FAST_TYPES.get(column.type)
        if field_type is None or column.mode == "REPEATED":
            return None
        names[f"f{index}"] = column.name
        if column.mode == "REQUIRED":
            fields.append((f"f{index}", field_type, msgspec.NODEFAULT))
        else:
            fields.append((f"f{index}", field_type | None, None))
    # Order does not matter in JSON: keyword-only lets required follow optional.
    row_type = msgspec.defstruct(
        "FastRow", fields, rename=names, forbid_unknown_fields=True, kw_only=True
    )
    entry_type = msgspec.defstruct(
        "FastEntry", [("json", row_type), ("insertId", str | None, None)]
    )
    rows_type = list[entry_type]  # type: ignore[valid-type] # made at run time
    body_type: Any = msgspec.defstruct("FastBody", [("rows", rows_type)], bases=(Body,))
    decode: Callable[[bytes], Body] = msgspec.json.Decoder(body_type).decode
    return decode


class Body(msgspec.Struct, kw_only=True):
    """An insertAll request; the subclass for a table says what a row's json may be."""

    rows: list[Any]
    skip_invalid_rows: bool = msgspec.field(name="skipInvalidRows", default=False)
    ignore_unknown_values: bool = msgspec.field(name="ignoreUnknownValues", default=False)


def _judge_partition(value: object, name: str) -> list[RowError]:
    first, last = partition_bounds()
    moment = parse_timestamp(value)
    if first <= moment <= last:
        return []
    micros = round((moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1))
    message = partition_problem(micros, name, PARTITION_PAST)
    return [RowError("invalid", name, message)]


def _judge_value(value: object, column: Column) -> str:
    if column.mode == "REPEATED":
        if not isinstance(value, list):
            return f"Array specified for non-repeated field: {column.name}."
        judge = _JUDGES[column.type]
        return next((text for text in map(judge, value) if text), "")
    if value is None:
        if column.mode == "REQUIRED":
            return f"Only optional fields can be set to NULL. Field: {column.name}; Value: NULL"
        return ""
    if isinstance(value, list):
        return f"Array specified for non-repeated field: {column.name}."
    return _JUDGES[column.type](value)


def _judge_string(value: object) -> str:
    return "" if isinstance(value, str) else f"Cannot convert value to string: {value}"


def _judge_integer(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and INT64_MIN <= value <= INT64_MAX:
        return ""
    return f"Cannot convert value to integer (bad value): {value}"


def _judge_float(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ""
    if isinstance(value, str) and (re.search(_NUMBER, value) or value.lower() in _NOT_FINITE):
        return ""
    return f"Cannot convert value to floating point (bad value): {value}"


def _judge_boolean(value: object) -> str:
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in {"true", "false"}):
        return ""
    return f"Cannot convert value to boolean (bad value): {value}"


def _judge_timestamp(value: object) -> str:
    try:
        parse_timestamp(value)
    except ValueError as error:
        return f'Invalid timestamp string "{value}": {error}'
    return ""


def _judge_bytes(value: object) -> str:
    try:
        if isinstance(value, str) and base64.b64decode(value, validate=True) is not None:
            return ""
    except binascii.Error:
        pass  # falls through to the one answer for all that is no base64
    return f"Could not decode base64 string to bytes. Field: {value}"


def numeric_problem(value: object) -> str:
    """Return why a NUMERIC column does not take a value; empty if it does."""
    try:
        _, digits, exponent = Decimal(str(value)).as_tuple()
    except InvalidOperation:
        return f"Invalid NUMERIC value: {value}"
    if isinstance(exponent, int):
        text = "".join(map(str, digits))
        scale = -exponent - len(text) + len(text.rstrip("0") or "0")
        if scale <= NUMERIC_SCALE and len(text.lstrip("0")) + exponent <= NUMERIC_WHOLE_DIGITS:
            return ""
    return f"Invalid NUMERIC value: {value}"


# Types are kept under their legacy names, as the service returns them.
LEGACY_NAMES = {"INT64": "INTEGER", "FLOAT64": "FLOAT", "BOOL": "BOOLEAN"}

_JUDGES: dict[str, Callable[[object], str]] = {
    "STRING": _judge_string,
    "INTEGER": _judge_integer,
    "FLOAT": _judge_float,
    "BOOLEAN": _judge_boolean,
    "TIMESTAMP": _judge_timestamp,
    "BYTES": _judge_bytes,
    "NUMERIC": numeric_problem,
}
KNOWN_TYPES = frozenset(_JUDGES)

_FAST_TYPES: dict[str, Any] = {
    "STRING": str,
    "INTEGER": Annotated[int, msgspec.Meta(ge=INT64_MIN, le=INT64_MAX)]
    | Annotated[str, msgspec.Meta(pattern=_INTEGER)],
    "FLOAT": float | Annotated[str, msgspec.Meta(pattern=_NUMBER)],
    "BOOLEAN": bool,
    "TIMESTAMP": datetime,
}
