"""The BigQuery sink with ``BIGQUERY_WRITE_METHOD=insert_all``: at least once.

The service answers HTTP 200 even where rows were refused: each row's error is judged. The insert
id is the event id, which the service uses to drop repetitions for about a minute.

Google's client reads and creates the table; the rows go by its method ``tabledata.insertAll``
over google-auth's session, because ``insert_rows_json`` spends more time on making JSON than
everything else here takes together (:mod:`forwarder.insertbody`).

Limits (https://cloud.google.com/bigquery/quotas#streaming_inserts): 10 MB and 50,000 rows a
request, 500 rows recommended.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import google.auth
import google.auth.exceptions
import msgspec
import requests.exceptions
from google.api_core.exceptions import (
    Conflict,
    GoogleAPICallError,
    RetryError,
    from_http_response,
)
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.transport.requests import AuthorizedSession
from google.cloud import bigquery

from forwarder.faults import (
    CREDENTIALS_REMEDY,
    TRANSIENT_REASONS,
    Blame,
    blame_http,
)
from forwarder.insertbody import encoder_for
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.table import (
    CLUSTER_COLUMNS,
    COLUMNS,
    PARTITION_COLUMN,
    Column,
    ExistingColumn,
    ddl,
    match,
)
from lifecycle import Settings
from spool import DeadLetter, Reading

log = logging.getLogger("forwarder.bigquery")

REQUEST_MAX_ROWS = 500
REQUEST_MAX_BYTES = 5_000_000
"""Of payload; with the other columns and JSON's escapes a request stays below 10 MB."""

DEFAULT_ENDPOINT = "https://bigquery.googleapis.com"
PARALLEL_REQUESTS = 4
BATCH_MAX_ROWS = REQUEST_MAX_ROWS * PARALLEL_REQUESTS
BATCH_MAX_BYTES = 4 * 1024 * 1024
DEADLINE_S = 20.0
GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""

NEW_TABLE_SETTLES_S = 600.0
"""A table that was just created may answer notFound for some minutes."""


_NAMES_REMEDY = "check GCP_PROJECT_ID, BIGQUERY_DATASET and BIGQUERY_TABLE"

NO_RETRY: Any = None
"""Retrying is the drain loop's; the client's own would hide an outage from the operator."""


class _FaultError(Exception):
    """Carries a fault from where it is found to where the delivery is reported."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class InsertAllSink:
    """Inserts readings as rows of one table.

    Args:
        settings: Project, dataset, table, emulator, instance id, whether to create the table.
    """

    name = "bigquery"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._table = (
            f"{settings.gcp_project_id}.{settings.bigquery_dataset}.{settings.bigquery_table}"
        )
        project, dataset, table = self._table.split(".", 2)
        root = settings.bigquery_emulator_host.rstrip("/") or DEFAULT_ENDPOINT
        self._insert_url = (
            f"{root}/bigquery/v2/projects/{project}/datasets/{dataset}/tables/"
            f"{quote(table)}/insertAll"
        )
        self._client: bigquery.Client | None = None
        self._session: AuthorizedSession | None = None
        self._columns: Sequence[Column] = ()
        self._created_at = float("-inf")
        self._give_back_at = float("inf")
        self._pool = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix="insert")

    def close(self) -> None:
        """Close the client."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._session is not None:
            self._session.close()
            self._session = None

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Insert ``rows``; see :class:`forwarder.sink.Sink`."""
        try:
            client = self._connected()
            if not self._columns:
                self._columns = self._read_columns(client)
            # One set for the whole delivery: a request that runs beside others must judge
            # its answer by the columns it sent, and never send none.
            columns = self._columns
            self._give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        except _FaultError as error:
            return Delivery(retry=list(rows), fault=error.fault)
        parts = self._pool.map(lambda chunk: self._insert(client, columns, chunk), _chunks(rows))
        delivery = Delivery()
        for part in parts:
            delivery.retry += part.retry
            delivery.dead += part.dead
            if delivery.fault is None or (part.fault and part.fault.kind is FaultKind.HOLD):
                delivery.fault = part.fault
        return delivery

    def _connected(self) -> bigquery.Client:
        if self._client is None:
            emulator = self._settings.bigquery_emulator_host
            try:
                credentials: Credentials
                if emulator:
                    credentials = AnonymousCredentials()
                else:
                    credentials, _ = google.auth.default(scopes=bigquery.Client.SCOPE)
                self._session = AuthorizedSession(credentials)
                self._client = bigquery.Client(
                    project=self._settings.gcp_project_id,
                    credentials=credentials,
                    client_options={"api_endpoint": emulator} if emulator else None,
                )
            except google.auth.exceptions.DefaultCredentialsError as error:
                raise _FaultError(
                    Fault(FaultKind.HOLD, f"no credentials: {error}", CREDENTIALS_REMEDY)
                ) from error
            except (google.auth.exceptions.GoogleAuthError, OSError, ValueError) as error:
                raise _FaultError(
                    Fault(FaultKind.TRANSIENT, f"cannot build the client: {error}")
                ) from error
        return self._client

    def _read_columns(self, client: bigquery.Client) -> Sequence[Column]:
        """Return the columns that the table and we both know; create the table if told to."""
        try:
            table = client.get_table(self._table, retry=NO_RETRY, timeout=DEADLINE_S)
        except Exception as error:
            blame, fault = self._judge(error)
            missing = getattr(error, "code", None) == 404  # noqa: PLR2004 - HTTP's number
            if blame is Blame.OPERATOR and missing and self._settings.bigquery_create_table:
                return self._create(client)
            if blame is Blame.ROWS:
                # There are no rows in this request: a name in the settings is wrong.
                fault = Fault(FaultKind.HOLD, fault.problem, _NAMES_REMEDY)
            raise _FaultError(fault) from error
        if table.table_type not in {None, "TABLE"}:
            raise _FaultError(
                Fault(
                    FaultKind.HOLD,
                    f"{self._table} is a {table.table_type}, which takes no rows",
                    "set BIGQUERY_TABLE to a table",
                )
            )
        existing = [ExistingColumn(f.name, f.field_type, f.mode) for f in table.schema]
        columns = match(self._table, existing)
        if isinstance(columns, Fault):
            raise _FaultError(columns)
        left_out = sorted({c.name for c in COLUMNS} - {c.name for c in columns})
        if left_out:
            log.warning("the table lacks columns, which stay unwritten: %s", ", ".join(left_out))
        return columns

    def _create(self, client: bigquery.Client) -> Sequence[Column]:
        table = bigquery.Table(
            self._table,
            schema=[
                bigquery.SchemaField(c.name, c.sql_type, "REQUIRED" if c.required else "NULLABLE")
                for c in COLUMNS
            ],
        )
        table.time_partitioning = bigquery.TimePartitioning(
            type_=bigquery.TimePartitioningType.DAY, field=PARTITION_COLUMN
        )
        table.clustering_fields = list(CLUSTER_COLUMNS)
        try:
            client.create_table(table, retry=NO_RETRY, timeout=DEADLINE_S)
        except Conflict:
            return self._read_columns(client)  # somebody else made it just now
        except Exception as error:
            blame, fault = self._judge(error)
            if blame is Blame.ROWS:
                fault = Fault(FaultKind.HOLD, fault.problem, _NAMES_REMEDY)
            raise _FaultError(fault) from error
        log.info("created the table", extra={"fields": {"table": self._table}})
        self._created_at = time.monotonic()
        return COLUMNS

    def _insert(
        self, client: bigquery.Client, columns: Sequence[Column], rows: list[Reading]
    ) -> Delivery:
        """Insert one request's rows, again without those that are refused, to the end."""
        dead: list[DeadLetter] = []
        while rows:
            if time.monotonic() >= self._give_back_at:
                fault = Fault(FaultKind.TRANSIENT, f"insert into {self._table}: not finished yet")
                return Delivery(retry=rows, dead=dead, fault=fault)
            source = self._settings.instance_id
            try:
                errors = self._post(encoder_for(tuple(columns), source).body(rows))
            except Exception as error:  # noqa: BLE001 - judged; what is not the service's is raised again
                return self._refused(client, columns, rows, dead, error)
            if not errors:
                return Delivery(dead=dead)
            outcome = self._judge_rows(client, columns, rows, errors)
            dead += outcome.dead
            if outcome.fault is not None:
                return Delivery(retry=outcome.retry, dead=dead, fault=outcome.fault)
            rows = outcome.retry
        return Delivery(dead=dead)

    def _post(self, body: bytes) -> Sequence[dict[str, object]]:
        """Send one insertAll request; return its insertErrors. Raises what the client would."""
        if self._session is None:
            raise RuntimeError("insertAll before the session was made")
        answer = self._session.post(
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
        client: bigquery.Client,
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
        if outcome.dead and self._schema_changed(client, columns):
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

    def _schema_changed(self, client: bigquery.Client, columns: Sequence[Column]) -> bool:
        """Return whether the table no longer has the columns that were written."""
        try:
            now = self._read_columns(client)
        except _FaultError:
            self._columns = ()  # the next delivery reads it again and reports what is wrong
            return True
        self._columns = now
        return [c.name for c in now] != [c.name for c in columns]

    def _refused(
        self,
        client: bigquery.Client,
        columns: Sequence[Column],
        rows: list[Reading],
        dead: list[DeadLetter],
        error: Exception,
    ) -> Delivery:
        """Handle a request that failed as a whole."""
        blame, fault = self._judge(error)
        if blame is not Blame.ROWS:
            if blame is Blame.OPERATOR:
                self._columns = ()  # mended or not, look at the table again first
            return Delivery(retry=rows, dead=dead, fault=fault)
        if len(rows) == 1:
            dead.append(DeadLetter(rows[0], "invalid", fault.problem))
            return Delivery(dead=dead)
        half = len(rows) // 2
        left = self._insert(client, columns, rows[:half])
        right = self._insert(client, columns, rows[half:])
        return Delivery(
            retry=left.retry + right.retry,
            dead=dead + left.dead + right.dead,
            fault=left.fault or right.fault,
        )

    def _judge(self, error: Exception) -> tuple[Blame, Fault]:
        """Return who has to act, and the fault to report. Raises what is not the service's."""
        if isinstance(error, GoogleAPICallError):
            return self._judge_http(error)
        if isinstance(error, google.auth.exceptions.RefreshError):
            fault = Fault(FaultKind.HOLD, f"no access token: {error}", CREDENTIALS_REMEDY)
            return Blame.OPERATOR, fault
        if isinstance(
            error,
            google.auth.exceptions.GoogleAuthError
            | requests.exceptions.RequestException
            | RetryError
            | OSError
            # The service, or a proxy before it, answered something that is no JSON.
            | ValueError,
        ):
            problem = f"request to BigQuery for {self._table}: {type(error).__name__}: {error}"
            return Blame.NOBODY, Fault(FaultKind.TRANSIENT, problem)
        raise error

    def _judge_http(self, error: GoogleAPICallError) -> tuple[Blame, Fault]:
        reason = next((str(e.get("reason", "")) for e in error.errors if isinstance(e, dict)), "")
        status = int(error.code or 0)
        blame = blame_http(status, reason)
        problem = f"request to BigQuery for {self._table}: HTTP {status} {reason}: {error.message}"
        settling = time.monotonic() - self._created_at < NEW_TABLE_SETTLES_S
        if status == 404 and settling:  # noqa: PLR2004 - HTTP's number
            return Blame.NOBODY, Fault(FaultKind.TRANSIENT, f"{problem} (the table is new)")
        if blame is not Blame.OPERATOR:
            return blame, Fault(FaultKind.TRANSIENT, problem)
        return blame, Fault(FaultKind.HOLD, problem, self._remedy(status))

    def _remedy(self, status: int) -> str:
        if status == 404:  # noqa: PLR2004 - HTTP's number
            statement = ddl(self._table).replace("\n", " ")
            return (
                f"create the dataset and the table (or set BIGQUERY_CREATE_TABLE=true): {statement}"
            )
        if status == 401:  # noqa: PLR2004 - HTTP's number
            return CREDENTIALS_REMEDY
        project, dataset, table = self._table.split(".", 2)
        return (
            "allow it: bq add-iam-policy-binding --member=serviceAccount:ACCOUNT "
            f"--role=roles/bigquery.dataEditor {project}:{dataset}.{table}"
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
