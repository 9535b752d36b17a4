"""The pure parts of a forwarder: when to try again, who is to blame, what table fits."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.backoff import BACKOFF_FIRST_S, BACKOFF_MAX_S, backoff_s
from forwarder.faults import GRPC_CODES as TABLE_OF_CODES
from forwarder.faults import Blame, blame_grpc, blame_http
from forwarder.insertbody import BodyEncoder
from forwarder.sink import Fault, FaultKind
from forwarder.table import CLUSTER_COLUMNS, COLUMNS, ExistingColumn, ddl, match
from spool import Reading
from tests.test_spool_writer import new_reading

TABLE = "p.d.t"
GRPC_CODES = [
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]
"""All sixteen of grpc/status.h but OK."""


@given(st.integers(-5, 10**9), st.floats(0, 1))
def test_a_wait_is_between_half_the_step_and_the_limit(failures: int, jitter: float) -> None:
    wait_s = backoff_s(failures, jitter)
    assert BACKOFF_FIRST_S / 2 <= wait_s <= BACKOFF_MAX_S
    assert backoff_s(failures, 0.0) <= wait_s <= backoff_s(failures, 1.0)
    assert backoff_s(failures, 0.0) == backoff_s(failures, 1.0) / 2
    assert backoff_s(failures + 1, jitter) >= wait_s


def test_waits_double_up_to_half_a_minute() -> None:
    assert [backoff_s(n, 1.0) for n in range(1, 10)] == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("code", GRPC_CODES)
def test_each_grpc_code_has_somebody_to_act(code: str) -> None:
    operator = {
        "NOT_FOUND",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "FAILED_PRECONDITION",
        "UNIMPLEMENTED",
    }
    rows = {"INVALID_ARGUMENT", "OUT_OF_RANGE"}
    expected = Blame.OPERATOR if code in operator else Blame.ROWS if code in rows else Blame.NOBODY
    assert blame_grpc(code) is expected
    assert TABLE_OF_CODES[code] is expected, "the table is what decides"


def test_a_code_that_nobody_knows_never_kills_a_row() -> None:
    assert blame_grpc("SOMETHING_NEW") is Blame.NOBODY
    assert blame_http(599, "") is Blame.NOBODY
    assert blame_http(0, "") is Blame.NOBODY
    assert blame_http(418, "teapot") is Blame.NOBODY


@pytest.mark.parametrize(
    ("status", "reason", "blame"),
    [
        (400, "invalid", Blame.ROWS),
        (400, "badRequest", Blame.ROWS),
        (413, "requestTooLarge", Blame.ROWS),
        (401, "authError", Blame.OPERATOR),
        (402, "", Blame.OPERATOR),
        (403, "accessDenied", Blame.OPERATOR),
        (403, "billingNotEnabled", Blame.OPERATOR),
        (404, "notFound", Blame.OPERATOR),
        (407, "", Blame.OPERATOR),
        (403, "quotaExceeded", Blame.NOBODY),
        (403, "rateLimitExceeded", Blame.NOBODY),
        (400, "backendError", Blame.NOBODY),
        (408, "", Blame.NOBODY),
        (409, "duplicate", Blame.NOBODY),
        (429, "", Blame.NOBODY),
        (500, "internalError", Blame.NOBODY),
        (502, "", Blame.NOBODY),
        (503, "backendError", Blame.NOBODY),
        (504, "", Blame.NOBODY),
    ],
)
def test_each_http_answer_has_somebody_to_act(status: int, reason: str, blame: Blame) -> None:
    assert blame_http(status, reason) is blame


@given(st.integers(100, 599), st.text(max_size=20))
def test_only_400_and_413_can_ever_be_a_rows_fault(status: int, reason: str) -> None:
    assert blame_http(status, reason) is not Blame.ROWS or status in {400, 413}


def row(seq: int, payload: str) -> Reading:
    return (seq, *new_reading(1, payload=payload.encode()))


def existing(
    changed: dict[str, tuple[str, str]] | None = None, *, without: str = ""
) -> list[ExistingColumn]:
    columns = {c.name: (c.sql_type, "REQUIRED" if c.required else "NULLABLE") for c in COLUMNS}
    columns |= changed or {}
    return [ExistingColumn(name, *kind) for name, kind in columns.items() if name != without]


def mismatch(columns: list[ExistingColumn]) -> Fault:
    fault = match(TABLE, columns)
    assert isinstance(fault, Fault)
    assert fault.kind is FaultKind.HOLD
    return fault


def test_our_own_table_fits() -> None:
    assert match(TABLE, existing()) == list(COLUMNS)


@pytest.mark.parametrize("name", [c.name for c in COLUMNS if c.required])
def test_a_missing_required_column_is_a_hold_with_the_exact_statement(name: str) -> None:
    kind = next(c.sql_type for c in COLUMNS if c.name == name)
    fault = mismatch(existing(without=name))
    assert f"column {name} is missing" in fault.problem
    assert fault.remedy == f"mend it with: ALTER TABLE `{TABLE}` ADD COLUMN {name} {kind};"


@pytest.mark.parametrize("name", [c.name for c in COLUMNS if not c.required])
def test_a_missing_optional_column_is_left_out(name: str) -> None:
    columns = match(TABLE, existing(without=name))
    assert not isinstance(columns, Fault)
    assert [c.name for c in columns] == [c.name for c in COLUMNS if c.name != name]


@pytest.mark.parametrize("name", [c.name for c in COLUMNS])
def test_a_column_of_another_type_is_a_hold_with_the_exact_statement(name: str) -> None:
    kind = next(c.sql_type for c in COLUMNS if c.name == name)
    fault = mismatch(existing({name: ("GEOGRAPHY", "NULLABLE")}))
    assert f"column {name} is NULLABLE GEOGRAPHY, but must be {kind}" in fault.problem
    assert fault.remedy == (
        f"mend it with: ALTER TABLE `{TABLE}` RENAME COLUMN {name} TO {name}_old; "
        f"ALTER TABLE `{TABLE}` ADD COLUMN {name} {kind};"
    )


def test_a_repeated_column_does_not_fit() -> None:
    assert "REPEATED" in mismatch(existing({"site_code": ("STRING", "REPEATED")})).problem


def test_a_strangers_required_column_is_a_hold_and_a_nullable_one_is_not() -> None:
    fault = mismatch(existing({"plant": ("STRING", "REQUIRED")}))
    assert fault.remedy == (
        f"mend it with: ALTER TABLE `{TABLE}` ALTER COLUMN plant DROP NOT NULL;"
    )
    assert not isinstance(match(TABLE, existing({"plant": ("STRING", "NULLABLE")})), Fault)


def test_all_mismatches_are_told_at_once() -> None:
    columns = existing(
        {"plant": ("STRING", "REQUIRED"), "topic": ("BYTES", "NULLABLE")}, without="value"
    )
    fault = mismatch(columns)
    for text in ("column value", "column plant", "column topic"):
        assert text in fault.problem
    assert fault.remedy.count(";") == 4


def test_the_spellings_of_the_api_and_any_case_of_a_name_fit() -> None:
    kinds = {"value": "FLOAT", "seq": "INTEGER", "site_code": "STRING"}
    changed = existing({name: (kind, "NULLABLE") for name, kind in kinds.items()})
    upper = [ExistingColumn(c.name.upper(), c.api_type, c.mode) for c in changed]
    assert match(TABLE, upper) == list(COLUMNS)


def test_the_ddl_creates_every_column_partitioned_and_clustered() -> None:
    statement = ddl(TABLE)
    for column in COLUMNS:
        not_null = " NOT NULL" if column.required else ""
        assert re.search(
            rf"^  {column.name} {column.sql_type}{not_null},?$", statement, re.MULTILINE
        )
    assert f"CREATE TABLE `{TABLE}`" in statement
    assert "PARTITION BY TIMESTAMP_TRUNC(timestamp, DAY)" in statement
    assert f"CLUSTER BY {', '.join(CLUSTER_COLUMNS)}" in statement
    assert [c.name for c in COLUMNS if c.required] == [
        "event_id",
        "site_code",
        "sensor_id",
        "pi_tag",
        "timestamp",
        "value",
    ]


def test_a_row_fills_every_column() -> None:
    filled = row(42, '{"n":"é"}')
    request = json.loads(BodyEncoder(COLUMNS, "gate-1").body([filled]))
    values = request["rows"][0]["json"]
    assert values == {
        "event_id": filled[1].hex(),
        "site_code": "S1",
        "sensor_id": "PT-1",
        "pi_tag": "TI-101.PV",
        "timestamp": "2023-11-14T22:13:20.123456Z",
        "value": 1.5,
        "topic": filled[8],
        "payload": '{"n":"é"}',
        "received_at": "2023-11-14T22:13:20.000000Z",
        "source": "gate-1",
        "seq": 42,
    }
