"""How long to wait, and who has to act: the tables behind every retry."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.backoff import BACKOFF_FIRST_S, BACKOFF_MAX_S, backoff_s
from forwarder.drain import pause_for_rate_s
from forwarder.faults import Blame, blame_grpc, blame_http, credential_fault
from forwarder.sink import Fault, FaultKind
from forwarder.table import COLUMNS, ExistingColumn, ddl, match

TABLE = "p.d.t"
FULL = [
    ExistingColumn(c.name, c.sql_type, "REQUIRED" if c.required else "NULLABLE") for c in COLUMNS
]


@given(st.integers(-5, 10**9), st.floats(0, 1))
def test_backoff_stays_within_its_bounds(failures: int, jitter: float) -> None:
    assert BACKOFF_FIRST_S / 2 <= backoff_s(failures, jitter) <= BACKOFF_MAX_S


def test_backoff_doubles_up_to_its_limit() -> None:
    waits = [backoff_s(n, 1.0) for n in range(1, 12)]
    assert waits[:4] == [0.25, 0.5, 1.0, 2.0]
    assert waits[-1] == BACKOFF_MAX_S
    assert backoff_s(3, 0.0) == backoff_s(3, 1.0) / 2


def test_a_rate_limit_is_kept_by_waiting() -> None:
    assert pause_for_rate_s(100, 50, 0.5) == 1.5
    assert pause_for_rate_s(100, 50, 3.0) == 0.0
    assert pause_for_rate_s(100, 0, 0.0) == 0.0


EXPECTED_GRPC = {
    "CANCELLED": Blame.NOBODY,
    "UNKNOWN": Blame.NOBODY,
    "INVALID_ARGUMENT": Blame.ROWS,
    "DEADLINE_EXCEEDED": Blame.NOBODY,
    "NOT_FOUND": Blame.OPERATOR,
    "ALREADY_EXISTS": Blame.NOBODY,
    "PERMISSION_DENIED": Blame.OPERATOR,
    "RESOURCE_EXHAUSTED": Blame.NOBODY,
    "FAILED_PRECONDITION": Blame.OPERATOR,
    "ABORTED": Blame.NOBODY,
    "OUT_OF_RANGE": Blame.ROWS,
    "UNIMPLEMENTED": Blame.OPERATOR,
    "INTERNAL": Blame.NOBODY,
    "UNAVAILABLE": Blame.NOBODY,
    "DATA_LOSS": Blame.NOBODY,
    "UNAUTHENTICATED": Blame.OPERATOR,
}


def test_every_grpc_code_has_its_blame() -> None:
    codes = {code.name for code in grpc.StatusCode} - {"OK"}
    assert {code: blame_grpc(code) for code in codes} == EXPECTED_GRPC


@pytest.mark.parametrize(
    ("status", "reason", "blame"),
    [
        (400, "invalid", Blame.ROWS),
        (400, "invalidQuery", Blame.ROWS),
        (401, "authError", Blame.OPERATOR),
        (403, "accessDenied", Blame.OPERATOR),
        (403, "billingNotEnabled", Blame.OPERATOR),
        (403, "rateLimitExceeded", Blame.NOBODY),
        (403, "quotaExceeded", Blame.NOBODY),
        (404, "notFound", Blame.OPERATOR),
        (408, "", Blame.NOBODY),
        (413, "uploadTooLarge", Blame.ROWS),
        (429, "rateLimitExceeded", Blame.NOBODY),
        (500, "internalError", Blame.NOBODY),
        (502, "", Blame.NOBODY),
        (503, "backendError", Blame.NOBODY),
        (504, "", Blame.NOBODY),
        (302, "", Blame.NOBODY),
    ],
)
def test_every_http_status_has_its_blame(status: int, reason: str, blame: Blame) -> None:
    assert blame_http(status, reason) is blame


def test_a_revoked_key_is_a_hold_and_a_network_that_is_down_is_not() -> None:
    plugin = "Getting metadata from plugin failed with error: "
    revoked = credential_fault(f"{plugin}('invalid_grant: Invalid JWT Signature.', {{}})")
    assert revoked is not None
    assert revoked.kind is FaultKind.HOLD
    assert "GOOGLE_APPLICATION_CREDENTIALS" in revoked.remedy
    away = credential_fault(f"{plugin}HTTPSConnectionPool: Max retries exceeded")
    assert away is not None
    assert away.kind is FaultKind.TRANSIENT
    assert "credentials" in away.problem
    assert credential_fault("connection refused") is None


def test_a_table_as_ours_is_written_in_full() -> None:
    assert match(TABLE, FULL) == list(COLUMNS)


def test_columns_that_only_one_side_knows_are_left_out() -> None:
    there = [c for c in FULL if c.name not in {"topic", "seq"}]
    there.append(ExistingColumn("comment", "STRING", "NULLABLE"))
    usable = match(TABLE, there)
    assert not isinstance(usable, Fault)
    assert [c.name for c in usable] == [c.name for c in COLUMNS if c.name not in {"topic", "seq"}]


@pytest.mark.parametrize(
    ("column", "replacement", "remedy"),
    [
        ("site_code", None, "ALTER TABLE `p.d.t` ADD COLUMN site_code STRING;"),
        (
            "value",
            ExistingColumn("value", "STRING", "NULLABLE"),
            (
                "ALTER TABLE `p.d.t` RENAME COLUMN value TO value_old; "
                "ALTER TABLE `p.d.t` ADD COLUMN value FLOAT64;"
            ),
        ),
        (
            "seq",
            ExistingColumn("Seq", "INTEGER", "REPEATED"),
            (
                "ALTER TABLE `p.d.t` RENAME COLUMN Seq TO Seq_old; "
                "ALTER TABLE `p.d.t` ADD COLUMN seq INT64;"
            ),
        ),
        (
            "topic",
            ExistingColumn("unit", "STRING", "REQUIRED"),
            "ALTER TABLE `p.d.t` ALTER COLUMN unit DROP NOT NULL;",
        ),
    ],
)
def test_each_misfit_is_a_hold_with_the_exact_statement(
    column: str, replacement: ExistingColumn | None, remedy: str
) -> None:
    there = [c for c in FULL if c.name != column]
    if replacement is not None:
        there.append(replacement)
    fault = match(TABLE, there)
    assert isinstance(fault, Fault)
    assert fault.kind is FaultKind.HOLD
    assert fault.remedy == f"mend it with: {remedy}"


def test_the_ddl_partitions_and_clusters() -> None:
    statement = ddl(TABLE)
    assert statement.startswith("CREATE TABLE `p.d.t` (\n  event_id STRING NOT NULL,")
    assert "PARTITION BY TIMESTAMP_TRUNC(timestamp, DAY)" in statement
    assert statement.endswith("CLUSTER BY site_code, pi_tag")
