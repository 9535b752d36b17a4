"""The BigQuery table: our columns, how they meet an existing table, and its DDL.

Nothing here talks to the service.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forwarder.sink import Fault, FaultKind

PARTITION_COLUMN = "timestamp"
CLUSTER_COLUMNS = ("site_code", "pi_tag")


@dataclass(frozen=True)
class Column:
    """A column that we can fill.

    Attributes:
        name: In the table.
        sql_type: As in GoogleSQL.
        accepted: Types of an existing column that take our values, in the API's spelling.
        required: Whether a table without it is unusable.
    """

    name: str
    sql_type: str
    accepted: frozenset[str]
    required: bool


_STRING = frozenset({"STRING"})
_TIMESTAMP = frozenset({"TIMESTAMP"})
_INTEGER = frozenset({"INTEGER", "INT64", "NUMERIC", "BIGNUMERIC"})
_FLOAT = frozenset({"FLOAT", "FLOAT64"})

COLUMNS = (
    # forwarder/insertbody.py makes the values, in this order.
    Column("event_id", "STRING", _STRING, required=True),
    Column("site_code", "STRING", _STRING, required=True),
    Column("sensor_id", "STRING", _STRING, required=True),
    Column("pi_tag", "STRING", _STRING, required=True),
    Column("timestamp", "TIMESTAMP", _TIMESTAMP, required=True),
    Column("value", "FLOAT64", _FLOAT, required=True),
    Column("topic", "STRING", _STRING, required=False),
    Column("payload", "STRING", _STRING, required=False),
    Column("received_at", "TIMESTAMP", _TIMESTAMP, required=False),
    Column("source", "STRING", _STRING, required=False),
    Column("seq", "INT64", _INTEGER, required=False),
)


@dataclass(frozen=True)
class ExistingColumn:
    """A column that the table has: name, the API's type, and mode (NULLABLE, REQUIRED, …)."""

    name: str
    api_type: str
    mode: str


def ddl(table: str) -> str:
    """Return the statement that creates ``table`` (``project.dataset.table``)."""
    lines = ",\n".join(
        f"  {c.name} {c.sql_type}{' NOT NULL' if c.required else ''}" for c in COLUMNS
    )
    return (
        f"CREATE TABLE `{table}` (\n{lines}\n)\nPARTITION BY TIMESTAMP_TRUNC({PARTITION_COLUMN}, "
        f"DAY)\nCLUSTER BY {', '.join(CLUSTER_COLUMNS)}"
    )


def match(table: str, existing: Iterable[ExistingColumn]) -> Sequence[Column] | Fault:
    """Return the columns to write: those that we and the table both know.

    Returns a fault instead if the table lacks what we must write, has it in another type,
    or requires what we do not have; the remedy is the exact statement.
    """
    by_name = {column.name.lower(): column for column in existing}
    problems: list[str] = []
    remedies: list[str] = []
    usable = []
    for column in COLUMNS:
        there = by_name.pop(column.name, None)
        if there is None:
            if column.required:
                problems.append(f"column {column.name} is missing")
                remedies.append(
                    f"ALTER TABLE `{table}` ADD COLUMN {column.name} {column.sql_type};"
                )
        elif there.api_type.upper() not in column.accepted or there.mode == "REPEATED":
            problems.append(
                f"column {there.name} is {there.mode} {there.api_type}, but must be "
                f"{column.sql_type}"
            )
            remedies.append(
                f"ALTER TABLE `{table}` RENAME COLUMN {there.name} TO {there.name}_old; "
                f"ALTER TABLE `{table}` ADD COLUMN {column.name} {column.sql_type};"
            )
        else:
            usable.append(column)
    for stranger in by_name.values():
        if stranger.mode == "REQUIRED":
            problems.append(f"column {stranger.name} is required, and readings have none")
            remedies.append(f"ALTER TABLE `{table}` ALTER COLUMN {stranger.name} DROP NOT NULL;")
    if problems:
        return Fault(
            FaultKind.HOLD,
            f"table {table} does not fit: {'; '.join(problems)}",
            f"mend it with: {' '.join(remedies)}",
        )
    return usable
