"""What every BigQuery sink needs: credentials, the table and its columns, and who is to blame.

Talks to the service by Google's client; the rows are the sinks'.
"""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import google.auth.exceptions
import requests
from google.api_core.exceptions import Conflict, GoogleAPICallError, RetryError
from google.auth.credentials import AnonymousCredentials, Credentials
from google.cloud import bigquery

from forwarder.access import (
    access_fault,
    cannot_build,
    find_credentials,
    token_fault,
    why_no_access,
)
from forwarder.faults import CREDENTIALS_REMEDY, Blame, FaultError, blame_http
from forwarder.insertaccess import Authorization, route_to
from forwarder.inserthttp import InsertConnections, UnsupportedProxyError
from forwarder.partitions import TimeLimits
from forwarder.sharedcall import SharedCall
from forwarder.sink import Fault, FaultKind
from forwarder.table import (
    CLUSTER_COLUMNS,
    COLUMNS,
    PARTITION_COLUMN,
    Column,
    ddl,
)
from forwarder.tablefit import columns_of, not_a_table, partitioning_of_table
from forwarder.tablename import TableName
from forwarder.tablewatch import TableWatch
from lifecycle import Settings
from spool import SinkState

log = logging.getLogger("forwarder.bigquery")

DEFAULT_ENDPOINT = "https://bigquery.googleapis.com"
NEW_TABLE_SETTLES_S = 600.0
"""A table that was just created may answer notFound for some minutes."""

_PROXY_REMEDY = "set HTTPS_PROXY to http://HOST:PORT, or NO_PROXY=googleapis.com"
_NAMES_REMEDY = "check GCP_PROJECT_ID, BIGQUERY_DATASET and BIGQUERY_TABLE"

CALL_WAIT_S = 45.0
"""How long to wait for what Google's client does, whose own deadline is not of the whole. What
takes longer goes on, and the next try has its outcome."""

WATCH_EACH_S = 60.0
"""How often to look, while readings are delivered, whether the table was dropped and made again."""

WATCH_WAIT_S = 0.5
WATCH_AGAIN_S = 5.0
"""How long a delivery waits for that, and when the next one asks for the answer."""

NO_RETRY: Any = None
"""Retrying is the drain loop's; the client's own would hide an outage from the operator."""


class TableService:
    """One table of the service, with the connection to it.

    Args:
        settings: Project, dataset, table, emulator, whether to create the table.
        deadline_s: Of each request.
        past_days: How old a reading may be in a table that is partitioned by its time.
        state: The sink's own file, which remembers the table; None to remember nothing.

    Attributes:
        table: Its name.
        limits: Of the times that it takes, once its columns were read.
    """

    def __init__(
        self,
        settings: Settings,
        deadline_s: float,
        past_days: int,
        state: SinkState | None = None,
    ) -> None:
        self._settings = settings
        self._deadline_s = deadline_s
        self.limits = TimeLimits(past_days)
        self.table = TableName(
            settings.gcp_project_id, settings.bigquery_dataset, settings.bigquery_table
        )
        self._watch = TableWatch(self.table, state, settings.spool_retention_hours)
        self._told: int | None = None
        """When the table was made, as the service said last; None once that was compared."""
        self._delivered_seq = 0
        self._watch_at = float("inf")
        self._glances: SharedCall[bigquery.Table] = SharedCall("a look at the table")
        self._reference = bigquery.TableReference(
            bigquery.DatasetReference(self.table.project, self.table.dataset), self.table.table
        )
        # The settings allow one of the two at most.
        self._endpoint = settings.bigquery_emulator_host or settings.bigquery_endpoint
        self.root = (self._endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._client: bigquery.Client | None = None
        self._credentials: Credentials | None = None
        self._connections: InsertConnections | None = None
        self._created_at = float("-inf")
        self._tables: SharedCall[bigquery.Table] = SharedCall("the table's schema")
        self._creations: SharedCall[None] = SharedCall("the table's creation")
        self._tokens: SharedCall[Mapping[str, str]] = SharedCall("an access token")

    def close(self) -> None:
        """Close the connections; the next use opens them again, with credentials read anew."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._connections is not None:
            self._connections.close()
            self._connections = None

    def session(self) -> InsertConnections:
        """Return what rows are inserted over, with credentials that are valid for a delivery.

        Raises:
            FaultError: There are none, or they cannot be had now; or there is no way there.
        """
        self._connect()
        try:
            if self._connections is None:
                self._connections = self._new_connections()
            self._connections.authorize()
        except UnsupportedProxyError as error:
            fault = Fault(FaultKind.HOLD, f"no way to BigQuery by the proxy {error}", _PROXY_REMEDY)
            raise FaultError(fault) from error
        except Exception as error:
            raise FaultError(self.judge(error)[1]) from error
        return self._connections

    def _new_connections(self) -> InsertConnections:
        if self._credentials is None:
            raise RuntimeError("no credentials after connecting")
        url = f"{self.root}{self.table.url_path}/insertAll"
        authorization = Authorization(
            self._credentials, url, self._deadline_s, self._tokens, CALL_WAIT_S
        )
        return InsertConnections(route_to(url), authorization)

    def _connect(self) -> bigquery.Client:
        if self._client is None:
            emulator = self._settings.bigquery_emulator_host
            self._credentials = AnonymousCredentials() if emulator else self._credentials_now()
            try:
                self._client = self._new_client(self._credentials)
                session = self._client._http  # noqa: SLF001 - the way to an answer's headers
                session.hooks["response"].append(self._note_date)
            except (google.auth.exceptions.GoogleAuthError, OSError, ValueError) as error:
                raise FaultError(cannot_build(error)) from error
        return self._client

    def _credentials_now(self) -> Credentials:
        key_file = self._settings.google_application_credentials
        return find_credentials(bigquery.Client.SCOPE, key_file)

    def check(self, target: str = "") -> Fault | None:
        """Return why no row could be written now; None if nothing is seen. Of any thread.

        Args:
            target: HOST:PORT of the write API, where rows go there.
        """
        if self._settings.bigquery_emulator_host:
            return None
        key_file = self._settings.google_application_credentials
        missing = why_no_access(bigquery.Client.SCOPE, key_file, target)
        return missing or self._missing_table()

    def _missing_table(self) -> Fault | None:
        """Look at the table by a connection of its own; return why it cannot be written to."""
        try:
            client = self._new_client(self._credentials_now())
            with contextlib.closing(client):
                table = client.get_table(self._reference, retry=NO_RETRY, timeout=self._deadline_s)
        except FaultError as error:
            return error.fault
        except Exception as error:  # noqa: BLE001 - judged; what is not the service's is raised again
            missing = getattr(error, "code", None) == 404  # noqa: PLR2004 - HTTP's number
            if missing and self._settings.bigquery_create_table:
                return None  # it is made for the first row
            blame, fault = self.judge(error)
            return (
                Fault(FaultKind.HOLD, fault.problem, _NAMES_REMEDY)
                if blame is Blame.ROWS
                else fault
            )
        if (unfit := not_a_table(str(self.table), table)) is not None:
            return unfit
        columns = columns_of(str(self.table), table)
        return columns if isinstance(columns, Fault) else None

    def _new_client(self, credentials: Credentials) -> bigquery.Client:
        return bigquery.Client(
            project=self._settings.gcp_project_id,
            credentials=credentials,
            client_options={"api_endpoint": self.root} if self._endpoint else None,
        )

    def _note_date(self, response: requests.Response, *_: object, **__: object) -> None:
        """Learn the service's date from the answer to a request that it took."""
        if response.ok:
            with contextlib.suppress(TypeError, ValueError):  # none, or none that is a date
                told = parsedate_to_datetime(response.headers.get("Date", ""))
                self.limits.service_date_is(told.timestamp())

    def read_columns(self, *, fresh: bool = False) -> Sequence[Column]:
        """Return the columns that the table and we both know; create the table if told to.

        Args:
            fresh: Whether what was asked before does not count, for the table may have changed.

        Raises:
            FaultError: The table cannot be read, or does not fit.
        """
        client = self._connect()
        try:
            table = self._tables.result(
                lambda: client.get_table(self._reference, retry=NO_RETRY, timeout=self._deadline_s),
                CALL_WAIT_S,
                fresh=fresh,
            )
        except Exception as error:
            blame, fault = self.judge(error)
            missing = getattr(error, "code", None) == 404  # noqa: PLR2004 - HTTP's number
            if blame is Blame.OPERATOR and missing and self._settings.bigquery_create_table:
                return self._create(client)
            if blame is Blame.ROWS:
                # There are no rows in this request: a name in the settings is wrong.
                fault = Fault(FaultKind.HOLD, fault.problem, _NAMES_REMEDY)
            raise FaultError(fault) from error
        if (unfit := not_a_table(str(self.table), table)) is not None:
            raise FaultError(unfit)
        self._learn(table)
        columns = columns_of(str(self.table), table)
        if isinstance(columns, Fault):
            raise FaultError(columns)
        left_out = sorted({c.name for c in COLUMNS} - {c.name for c in columns})
        if left_out:
            log.warning("the table lacks columns, which stay unwritten: %s", ", ".join(left_out))
        return columns

    def _learn(self, table: bigquery.Table) -> None:
        """Take over what is not a matter of columns. Of any thread."""
        self.limits.table_is(partitioning_of_table(table))
        if table.created is not None:
            self._told = round(table.created.timestamp() * 1000)
        self._watch_at = time.monotonic() + WATCH_EACH_S

    def look(self, delivered_seq: int) -> bool:
        """Look from time to time whether the table is still the same; return whether it is not.

        What the sink's file remembers is compared and noted here, in the thread of the deliveries.

        Args:
            delivered_seq: Up to here all was delivered.
        """
        before_seq, self._delivered_seq = self._delivered_seq, delivered_seq
        recreated = self._recreated(before_seq)
        if time.monotonic() >= self._watch_at:
            self._glance()
            recreated |= self._recreated(delivered_seq)
        return recreated

    def recreated(self) -> bool:
        """Return whether what was read in this delivery is another table than before."""
        return self._recreated(self._delivered_seq)

    def _recreated(self, seen_seq: int) -> bool:
        told, self._told = self._told, None
        return told is not None and self._watch.is_now(told, seen_seq, self._delivered_seq)

    def _glance(self) -> None:
        """Read the table again. It does not matter if that fails: readings do not wait for it."""
        try:
            client = self._connect()
            table = self._glances.result(
                lambda: client.get_table(self._reference, retry=NO_RETRY, timeout=self._deadline_s),
                WATCH_WAIT_S,
            )
        except TimeoutError:
            self._watch_at = time.monotonic() + WATCH_AGAIN_S
        except Exception as error:  # noqa: BLE001 - the delivery itself meets it, and tells, if it matters
            log.debug("the table could not be looked at: %s", error)
            self._watch_at = time.monotonic() + WATCH_EACH_S
        else:
            self._learn(table)

    @property
    def notice(self) -> str:
        """What an operator has to know of the table; empty if there is nothing."""
        return self._watch.notice

    def _create(self, client: bigquery.Client) -> Sequence[Column]:
        table = bigquery.Table(
            self._reference,
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
            self._creations.result(partial(self._make, client, table), CALL_WAIT_S)
        except Conflict:
            return self.read_columns()  # somebody else made it just now
        except Exception as error:
            blame, fault = self.judge(error)
            if blame is Blame.ROWS:
                fault = Fault(FaultKind.HOLD, fault.problem, _NAMES_REMEDY)
            raise FaultError(fault) from error
        return COLUMNS

    def _make(self, client: bigquery.Client, table: bigquery.Table) -> None:
        client.create_table(table, retry=NO_RETRY, timeout=self._deadline_s)
        self._created_at = time.monotonic()
        log.info("created the table", extra={"fields": {"table": str(self.table)}})

    def judge(self, error: Exception) -> tuple[Blame, Fault]:
        """Return who has to act, and the fault to report. Raises what is not the service's."""
        if isinstance(error, GoogleAPICallError):
            return self._judge_http(error)
        if isinstance(error, google.auth.exceptions.GoogleAuthError):
            fault = token_fault(error)
            return (Blame.OPERATOR if fault.kind is FaultKind.HOLD else Blame.NOBODY), fault
        if isinstance(
            error,
            requests.exceptions.RequestException
            | RetryError
            | OSError
            # The service, or a proxy before it, answered something that is no JSON.
            | ValueError,
        ):
            root = urlsplit(self.root)
            access = access_fault(error, root.hostname or "", root.port or 443)
            if access is not None:
                return Blame.OPERATOR, access
            problem = f"request to BigQuery for {self.table}: {type(error).__name__}: {error}"
            return Blame.NOBODY, Fault(FaultKind.TRANSIENT, problem)
        raise error

    def _judge_http(self, error: GoogleAPICallError) -> tuple[Blame, Fault]:
        reason = next((str(e.get("reason", "")) for e in error.errors if isinstance(e, dict)), "")
        status = int(error.code or 0)
        blame = blame_http(status, reason)
        problem = f"request to BigQuery for {self.table}: HTTP {status} {reason}: {error.message}"
        if status == 404 and self.settling:  # noqa: PLR2004 - HTTP's number
            return Blame.NOBODY, Fault(FaultKind.TRANSIENT, f"{problem} (the table is new)")
        if blame is not Blame.OPERATOR:
            return blame, Fault(FaultKind.TRANSIENT, problem)
        return blame, Fault(FaultKind.HOLD, problem, self.remedy(status))

    @property
    def settling(self) -> bool:
        """Whether the table is so new that the service may not find it yet."""
        return time.monotonic() - self._created_at < NEW_TABLE_SETTLES_S

    @property
    def show(self) -> str:
        """The command that shows what the table is like."""
        return f"look at the table with: bq show --schema {self.table.for_bq}"

    def remedy(self, status: int) -> str:
        """Return what to do about an HTTP status 401, 403 or 404."""
        if status == 404:  # noqa: PLR2004 - HTTP's number
            statement = ddl(str(self.table)).replace("\n", " ")
            return (
                f"create the dataset and the table (or set BIGQUERY_CREATE_TABLE=true): {statement}"
            )
        if status == 401:  # noqa: PLR2004 - HTTP's number
            return CREDENTIALS_REMEDY
        return (
            "allow it: bq add-iam-policy-binding --member=serviceAccount:ACCOUNT "
            f"--role=roles/bigquery.dataEditor {self.table.for_bq}"
        )
