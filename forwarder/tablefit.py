"""Whether the table that the service describes takes our rows. Makes no call."""

from collections.abc import Sequence
from typing import Any

from forwarder.partitions import Partitioning, partitioning_of
from forwarder.sink import Fault, FaultKind
from forwarder.table import Column, ExistingColumn, match


def not_a_table(name: str, table: Any) -> Fault | None:  # noqa: ANN401 - a table of Google's client
    """Return why no row can be written to a view and its like."""
    if table.table_type in {None, "TABLE"}:
        return None
    return Fault(
        FaultKind.HOLD,
        f"{name} is a {table.table_type}, which takes no rows",
        "set BIGQUERY_TABLE to a table",
    )


def columns_of(name: str, table: Any) -> Sequence[Column] | Fault:  # noqa: ANN401 - see above
    """Return the columns that the table and we both know, or why it does not fit."""
    existing = [ExistingColumn(f.name, f.field_type, f.mode) for f in table.schema]
    return match(name, existing)


def partitioning_of_table(table: Any) -> Partitioning:  # noqa: ANN401 - see above
    """Return how the table is partitioned."""
    found = table.time_partitioning
    if found is None:
        return Partitioning()
    return partitioning_of(found.field, str(found.type_), found.expiration_ms)
