"""What is BigQuery's own: tables, columns, per-row errors, and names that are wrong."""

import threading
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from google.cloud import bigquery

from forwarder.bigquery import REQUEST_MAX_ROWS, InsertAllSink
from forwarder.bqservice import TableService
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.table import COLUMNS
from lifecycle import load_settings
from tests.fakes import FakeBigQuery
from tests.fakes.rows import Column
from tests.fakes.tables import READINGS
from tests.test_sink_contract import readings

TABLE = "p-1.d.readings"
SOON_S = 5.0


@pytest.fixture
def fake() -> Iterator[FakeBigQuery]:
    with FakeBigQuery() as server:
        server.create_dataset("p-1.d")
        yield server


def made(fake: FakeBigQuery, **variables: str) -> InsertAllSink:
    environment = {
        "APP_ENV": "DEV",
        "GCP_PROJECT_ID": "p-1",
        "BIGQUERY_DATASET": "d",
        "BIGQUERY_TABLE": "readings",
        "PUBSUB_ENABLED": "false",
        "BIGQUERY_WRITE_METHOD": "insert_all",
        "BIGQUERY_EMULATOR_HOST": fake.url,
    }
    return InsertAllSink(load_settings(environment | variables, "gate-1"))


@pytest.fixture
def sink(fake: FakeBigQuery) -> Iterator[InsertAllSink]:
    opened = made(fake)
    yield opened
    opened.close()


def held(delivery: Delivery, count: int) -> Fault:
    assert len(delivery.retry) == count
    assert delivery.dead == []
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    return delivery.fault


def test_a_missing_table_is_a_hold_with_the_statement_that_makes_it(sink: InsertAllSink) -> None:
    fault = held(sink.deliver(readings(5)), 5)
    assert f"CREATE TABLE `{TABLE}`" in fault.remedy
    assert "BIGQUERY_CREATE_TABLE=true" in fault.remedy


def test_a_missing_table_is_made_where_that_is_allowed(fake: FakeBigQuery) -> None:
    sink = made(fake, BIGQUERY_CREATE_TABLE="true")
    assert sink.deliver(readings(5)) == Delivery()
    sink.close()
    table = fake.store.table(TABLE)
    names = {name: (c.type, c.mode) for name, c in table.columns.items()}
    kinds = {"FLOAT64": "FLOAT", "INT64": "INTEGER"}
    assert names == {
        c.name: (kinds.get(c.sql_type, c.sql_type), "REQUIRED" if c.required else "NULLABLE")
        for c in COLUMNS
    }
    assert table.extras["timePartitioning"] == {"type": "DAY", "field": "timestamp"}
    assert table.extras["clustering"] == {"fields": ["site_code", "pi_tag"]}


def test_a_table_that_somebody_else_makes_first_is_used(fake: FakeBigQuery) -> None:
    sink = made(fake, BIGQUERY_CREATE_TABLE="true")
    fake.create_table(TABLE)
    fake.faults.status(404, "notFound", calls={"tables.get"})
    assert sink.deliver(readings(5)) == Delivery()
    assert fake.count == 5
    sink.close()


def test_a_new_table_may_be_missing_for_a_while_and_is_no_hold(fake: FakeBigQuery) -> None:
    sink = made(fake, BIGQUERY_CREATE_TABLE="true")
    fake.faults.status(404, "notFound", times=1)
    delivery = sink.deliver(readings(5))
    assert len(delivery.retry) == 5
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    assert sink.deliver(delivery.retry) == Delivery()
    sink.close()


@pytest.mark.parametrize("call", ["tables.get", "tables.insert"])
def test_a_name_that_the_service_refuses_is_a_hold_and_no_rows_fault(
    fake: FakeBigQuery, call: str
) -> None:
    sink = made(fake, BIGQUERY_CREATE_TABLE="true")
    fake.faults.status(400, "invalid", "Invalid project ID", times=None, calls={call})
    assert "GCP_PROJECT_ID" in held(sink.deliver(readings(5)), 5).remedy
    sink.close()


def test_a_view_is_a_hold_and_no_rows_fault(
    fake: FakeBigQuery, sink: InsertAllSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.create_table(TABLE)
    monkeypatch.setattr(bigquery.Table, "table_type", "VIEW")
    assert "VIEW" in held(sink.deliver(readings(5)), 5).problem


def test_columns_that_the_table_lacks_stay_unwritten(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE, [c for c in READINGS if c.name not in {"payload", "source"}])
    assert sink.deliver(readings(5)) == Delivery()
    assert "payload" not in fake.rows(TABLE)[0]
    assert fake.rows(TABLE)[0]["seq"] == 1


def test_a_missing_required_column_is_a_hold_and_goes_on_once_it_is_added(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE, [c for c in READINGS if c.name != "value"])
    fault = held(sink.deliver(readings(5)), 5)
    assert f"ALTER TABLE `{TABLE}` ADD COLUMN value FLOAT64;" in fault.remedy
    fake.add_column(TABLE, Column("value", "FLOAT"))
    assert sink.deliver(readings(5)) == Delivery()


@pytest.mark.parametrize("rows", [1, 500, 2000])
def test_a_column_that_is_dropped_while_requests_run_kills_no_row(
    fake: FakeBigQuery, sink: InsertAllSink, rows: int
) -> None:
    fake.create_table(TABLE)
    assert sink.deliver(readings(1)) == Delivery()
    fake.drop_column(TABLE, "topic")
    todo = readings(rows)
    for _ in range(10):
        delivery = sink.deliver(todo)
        assert delivery.dead == []
        todo = delivery.retry
    assert todo == []
    assert {row["seq"] for row in fake.rows(TABLE)} == set(range(1, rows + 1))


def test_refused_rows_are_judged_by_a_table_that_is_read_after_the_refusal(
    fake: FakeBigQuery, sink: InsertAllSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.create_table(TABLE)
    fake.clock_ahead_s = None  # so that nothing is known before it is sent
    good, last = readings(2)
    assert sink.deliver([good]) == Delivery()
    asked: list[bool] = []
    read = TableService.read_columns

    def watched(service: TableService, *, fresh: bool = False) -> object:
        asked.append(fresh)
        return read(service, fresh=fresh)

    monkeypatch.setattr(TableService, "read_columns", watched)
    ancient = (last[0], last[1], last[2], 0, *last[4:])
    assert len(sink.deliver([ancient, good]).dead) == 1
    assert asked == [True]


def test_a_required_column_that_is_added_while_it_runs_is_a_hold(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    assert sink.deliver(readings(1)) == Delivery()
    fake.add_column(TABLE, Column("plant", "STRING", "REQUIRED"))
    todo = readings(2000)
    delivery = sink.deliver(todo)
    assert (delivery.dead, len(delivery.retry)) == ([], 2000)
    assert "ALTER COLUMN plant DROP NOT NULL" in held(sink.deliver(todo), 2000).remedy


def test_no_row_is_ever_written_without_its_columns(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    """A table that requires nothing would take an empty row, and the reading would be lost."""
    fake.create_table(TABLE, [Column(c.name, c.type) for c in READINGS])
    fake.faults.status(403, "accessDenied", times=1)
    todo = readings(2000)
    for _ in range(5):
        delivery = sink.deliver(todo)
        todo = delivery.retry
    assert todo == []
    assert all(row.get("event_id") for row in fake.rows(TABLE))
    assert {row["seq"] for row in fake.rows(TABLE)} == set(range(1, 2001))


def test_a_passing_error_of_some_rows_returns_just_those(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    fake.faults.row_errors("backendError", lambda row: int(str(row["seq"])) % 10 == 0)
    delivery = sink.deliver(readings(100))
    assert [row[0] for row in delivery.retry] == list(range(10, 101, 10))
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    assert sink.deliver(delivery.retry) == Delivery()
    assert fake.count == 100


def test_rows_that_were_stopped_by_anothers_fault_are_inserted_in_the_end(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    fake.faults.row_errors("timeout", lambda row: row["seq"] == 3, stop_others=True)
    delivery = sink.deliver(readings(10))
    assert [row[0] for row in delivery.retry] == list(range(1, 11))
    assert sink.deliver(delivery.retry) == Delivery()


@pytest.mark.parametrize(
    "error",
    [
        {},
        {"index": 0},
        {"index": 0, "errors": []},
        {"index": None, "errors": [{"reason": "invalid"}]},
        {"errors": [{"reason": "invalid"}]},
    ],
)
def test_an_error_that_names_no_row_or_no_cause_delivers_and_kills_nothing(
    fake: FakeBigQuery,
    sink: InsertAllSink,
    error: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake.create_table(TABLE)
    # No service answers like this.
    monkeypatch.setattr(sink, "_post", lambda *_: [error])
    rows = readings(5)
    delivery = sink.deliver(rows)
    assert (delivery.retry, delivery.dead) == (rows, [])
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT


def test_a_time_that_no_partition_takes_is_a_dead_letter_with_the_services_words(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    fake.clock_ahead_s = None  # so that nothing is known before it is sent
    rows = readings(3)
    ancient = (rows[1][0], rows[1][1], rows[1][2], 0, *rows[1][4:])
    delivery = sink.deliver([rows[0], ancient, rows[2]])
    assert [letter.row[0] for letter in delivery.dead] == [2]
    assert delivery.dead[0].reason == "invalid"
    assert delivery.dead[0].detail
    assert delivery.retry == []
    assert [row["seq"] for row in fake.rows(TABLE)] == [1, 3]


@pytest.mark.parametrize("status", [int(s) for s in HTTPStatus if s >= HTTPStatus.BAD_REQUEST])
def test_no_http_status_raises_or_loses_a_row(
    fake: FakeBigQuery, sink: InsertAllSink, status: int
) -> None:
    fake.create_table(TABLE)
    fake.faults.status(status, "planned", times=None)
    rows = readings(4)
    delivery = sink.deliver(rows)
    assert sorted([*delivery.retry, *(d.row for d in delivery.dead)]) == rows
    assert bool(delivery.dead) == (status in {400, 413})


def test_requests_hold_no_more_rows_than_is_recommended(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    assert sink.deliver(readings(3 * REQUEST_MAX_ROWS + 1)) == Delivery()
    assert fake.requests == 4


def test_payloads_are_cut_into_requests_before_the_service_refuses_them(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    assert sink.deliver(readings(40, payload=b'{"t":"%s"}' % (b"x" * 200_000))) == Delivery()
    assert fake.requests == 2


def test_a_quota_that_is_used_up_is_waited_for_although_it_is_called_forbidden(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    fake.faults.status(403, "quotaExceeded")
    delivery = sink.deliver(readings(5))
    assert len(delivery.retry) == 5
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT


def test_it_tells_that_it_waits_while_the_service_still_works(
    fake: FakeBigQuery, sink: InsertAllSink
) -> None:
    fake.create_table(TABLE)
    told = threading.Event()
    fake.faults.poison = lambda _: not told.wait(SOON_S)
    pieces = iter([True, True, False])

    def meanwhile() -> bool:
        more = next(pieces)
        if not more:
            told.set()
        return more

    sink.meanwhile = meanwhile
    assert sink.deliver(readings(1200)) == Delivery()
    assert fake.count == 1200
