"""BigQuery tables in memory: datasets, schemas, rows in order of arrival.

No protocol is known here, so that the REST fake and a fake of the Storage Write
API can stand before the same tables. Rows are kept as a function that yields
them: what a test never looks at is never parsed.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from tests.fakes.rows import KNOWN_TYPES, LEGACY_NAMES, Body, Column, Row, fast_body_decoder

DEDUP_WINDOW_S = 60.0

READINGS = (
    Column("event_id", "STRING", "REQUIRED"),
    Column("site_code", "STRING", "REQUIRED"),
    Column("sensor_id", "STRING", "REQUIRED"),
    Column("pi_tag", "STRING", "REQUIRED"),
    Column("timestamp", "TIMESTAMP", "REQUIRED"),
    Column("value", "FLOAT", "REQUIRED"),
    Column("topic", "STRING"),
    Column("payload", "STRING"),
    Column("received_at", "TIMESTAMP"),
    Column("source", "STRING"),
    Column("seq", "INTEGER"),
)


class TableError(Exception):
    """A request that the tables refuse. The reason is BigQuery's word for it."""

    reason = "invalid"


class NotFoundError(TableError):
    """The dataset or table does not exist."""

    reason = "notFound"


class DuplicateError(TableError):
    """The dataset or table exists already."""

    reason = "duplicate"


@dataclass(slots=True)
class Table:
    """One table. Its store changes it under the store's lock, others only read."""

    ref: str  # project.dataset.table
    columns: dict[str, Column]
    created_ms: int
    etag: str
    extras: dict[str, object] = field(default_factory=dict)  # timePartitioning, clustering …
    count: int = 0
    decode_fast: Callable[[bytes], Body] | None = None
    batches: list[Callable[[], list[Row]]] = field(default_factory=list)
    seen_ids: OrderedDict[str, float] = field(default_factory=OrderedDict)

    @property
    def partition_column(self) -> str | None:
        """The TIMESTAMP column that the table is partitioned by, if it is by column."""
        partitioning = self.extras.get("timePartitioning")
        name = partitioning.get("field") if isinstance(partitioning, dict) else None
        return name if name in self.columns and self.columns[name].type == "TIMESTAMP" else None

    @property
    def fast_partition_field(self) -> str | None:
        """The name of the partition column in a row that `decode_fast` made."""
        name = self.partition_column
        return None if name is None else f"f{list(self.columns).index(name)}"


class TableStore:
    """Datasets and tables, thread-safe.

    Args:
        keep: False keeps no rows, only counts.
        dedup: whether insert ids are remembered, for `DEDUP_WINDOW_S`.
        clock: tells seconds, for that window.
    """

    def __init__(
        self,
        *,
        keep: bool = True,
        dedup: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dedup = dedup
        self._keep = keep
        self._changed = threading.Condition()
        self._datasets: set[str] = set()
        self._tables: dict[str, Table] = {}
        self._dead: dict[str, Table] = {}
        """Tables that were made again, and still take rows."""
        self._changes = 0
        self._clock = clock

    def create_dataset(self, ref: str) -> None:
        """Create the dataset, named project.dataset."""
        with self._changed:
            if ref in self._datasets:
                raise DuplicateError(f"Already Exists: Dataset {_shown_dataset(ref)}")
            self._datasets.add(ref)

    def dataset(self, ref: str) -> None:
        """Raise `NotFoundError` unless the dataset exists."""
        if ref not in self._datasets:
            raise NotFoundError(f"Not found: Dataset {_shown_dataset(ref)}")

    def delete_dataset(self, ref: str, *, with_tables: bool) -> None:
        """Delete the dataset; one that holds tables only if told so."""
        with self._changed:
            self.dataset(ref)
            held = [name for name in self._tables if name.rpartition(".")[0] == ref]
            if held and not with_tables:
                raise TableError(f"Dataset {_shown_dataset(ref)} is still in use")
            for name in held:
                del self._tables[name]
            self._datasets.remove(ref)

    def create(
        self, ref: str, columns: Iterable[Column], extras: dict[str, object] | None = None
    ) -> Table:
        """Create a table in a dataset that exists."""
        with self._changed:
            self.dataset(ref.rpartition(".")[0])
            if ref in self._tables:
                raise DuplicateError(f"Already Exists: Table {_shown(ref)}")
            table = Table(ref, {}, int(time.time() * 1000), "", dict(extras or {}))
            self._set_columns(table, columns)
            _check_layout(table)
            self._tables[ref] = table
            return table

    def table(self, ref: str) -> Table:
        """Return the table; raise `NotFoundError` if it or its dataset is missing."""
        table = self._tables.get(ref)
        if table is None:
            self.dataset(ref.rpartition(".")[0])
            raise NotFoundError(f"Not found: Table {_shown(ref)}")
        return table

    def writable(self, ref: str) -> Table:
        """Return the table that rows go to: for a while that may be one that is dead."""
        return self._dead.get(ref) or self.table(ref)

    def recreate(self, ref: str, *, lingers: bool = False) -> Table:
        """Drop a table and make it again; return the dead one.

        Args:
            ref: Which.
            lingers: Whether rows go on being taken for the dead one, until :meth:`catch_up`.
        """
        with self._changed:
            old = self.table(ref)
            del self._tables[ref]
            new = self.create(ref, list(old.columns.values()), old.extras)
            new.created_ms = max(new.created_ms, old.created_ms + 1)
            if lingers:
                self._dead[ref] = old
            return old

    def catch_up(self, ref: str) -> None:
        """Let rows go to the table that there is now."""
        self._dead.pop(ref, None)

    def tables(self, dataset: str | None = None) -> list[Table]:
        """Return all tables, or those of one dataset."""
        with self._changed:
            tables = list(self._tables.values())
        return [t for t in tables if dataset is None or t.ref.rpartition(".")[0] == dataset]

    def delete(self, ref: str) -> None:
        """Delete the table with its rows."""
        with self._changed:
            self.table(ref)
            del self._tables[ref]

    def update(
        self, ref: str, columns: Sequence[Column] | None, extras: dict[str, object]
    ) -> Table:
        """Change a table as the service allows: columns may be added, and relaxed."""
        with self._changed:
            table = self.table(ref)
            if columns is not None:
                _check_schema_change(table, columns)
                self._set_columns(table, columns)
            table.extras.update(extras)
            self._touch(table)
            return table

    def force_columns(self, ref: str, columns: Iterable[Column]) -> None:
        """Give a table any schema, as someone with a drop and a create could."""
        with self._changed:
            self._set_columns(self.table(ref), columns)

    def append(
        self, table: Table, insert_ids: Sequence[str | None], load: Callable[[], Sequence[Row]]
    ) -> None:
        """Add rows, except those whose insert id was seen within the window.

        Args:
            table: where to.
            insert_ids: one for each row; None for a row without.
            load: yields the same rows; called at most once, and perhaps never.
        """
        with self._changed:
            fresh = self._fresh(table, insert_ids) if self.dedup else range(len(insert_ids))
            table.count += len(fresh)
            if self._keep and fresh:
                table.batches.append(_loader(load, fresh))
            self._changed.notify_all()

    def rows(self, ref: str) -> list[Row]:
        """Return the table's rows in order of arrival."""
        with self._changed:
            batches = list(self.table(ref).batches)
        return [row for batch in batches for row in batch()]

    def count(self, ref: str | None = None) -> int:
        """Return how many rows the table (or all together) got."""
        if ref is not None:
            return self.table(ref).count
        return sum(table.count for table in list(self._tables.values()))

    def wait_for(self, count: int, timeout_s: float, ref: str | None = None) -> bool:
        """Block until `count` rows are there; return whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count(ref) >= count, timeout=timeout_s)

    def _fresh(self, table: Table, insert_ids: Sequence[str | None]) -> Sequence[int]:
        now = self._clock()
        seen = table.seen_ids
        while seen and next(iter(seen.values())) < now - DEDUP_WINDOW_S:
            seen.popitem(last=False)
        fresh = []
        for index, insert_id in enumerate(insert_ids):
            if insert_id:
                if insert_id in seen:
                    continue
                seen[insert_id] = now
            fresh.append(index)
        return fresh

    def _set_columns(self, table: Table, columns: Iterable[Column]) -> None:
        named = [replace(c, type=LEGACY_NAMES.get(c.type, c.type)) for c in columns]
        for column in named:
            if column.type not in KNOWN_TYPES:
                raise TableError(f"Invalid value for type: {column.type} is not a valid value")
        table.columns = {column.name: column for column in named}
        table.decode_fast = fast_body_decoder(named)
        self._touch(table)

    def _touch(self, table: Table) -> None:
        self._changes += 1
        table.etag = f"etag-{self._changes}"


def _loader(load: Callable[[], Sequence[Row]], wanted: Sequence[int]) -> Callable[[], list[Row]]:
    loaded: list[list[Row]] = []

    def rows() -> list[Row]:
        if not loaded:
            everything = load()
            loaded.append([everything[index] for index in wanted])
        return loaded[0]

    return rows


def _check_layout(table: Table) -> None:
    for purpose, key in (("partitioning", "timePartitioning"), ("clustering", "clustering")):
        layout = table.extras.get(key)
        if not isinstance(layout, dict):
            continue
        for name in layout.get("fields", [layout.get("field")]):
            if name is not None and name not in table.columns:
                raise TableError(
                    f"The field specified for {purpose} cannot be found in the schema. "
                    f"Invalid field: {name}."
                )


def _check_schema_change(table: Table, columns: Sequence[Column]) -> None:
    shown = _shown(table.ref)
    new = {column.name: column for column in columns}
    for name, old in table.columns.items():
        if name not in new:
            raise TableError(
                f"Provided Schema does not match Table {shown}. Field {name} is missing in new "
                "schema"
            )
        new_type = LEGACY_NAMES.get(new[name].type, new[name].type)
        if new_type != old.type:
            raise TableError(
                f"Provided Schema does not match Table {shown}. Field {name} has changed type "
                f"from {old.type} to {new_type}"
            )
        relaxed = (old.mode, new[name].mode) == ("REQUIRED", "NULLABLE")
        if new[name].mode != old.mode and not relaxed:
            raise TableError(
                f"Provided Schema does not match Table {shown}. Field {name} has changed mode "
                f"from {old.mode} to {new[name].mode}"
            )
    for name, column in new.items():
        if name not in table.columns and column.mode == "REQUIRED":
            raise TableError(
                f"Provided Schema does not match Table {shown}. Cannot add required fields to an "
                f"existing schema. (field: {name})"
            )


def _shown(ref: str) -> str:
    """Write a table's name as the service's messages do: project:dataset.table."""
    project, *names = ref.rsplit(".", 2)
    return f"{project}:{'.'.join(names)}"


def _shown_dataset(ref: str) -> str:
    """Write a dataset's name as the service's messages do: project:dataset."""
    return ":".join(ref.rsplit(".", 1))
