"""tabledata.insertAll: a whole request is judged, then its rows are stored or not."""

from collections.abc import Callable, Mapping
from operator import attrgetter, itemgetter

import msgspec

from tests.fakes.bigquery_faults import RowErrors
from tests.fakes.rest import ApiError, json_object
from tests.fakes.rows import Row, RowError, judge_row, partition_bounds
from tests.fakes.tables import Table, TableStore

MAX_REQUEST_BYTES = 10_000_000
MAX_ROWS = 50_000

_OK: dict[str, object] = {"kind": "bigquery#tableDataInsertAllResponse"}
_STOPPED = RowError("stopped", "", "")
_insert_id = attrgetter("insertId")
_json = itemgetter("json")


def insert_all(
    store: TableStore,
    table: Table,
    body: bytes,
    poison: Callable[[Row], bool] | None = None,
    row_fault: RowErrors | None = None,
) -> dict[str, object]:
    """Carry one request out; return the answer's document."""
    if len(body) > MAX_REQUEST_BYTES:
        raise ApiError(
            413,
            "requestTooLarge",
            f"Request payload size exceeds the limit: {MAX_REQUEST_BYTES} bytes.",
        )
    if poison is None and row_fault is None and _insert_whole(store, table, body):
        return _OK
    return _RowByRow(table, body, poison, row_fault).insert(store)


def _insert_whole(store: TableStore, table: Table, body: bytes) -> bool:
    """Store a request that is good throughout; return False to have it judged by row."""
    if table.decode_fast is None:
        return False
    try:
        request = table.decode_fast(body)
    except msgspec.DecodeError:
        return False
    entries = request.rows
    if not 0 < len(entries) <= MAX_ROWS:
        return False
    if table.fast_partition_field is not None:
        moment = attrgetter(f"json.{table.fast_partition_field}")
        first, last = partition_bounds()
        try:
            moments = list(map(moment, entries))
            if min(moments) < first or max(moments) > last:
                return False
        except TypeError:  # not all of them are datetimes with a zone
            return False
    store.append(
        table,
        list(map(_insert_id, entries)),
        lambda: list(map(_json, msgspec.json.decode(body)["rows"])),
    )
    return True


class _RowByRow:
    """A request in which something is, or shall be, wrong."""

    def __init__(
        self,
        table: Table,
        body: bytes,
        poison: Callable[[Row], bool] | None,
        fault: RowErrors | None,
    ) -> None:
        request = json_object(body)
        self._table = table
        self._poison = poison
        self._fault = fault
        self._skip_invalid = bool(request.get("skipInvalidRows"))
        self._ignore_unknown = bool(request.get("ignoreUnknownValues"))
        self._rows, self._insert_ids = _entries(request)

    def insert(self, store: TableStore) -> dict[str, object]:
        """Store the rows that may be stored; return the answer's document."""
        invalid = self._invalid()
        errors = dict(invalid)
        stop_others = bool(invalid) and not self._skip_invalid
        if self._fault is not None and not stop_others:
            failing = RowError(self._fault.reason, "", "")
            for index, row in enumerate(self._rows):
                if index not in errors and self._fault.where(row):
                    errors[index] = [failing]
            stop_others = self._fault.stop_others and len(errors) > len(invalid)
        good = [index for index in range(len(self._rows)) if index not in errors]
        if stop_others:
            errors.update((index, [_STOPPED]) for index in good)
        elif good:
            kept = [self._known(self._rows[index]) for index in good]
            store.append(self._table, [self._insert_ids[index] for index in good], lambda: kept)
        if not errors:
            return _OK
        # As the service does it, the culprits come first and the stopped rows after
        # them: a client has to go by the index.
        return {**_OK, "insertErrors": [_shown(i, found) for i, found in errors.items()]}

    def _invalid(self) -> dict[int, list[RowError]]:
        found = {}
        table = self._table
        for index, row in enumerate(self._rows):
            errors = judge_row(
                row, table.columns, table.partition_column, ignore_unknown=self._ignore_unknown
            )
            if not errors and self._poison is not None and self._poison(row):
                errors = [RowError("invalid", "", "The row was refused.")]
            if errors:
                found[index] = errors
        return found

    def _known(self, row: Row) -> Row:
        return {name: value for name, value in row.items() if name in self._table.columns}


def _entries(request: Mapping[str, object]) -> tuple[list[Row], list[str | None]]:
    entries = request.get("rows")
    if not isinstance(entries, list) or not entries:
        raise ApiError(400, "invalid", "No rows present in the request.")
    if len(entries) > MAX_ROWS:
        raise ApiError(
            400,
            "invalid",
            f"too many rows present in the request, limit: {MAX_ROWS} row count: {len(entries)}.",
        )
    rows, insert_ids = [], []
    for entry in entries:
        row = entry.get("json") if isinstance(entry, dict) else None
        if not isinstance(row, dict):
            raise ApiError(400, "invalid", "A row of the request has no json object.")
        rows.append(row)
        insert_ids.append(entry.get("insertId"))
    return rows, insert_ids


def _shown(index: int, errors: list[RowError]) -> dict[str, object]:
    return {
        "index": index,
        "errors": [
            {"reason": e.reason, "location": e.location, "debugInfo": "", "message": e.message}
            for e in errors
        ],
    }
