"""A fake of BigQuery's REST API: datasets, tables, and streaming with insertAll.

The official client reaches it with `client_options={"api_endpoint": fake.url}`.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Self

from tests.fakes import rest
from tests.fakes.bigquery_faults import BigQueryFaults, HttpStatus, RowErrors
from tests.fakes.faults import Delay, Hang, LoseAnswer
from tests.fakes.http1 import HOST, HttpServer, Reply, Request
from tests.fakes.insert_all import insert_all
from tests.fakes.rest import ApiError
from tests.fakes.rows import Column, Row
from tests.fakes.tables import (
    READINGS,
    DuplicateError,
    NotFoundError,
    Table,
    TableError,
    TableStore,
)

_STATUS_OF: dict[type[TableError], int] = {NotFoundError: 404, DuplicateError: 409}


class FakeBigQuery:
    """A BigQuery server on 127.0.0.1, usable as a context manager.

    Args:
        port: where to listen; 0 takes a free port and keeps it for restarts.
        keep: False keeps no rows, only counts.
        dedup: whether insert ids are remembered for a minute.
        store: the tables, if another fake stands before the same ones.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        keep: bool = True,
        dedup: bool = True,
        store: TableStore | None = None,
    ) -> None:
        self.faults = BigQueryFaults()
        self.clock_ahead_s: float | None = 0.0
        """How far its date is ahead of this machine's; None for answers without a date."""
        self.store = store if store is not None else TableStore(keep=keep, dedup=dedup)
        self._server = HttpServer(self._serve, port)
        self._lock = threading.Lock()
        self._requests = 0
        self._stopping = False
        self._calls: dict[str, Callable[[rest.Route, Request], Reply]] = {
            "tables.insert": self._tables_insert,
            "tables.get": self._tables_get,
            "tables.list": self._tables_list,
            "tables.patch": self._tables_update,
            # Strictly an update replaces the whole resource; the client only patches.
            "tables.update": self._tables_update,
            "tables.delete": self._tables_delete,
            "datasets.insert": self._datasets_insert,
            "datasets.get": self._datasets_get,
            "datasets.delete": self._datasets_delete,
        }

    def __enter__(self) -> Self:
        """Start to serve."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop to serve."""
        self.stop()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.port

    @property
    def url(self) -> str:
        """What to give to the client as `api_endpoint`."""
        return f"http://{HOST}:{self.port}"

    @property
    def count(self) -> int:
        """How many rows were inserted, over all tables."""
        return self.store.count()

    @property
    def requests(self) -> int:
        """How many insertAll requests arrived, whatever became of them."""
        return self._requests

    def start(self) -> Self:
        """Listen, on the port of last time if there was one; return once it is open."""
        self._stopping = False
        self._server.start()
        return self

    def stop(self) -> None:
        """Go away: connections are closed and refused. The store stays."""
        self._stopping = True  # so that no request begins to hang behind the release
        self.faults.release()
        self._server.stop()

    def create_table(
        self,
        ref: str,
        columns: Iterable[Column] = READINGS,
        *,
        partition_by: str | None = "timestamp",
        cluster_by: Iterable[str] = ("site_code", "pi_tag"),
    ) -> None:
        """Create the table `project.dataset.table`, and its dataset if need be."""
        self.create_dataset(ref.rpartition(".")[0])
        columns = list(columns)
        names = {column.name for column in columns}
        extras: dict[str, object] = {}
        if partition_by in names:
            extras["timePartitioning"] = {"type": "DAY", "field": partition_by}
        if fields := [name for name in cluster_by if name in names]:
            extras["clustering"] = {"fields": fields}
        self.store.create(ref, columns, extras)

    def create_dataset(self, ref: str) -> None:
        """Create the dataset `project.dataset` unless it exists."""
        try:
            self.store.create_dataset(ref)
        except DuplicateError:
            return  # it is there, which is all that was asked for

    def add_column(self, ref: str, column: Column) -> None:
        """Add a column, even a REQUIRED one, which the API would refuse."""
        columns = self.store.table(ref).columns
        self.store.force_columns(ref, [*columns.values(), column])

    def drop_column(self, ref: str, name: str) -> None:
        """Take a column away, as ALTER TABLE DROP COLUMN does."""
        columns = dict(self.store.table(ref).columns)
        del columns[name]
        self.store.force_columns(ref, columns.values())

    def rows(self, ref: str) -> list[Row]:
        """Return the table's rows in order of arrival."""
        return self.store.rows(ref)

    def table_count(self, ref: str) -> int:
        """Return how many rows the table got."""
        return self.store.count(ref)

    def wait_for(self, count: int, timeout_s: float, ref: str | None = None) -> bool:
        """Block until `count` rows are there; return whether they are."""
        return self.store.wait_for(count, timeout_s, ref)

    def _serve(self, request: Request) -> Reply | None:
        try:
            return self._meet_fault(rest.route(request.method, request.target), request)
        except ApiError as error:
            return rest.error_reply(error)
        except TableError as error:
            status = _STATUS_OF.get(type(error), 400)
            return rest.error_reply(ApiError(status, error.reason, str(error)))

    def _meet_fault(self, route: rest.Route, request: Request) -> Reply | None:
        """Carry a request out unless a fault is planned for it."""
        if route.call == "insertAll":
            with self._lock:
                self._requests += 1
        fault = self.faults.take(route.call)
        if isinstance(fault, HttpStatus):
            raise ApiError(fault.status, fault.reason, fault.message)
        if isinstance(fault, (Hang, Delay)):
            delay_s = fault.delay_s if isinstance(fault, Delay) else None
            if not self.faults.hold(delay_s, lambda: self._stopping):
                return None
        if route.call == "insertAll":
            reply = self._insert_all(route, request, fault)
        else:
            reply = self._calls[route.call](route, request)
        return None if isinstance(fault, LoseAnswer) else reply

    def _insert_all(self, route: rest.Route, request: Request, fault: object) -> Reply:
        table = self.store.writable(route.table)
        row_fault = fault if isinstance(fault, RowErrors) else None
        answer = insert_all(self.store, table, request.body, self.faults.poison, row_fault)
        return rest.json_reply(answer)

    def _tables_insert(self, route: rest.Route, request: Request) -> Reply:
        resource = rest.json_object(request.body)
        ref = f"{route.dataset}.{rest.name_in(resource, 'table')}"
        columns = rest.columns_in(resource) or []
        return _shown(self.store.create(ref, columns, rest.extras_in(resource)))

    def _tables_get(self, route: rest.Route, _: Request) -> Reply:
        found = _shown(self.store.table(route.table))
        ahead_s = self.clock_ahead_s
        return found if ahead_s is None else replace(found, date_s=time.time() + ahead_s)

    def _tables_list(self, route: rest.Route, _: Request) -> Reply:
        self.store.dataset(route.dataset)
        found = [rest.table_resource(table) for table in self.store.tables(route.dataset)]
        return rest.json_reply({"tables": found, "totalItems": len(found)})

    def _tables_update(self, route: rest.Route, request: Request) -> Reply:
        resource = rest.json_object(request.body)
        expected = request.headers.get("if-match")
        if expected is not None and expected != self.store.table(route.table).etag:
            raise ApiError(412, "conditionNotMet", "Precondition check failed.")
        columns = rest.columns_in(resource)
        return _shown(self.store.update(route.table, columns, rest.extras_in(resource)))

    def _tables_delete(self, route: rest.Route, _: Request) -> Reply:
        self.store.delete(route.table)
        return Reply(204)

    def _datasets_insert(self, route: rest.Route, request: Request) -> Reply:
        name = rest.name_in(rest.json_object(request.body), "dataset")
        self.store.create_dataset(f"{route.project}.{name}")
        return rest.json_reply(rest.dataset_resource(f"{route.project}.{name}"))

    def _datasets_get(self, route: rest.Route, _: Request) -> Reply:
        self.store.dataset(route.dataset)
        return rest.json_reply(rest.dataset_resource(route.dataset))

    def _datasets_delete(self, route: rest.Route, request: Request) -> Reply:
        with_tables = "deletecontents=true" in request.target.lower()
        self.store.delete_dataset(route.dataset, with_tables=with_tables)
        return Reply(204)


def _shown(table: Table) -> Reply:
    return rest.json_reply(rest.table_resource(table))
