"""The BigQuery sink with ``BIGQUERY_WRITE_METHOD=insert_all``: at least once.

The service answers HTTP 200 even where rows were refused: each row's error is judged. The insert
id is the event id, which the service uses to drop repetitions for about a minute.

Google's client reads and creates the table; the rows go to its method ``tabledata.insertAll`` as
bytes (:mod:`forwarder.insertbody`) over connections of our own (:mod:`forwarder.inserthttp`):
``insert_rows_json`` spends more time on making JSON than everything here takes together.

Limits (https://cloud.google.com/bigquery/quotas#streaming_inserts): 10 MB and 50,000 rows a
request, 500 rows recommended.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from operator import itemgetter
from typing import Any

import msgspec
from google.api_core.exceptions import GoogleAPICallError, from_http_status

from forwarder.bqservice import TableService
from forwarder.faults import TRANSIENT_REASONS, Blame, FaultError
from forwarder.insertbody import encoder_for
from forwarder.inserthttp import Answer, InsertConnections
from forwarder.partitions import INSERT_ALL_PAST_DAYS
from forwarder.refusals import REFUSED_ALONE_MAX, RefusalRun, refuses_all
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.table import Column
from lifecycle import Settings, bigquery_gather_s
from spool import DeadLetter, Reading, SinkState

REQUEST_MAX_ROWS = 500
REQUEST_MAX_BYTES = 5_000_000
"""Of payload; with the other columns and JSON's escapes a request stays below 10 MB."""

PARALLEL_REQUESTS = 10
"""Half of a batch: two times the service's distance, and ten bodies of 250 KB in memory."""

BATCH_MAX_ROWS = 10_000
BATCH_MAX_BYTES = 4 * 1024 * 1024
DEADLINE_S = 20.0
REFUSAL_SHOWN_BYTES = 300
GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""

_payload = itemgetter(9)  # of a Reading


class InsertAllSink:
    """Inserts readings as rows of one table.

    Args:
        settings: Project, dataset, table, emulator, instance id, whether to create the table.
        state: The sink's own file, which remembers the table.
    """

    name = "bigquery"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES

    def __init__(self, settings: Settings, state: SinkState | None = None) -> None:
        self.gather_s = bigquery_gather_s(settings.commit_delay_ms)
        self._source = settings.instance_id
        self._service = TableService(settings, DEADLINE_S, INSERT_ALL_PAST_DAYS, state)
        self._table = self._service.table
        self._columns: Sequence[Column] = ()
        self._give_back_at = float("inf")
        self._refusals = RefusalRun(hold=settings.refused_policy == "hold")
        self.meanwhile: Callable[[], bool] = lambda: False
        """Called while a delivery only waits for the service (:mod:`forwarder.readahead`)."""
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="insert")

    def check(self) -> Fault | None:
        """Look whether rows could be delivered; see :class:`forwarder.sink.CheckingSink`."""
        return self._service.check()

    @property
    def notice(self) -> str:
        """What an operator has to know while it delivers."""
        return self._service.notice

    def prepare(self, rows: list[Reading]) -> list[Reading]:
        """Do nothing; see :class:`forwarder.readahead.WaitingSink`."""
        return rows  # the requests are made by the threads that send them

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._service.close()

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Insert ``rows``; see :class:`forwarder.sink.Sink`."""
        try:
            delivery = self._deliver(rows)
        except FaultError as error:
            delivery = Delivery(retry=list(rows), fault=error.fault)
        if delivery.fault is not None and delivery.fault.kind is FaultKind.HOLD:
            # By the next try the key file may be another one.
            self._service.close()
        return delivery

    def _deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Insert ``rows`` in requests side by side.

        Raises:
            FaultError: Nothing can be inserted now.
        """
        connections = self._service.session()
        if rows and self._service.look(rows[0][0] - 1):
            self._columns = ()  # the new table's may be others
        if not self._columns:
            self._columns = self._service.read_columns()
        # One set for the whole delivery: a request that runs beside others must judge its answer
        # by the columns it sent, and never send none.
        columns = self._columns
        self._give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        rows, out_of_range = self._service.limits.split(rows)
        chunks = list(_chunks(rows))
        parts = self._pool.map(lambda chunk: self._insert(connections, columns, chunk), chunks)
        # They are in other threads' hands: this one would only wait.
        while self.meanwhile():
            pass
        delivery = Delivery(dead=out_of_range)
        self._refusals.begin()
        suspects: list[DeadLetter] = []
        for chunk, part in zip(chunks, parts, strict=True):
            delivery.retry += part.retry
            suspects += part.dead
            self._refusals.refused(len(part.dead))
            if len(part.dead) + len(part.retry) < len(chunk):
                # The service took some: those that it did not are at fault themselves.
                self._refusals.accepted()
                delivery.dead += suspects
                suspects.clear()
            if delivery.fault is None or (part.fault and part.fault.kind is FaultKind.HOLD):
                delivery.fault = part.fault
        self._end_search(suspects, delivery)
        return delivery

    def _end_search(self, suspects: list[DeadLetter], delivery: Delivery) -> None:
        """Bury the rows that were refused last, unless it is the table that refuses all."""
        if not self._refusals.of_all:
            delivery.dead += suspects
            if delivery.retry and delivery.fault is None:
                delivery.fault = self._unfinished()
            return
        delivery.retry = sorted([*delivery.retry, *(letter.row for letter in suspects)])
        delivery.fault = refuses_all(
            f"insert into {self._table}", suspects[0].detail, self._service.show
        )

    def _unfinished(self) -> Fault:
        return Fault(FaultKind.TRANSIENT, f"insert into {self._table}: not finished yet")

    def _insert(
        self, connections: InsertConnections, columns: Sequence[Column], rows: list[Reading]
    ) -> Delivery:
        """Insert one request's rows, again without those that are refused, to the end."""
        dead: list[DeadLetter] = []
        encoder = encoder_for(tuple(columns), self._source)
        while rows:
            if time.monotonic() >= self._give_back_at:
                return Delivery(retry=rows, dead=dead, fault=self._unfinished())
            try:
                errors = self._post(connections, encoder.body(rows))
            except Exception as error:  # noqa: BLE001 - judged; what is not the service's is raised again
                return self._refused(connections, columns, rows, dead, error)
            if not errors:
                return Delivery(dead=dead)
            outcome = self._judge_rows(columns, rows, errors)
            dead += outcome.dead
            if outcome.fault is not None:
                return Delivery(retry=outcome.retry, dead=dead, fault=outcome.fault)
            rows = outcome.retry
        return Delivery(dead=dead)

    def _post(self, connections: InsertConnections, body: bytes) -> Sequence[dict[str, object]]:
        """Send one insertAll request; return its insertErrors. Raises what the client would."""
        answer = connections.post(body, DEADLINE_S)
        if answer.status != HTTPStatus.OK:
            raise _refusal(answer)
        # Something else would be a proxy's work, and says nothing of the rows: ValueError.
        return msgspec.json.decode(answer.body, type=_Result).insertErrors or ()

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
            now = self._service.read_columns(fresh=True)
        except FaultError:
            self._columns = ()  # the next delivery reads it again and reports what is wrong
            return True
        self._columns = now
        return [c.name for c in now] != [c.name for c in columns]

    def _refused(
        self,
        connections: InsertConnections,
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
        left = self._insert(connections, columns, rows[:half])
        if len(left.dead) == half > REFUSED_ALONE_MAX or (left.retry and left.fault is None):
            # More would tell nothing new: the table may refuse every row.
            return Delivery(retry=[*left.retry, *rows[half:]], dead=dead + left.dead)
        right = self._insert(connections, columns, rows[half:])
        return Delivery(
            retry=left.retry + right.retry,
            dead=dead + left.dead + right.dead,
            fault=left.fault or right.fault,
        )


class _Result(msgspec.Struct):
    insertErrors: list[dict[str, Any]] | None = None  # noqa: N815 - the service's spelling


class _Refusal(msgspec.Struct):
    """https://cloud.google.com/bigquery/docs/error-messages#errors."""

    message: str = ""
    errors: list[dict[str, Any]] = []


class _RefusalDocument(msgspec.Struct):
    error: _Refusal


def _refusal(answer: Answer) -> GoogleAPICallError:
    """Return what Google's client would raise."""
    try:
        refusal = msgspec.json.decode(answer.body, type=_RefusalDocument).error
    except ValueError:  # a proxy's page
        text = answer.body[:REFUSAL_SHOWN_BYTES].decode(errors="replace")
        refusal = _Refusal(text or "no reason was given")
    error: GoogleAPICallError = from_http_status(
        answer.status, refusal.message, errors=refusal.errors
    )
    return error


def _chunks(rows: Sequence[Reading]) -> Iterator[list[Reading]]:
    """Cut into requests of at most REQUEST_MAX_ROWS and REQUEST_MAX_BYTES of payload."""
    start = 0
    while start < len(rows):
        chunk = list(rows[start : start + REQUEST_MAX_ROWS])
        while len(chunk) > 1 and sum(map(len, map(_payload, chunk))) > REQUEST_MAX_BYTES:
            chunk = chunk[: len(chunk) // 2]
        yield chunk
        start += len(chunk)
