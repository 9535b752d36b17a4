"""The BigQuery sink with ``BIGQUERY_WRITE_METHOD=insert_all``: at least once.

The service answers HTTP 200 even where rows were refused: each row's error is judged. The insert
id is the event id, which the service uses to drop repetitions for about a minute.

Google's client reads and creates the table; the rows go by its method ``tabledata.insertAll``
over google-auth's session, because ``insert_rows_json`` spends more time on making JSON than
everything else here takes together (:mod:`forwarder.insertbody`).

Limits (https://cloud.google.com/bigquery/quotas#streaming_inserts): 10 MB and 50,000 rows a
request, 500 rows recommended.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
from google.api_core.exceptions import from_http_response
from google.auth.transport.requests import AuthorizedSession

from forwarder.bqservice import FaultError, TableService
from forwarder.faults import TRANSIENT_REASONS, Blame
from forwarder.insertbody import encoder_for
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.table import Column
from lifecycle import Settings
from spool import DeadLetter, Reading

REQUEST_MAX_ROWS = 500
REQUEST_MAX_BYTES = 5_000_000
"""Of payload; with the other columns and JSON's escapes a request stays below 10 MB."""

PARALLEL_REQUESTS = 4
BATCH_MAX_ROWS = 10_000
BATCH_MAX_BYTES = 4 * 1024 * 1024
DEADLINE_S = 20.0
GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""


class InsertAllSink:
    """Inserts readings as rows of one table.

    Args:
        settings: Project, dataset, table, emulator, instance id, whether to create the table.
    """

    name = "bigquery"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES

    def __init__(self, settings: Settings) -> None:
        self._source = settings.instance_id
        self._service = TableService(settings, DEADLINE_S)
        self._table = self._service.table
        project, dataset, table = self._table.split(".", 2)
        self._insert_url = (
            f"{self._service.root}/bigquery/v2/projects/{project}/datasets/{dataset}/tables/"
            f"{quote(table)}/insertAll"
        )
        self._columns: Sequence[Column] = ()
        self._give_back_at = float("inf")
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="insert")

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._service.close()

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Insert ``rows``; see :class:`forwarder.sink.Sink`."""
        try:
            session = self._service.session()
            if not self._columns:
                self._columns = self._service.read_columns()
            # One set for the whole delivery: a request that runs beside others must judge
            # its answer by the columns it sent, and never send none.
            columns = self._columns
            self._give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        except FaultError as error:
            return Delivery(retry=list(rows), fault=error.fault)
        parts = self._pool.map(lambda chunk: self._insert(session, columns, chunk), _chunks(rows))
        delivery = Delivery()
        for part in parts:
            delivery.retry += part.retry
            delivery.dead += part.dead
            if delivery.fault is None or (part.fault and part.fault.kind is FaultKind.HOLD):
                delivery.fault = part.fault
        return delivery

    def _insert(
        self, session: AuthorizedSession, columns: Sequence[Column], rows: list[Reading]
    ) -> Delivery:
        """Insert one request's rows, again without those that are refused, to the end."""
        dead: list[DeadLetter] = []
        while rows:
            if time.monotonic() >= self._give_back_at:
                fault = Fault(FaultKind.TRANSIENT, f"insert into {self._table}: not finished yet")
                return Delivery(retry=rows, dead=dead, fault=fault)
            try:
                errors = self._post(session, encoder_for(tuple(columns), self._source).body(rows))
            except Exception as error:  # noqa: BLE001 - judged; what is not the service's is raised again
                return self._refused(session, columns, rows, dead, error)
            if not errors:
                return Delivery(dead=dead)
            outcome = self._judge_rows(columns, rows, errors)
            dead += outcome.dead
            if outcome.fault is not None:
                return Delivery(retry=outcome.retry, dead=dead, fault=outcome.fault)
            rows = outcome.retry
        return Delivery(dead=dead)

    def _post(self, session: AuthorizedSession, body: bytes) -> Sequence[dict[str, object]]:
        """Send one insertAll request; return its insertErrors. Raises what the client would."""
        answer = session.post(
            self._insert_url,
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=DEADLINE_S,
        )
        if answer.status_code != HTTPStatus.OK:
            raise from_http_response(answer)
        # Something else than an object would be a proxy's work: ValueError, so try again.
        result = msgspec.json.decode(answer.content, type=dict[str, Any])
        errors: Sequence[dict[str, object]] = result.get("insertErrors", ())
        return errors

    def _judge_rows(
        self,
        columns: Sequence[Column],
        rows: list[Reading],
        errors: Sequence[dict[str, object]],
    ) -> Delivery:
        """Judge the errors of an HTTP 200: guilty, stopped by others' guilt, or transient.

        A row without an error was inserted. ``retry`` with no fault means: again, at once.
        """
        refused: dict[int, tuple[str, str]] = {}
        for entry in errors:
            index = entry.get("index")
            causes = entry.get("errors")
            if not (isinstance(index, int) and isinstance(causes, list) and causes):
                # Some row was refused; taking any of them for inserted could lose it.
                fault = Fault(
                    FaultKind.TRANSIENT, f"insert into {self._table}: an error without row or cause"
                )
                return Delivery(retry=rows, fault=fault)
            # The first cause that is not "stopped" is the row's own.
            cause = next((c for c in causes if c.get("reason") != "stopped"), causes[0])
            where = f" (column {cause['location']})" if cause.get("location") else ""
            refused[index] = (str(cause.get("reason")), f"{cause.get('message')}{where}")
        outcome = Delivery()
        for index, row in enumerate(rows):
            reason, detail = refused.get(index, ("", ""))
            if not reason:
                continue
            if reason == "stopped":
                outcome.retry.append(row)
            elif reason in TRANSIENT_REASONS:
                outcome.retry.append(row)
                outcome.fault = Fault(
                    FaultKind.TRANSIENT, f"insert into {self._table}: {reason}: {detail}"
                )
            else:
                outcome.dead.append(DeadLetter(row, reason, detail))
        if outcome.dead and self._schema_changed(columns):
            # Not the rows: the table is another one now. All of them again.
            refused_rows = [row for index, row in enumerate(rows) if index in refused]
            return Delivery(
                retry=refused_rows,
                fault=Fault(FaultKind.TRANSIENT, f"the schema of {self._table} has changed"),
            )
        if not outcome.dead and outcome.retry and outcome.fault is None:
            outcome.fault = Fault(
                FaultKind.TRANSIENT, f"insert into {self._table}: all rows stopped, no cause given"
            )
        return outcome

    def _schema_changed(self, columns: Sequence[Column]) -> bool:
        """Return whether the table no longer has the columns that were written."""
        try:
            now = self._service.read_columns()
        except FaultError:
            self._columns = ()  # the next delivery reads it again and reports what is wrong
            return True
        self._columns = now
        return [c.name for c in now] != [c.name for c in columns]

    def _refused(
        self,
        session: AuthorizedSession,
        columns: Sequence[Column],
        rows: list[Reading],
        dead: list[DeadLetter],
        error: Exception,
    ) -> Delivery:
        """Handle a request that failed as a whole."""
        blame, fault = self._service.judge(error)
        if blame is not Blame.ROWS:
            if blame is Blame.OPERATOR:
                self._columns = ()  # mended or not, look at the table again first
            return Delivery(retry=rows, dead=dead, fault=fault)
        if len(rows) == 1:
            dead.append(DeadLetter(rows[0], "invalid", fault.problem))
            return Delivery(dead=dead)
        half = len(rows) // 2
        left = self._insert(session, columns, rows[:half])
        right = self._insert(session, columns, rows[half:])
        return Delivery(
            retry=left.retry + right.retry,
            dead=dead + left.dead + right.dead,
            fault=left.fault or right.fault,
        )


def _chunks(rows: Sequence[Reading]) -> Iterator[list[Reading]]:
    """Cut into requests of at most REQUEST_MAX_ROWS and REQUEST_MAX_BYTES of payload."""
    chunk: list[Reading] = []
    size = 0
    for row in rows:
        if chunk and (len(chunk) == REQUEST_MAX_ROWS or size + len(row[9]) > REQUEST_MAX_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += len(row[9])
    if chunk:
        yield chunk
