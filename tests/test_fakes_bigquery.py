"""The BigQuery fake holds to what the service documents, seen by the official client."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from google.api_core import exceptions
from google.api_core.retry import Retry
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fakes import FakeBigQuery
from tests.fakes.insert_all import insert_all
from tests.fakes.rows import Column, judge_row
from tests.fakes.tables import READINGS, TableStore

TABLE = "p.d.readings"
SMALL = "p.d.small"
DEADLINE_S = 10.0

Row = dict[str, Any]
Errors = Sequence[dict[str, Any]]
# The client's default goes on for ten minutes; a test wants to see the first answer.
NO_RETRY = Retry(predicate=lambda _: False)


@pytest.fixture
def fake() -> Iterator[FakeBigQuery]:
    with FakeBigQuery() as server:
        server.create_table(TABLE)
        server.create_table(SMALL, [Column("n", "INT64", "REQUIRED"), Column("s", "STRING")])
        yield server


@pytest.fixture
def client(fake: FakeBigQuery) -> Iterator[bigquery.Client]:
    with_credentials = bigquery.Client(
        project="p",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": fake.url},
    )
    yield with_credentials
    with_credentials.close()


def reading(seq: int | str = 1, **changed: object) -> Row:
    now = datetime.now(UTC).isoformat()
    return {
        "event_id": f"e{seq}",
        "site_code": "S1",
        "sensor_id": "T-1",
        "pi_tag": "TI-101.PV",
        "timestamp": now,
        "value": 1.5,
        "topic": "FCTS/FAE/S1/SolvExtract/TI-101.PV",
        "payload": "{}",
        "received_at": now,
        "source": "edge",
        "seq": seq,
    } | changed


def insert(  # noqa: PLR0913 - the client's own options
    client: bigquery.Client,
    rows: list[Row],
    table: str = SMALL,
    ids: list[str | None] | None = None,
    *,
    timeout_s: float = DEADLINE_S,
    skip_invalid_rows: bool = False,
    ignore_unknown_values: bool = False,
) -> Errors:
    return client.insert_rows_json(
        table,
        rows,
        row_ids=ids if ids is not None else [None] * len(rows),
        skip_invalid_rows=skip_invalid_rows,
        ignore_unknown_values=ignore_unknown_values,
        retry=NO_RETRY,
        timeout=timeout_s,
    )


def summary(errors: Errors) -> dict[int, list[tuple[str, str, str]]]:
    return {
        entry["index"]: [(e["reason"], e["location"], e["message"]) for e in entry["errors"]]
        for entry in errors
    }


def test_inserted_rows_are_stored_in_order(fake: FakeBigQuery, client: bigquery.Client) -> None:
    rows = [reading(i) for i in range(500)]
    assert insert(client, rows, TABLE) == []
    assert insert(client, [reading(500)], TABLE) == []
    assert fake.rows(TABLE)[:500] == rows
    assert [row["seq"] for row in fake.rows(TABLE)] == list(range(501))
    assert (fake.count, fake.table_count(TABLE), fake.requests) == (501, 501, 2)


def test_without_keep_only_counts_remain() -> None:
    with FakeBigQuery(keep=False) as fake:
        fake.create_table(TABLE)
        body: Row = {"rows": [{"json": reading()}, {"json": reading()}]}
        url = f"{fake.url}/bigquery/v2/projects/p/datasets/d/tables/readings/insertAll"
        assert requests.post(url, json=body, timeout=DEADLINE_S).status_code == 200
        assert fake.rows(TABLE) == []
        assert fake.count == 2


def test_a_missing_table_or_dataset_is_not_found(client: bigquery.Client) -> None:
    with pytest.raises(exceptions.NotFound, match=r"Not found: Table p:d\.other"):
        insert(client, [{"n": 1}], "p.d.other")
    with pytest.raises(exceptions.NotFound, match="Not found: Dataset p:none"):
        insert(client, [{"n": 1}], "p.none.other")
    with pytest.raises(exceptions.NotFound) as caught:
        client.get_table("p.d.other", retry=NO_RETRY)
    assert caught.value.errors[0]["reason"] == "notFound"


def test_a_table_keeps_the_schema_partitioning_and_clustering_it_was_created_with(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    client.create_dataset("p.made")
    with pytest.raises(exceptions.Conflict, match="Already Exists: Dataset p:made"):
        client.create_dataset("p.made")
    made = bigquery.Table(
        "p.made.t",
        schema=[
            bigquery.SchemaField("at", "TIMESTAMP", mode="REQUIRED", description="when"),
            bigquery.SchemaField("v", "FLOAT64"),
        ],
    )
    made.time_partitioning = bigquery.TimePartitioning(field="at")
    made.clustering_fields = ["v"]
    client.create_table(made)
    with pytest.raises(exceptions.Conflict, match=r"Already Exists: Table p:made\.t"):
        client.create_table(made)
    found = client.get_table("p.made.t")
    assert [(f.name, f.field_type, f.mode, f.description) for f in found.schema] == [
        ("at", "TIMESTAMP", "REQUIRED", "when"),
        ("v", "FLOAT", "NULLABLE", None),
    ]
    assert (found.time_partitioning.type_, found.time_partitioning.field) == ("DAY", "at")
    assert found.clustering_fields == ["v"]
    assert [t.table_id for t in client.list_tables("p.made")] == ["t"]
    client.delete_table("p.made.t")
    with pytest.raises(exceptions.NotFound):
        client.get_table("p.made.t", retry=NO_RETRY)
    client.delete_dataset("p.made")
    assert {t.ref for t in fake.store.tables()} == {TABLE, SMALL}


def test_a_table_cannot_be_partitioned_by_a_column_it_lacks(client: bigquery.Client) -> None:
    table = bigquery.Table("p.d.t", schema=[bigquery.SchemaField("v", "FLOAT64")])
    table.time_partitioning = bigquery.TimePartitioning(field="at")
    with pytest.raises(exceptions.BadRequest, match="partitioning cannot be found"):
        client.create_table(table)


def test_a_nullable_column_can_be_added_and_nothing_else_changed(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    table = client.get_table(SMALL)
    n, s = table.schema
    for schema, complaint in [
        ([n], "Field s is missing"),
        ([n, bigquery.SchemaField("s", "FLOAT64")], "changed type"),
        ([n, bigquery.SchemaField("s", "STRING", mode="REQUIRED")], "changed mode"),
        ([n, s, bigquery.SchemaField("x", "STRING", mode="REQUIRED")], "add required fields"),
    ]:
        table.schema = schema
        with pytest.raises(exceptions.BadRequest, match=complaint):
            client.update_table(table, ["schema"], retry=NO_RETRY)
    assert summary(insert(client, [{"n": 1, "x": "new"}])) != {}
    table.schema = [n, s, bigquery.SchemaField("x", "STRING")]
    client.update_table(table, ["schema"])
    assert insert(client, [{"n": 1, "x": "new"}]) == []
    assert fake.rows(SMALL) == [{"n": 1, "x": "new"}]


def test_an_update_of_a_table_that_changed_meanwhile_is_refused(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    table = client.get_table(SMALL)
    fake.add_column(SMALL, Column("x", "STRING"))
    table.schema = [*table.schema, bigquery.SchemaField("y", "STRING")]
    with pytest.raises(exceptions.PreconditionFailed):
        client.update_table(table, ["schema"], retry=NO_RETRY)


def test_a_column_dropped_or_required_behind_our_back_shows_in_the_next_insert(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    assert insert(client, [{"n": 1, "s": "a"}]) == []
    fake.drop_column(SMALL, "s")
    assert summary(insert(client, [{"n": 1, "s": "a"}])) == {
        0: [("invalid", "s", "no such field: s.")]
    }
    fake.add_column(SMALL, Column("k", "STRING", "REQUIRED"))
    assert summary(insert(client, [{"n": 1}])) == {
        0: [("invalid", "", "Missing required field: k.")]
    }


def test_one_bad_row_stops_all_the_others(fake: FakeBigQuery, client: bigquery.Client) -> None:
    errors = insert(client, [{"n": 1}, {"s": "x"}, {"n": 3}])
    assert summary(errors) == {
        1: [("invalid", "", "Missing required field: n.")],
        0: [("stopped", "", "")],
        2: [("stopped", "", "")],
    }
    assert fake.count == 0


def test_skip_invalid_rows_inserts_the_good_ones_and_reports_only_the_bad(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    errors = insert(client, [{"n": 1}, {"n": "x"}, {"n": 3}], skip_invalid_rows=True)
    assert list(summary(errors)) == [1]
    assert fake.rows(SMALL) == [{"n": 1}, {"n": 3}]


def test_unknown_values_are_dropped_if_the_client_says_so(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    assert insert(client, [{"n": 1, "zzz": 2}], ignore_unknown_values=True) == []
    assert fake.rows(SMALL) == [{"n": 1}]


def test_null_is_taken_for_a_nullable_column_and_not_for_a_required_one(
    client: bigquery.Client,
) -> None:
    assert insert(client, [{"n": 1, "s": None}]) == []
    [(reason, location, text)] = summary(insert(client, [{"n": None}]))[0]
    assert (reason, location) == ("invalid", "n")
    assert "Only optional fields can be set to NULL" in text


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("STRING", ["", "é"], [1, True, {}, ["a"]]),
        (
            "INT64",
            [0, -(2**63), 2**63 - 1, "17", "-9223372036854775808"],
            [2**63, 1.5, "x", True, str(2**63), "9" * 25],
        ),
        ("FLOAT64", [0, 1.5, -2, "1e3", "NaN", "-Infinity", ".5"], ["", "1,5", True, "0x1"]),
        ("BOOL", [True, False, "true"], [1, "yes"]),
        (
            "TIMESTAMP",
            [
                "2025-03-01T12:00:00Z",
                "2025-03-01T12:00:00.123456+01:00",
                "2025-03-01 12:00:00.123456 UTC",
                "2025-03-01 12:00:00",
                1_740_000_000,
                1_740_000_000.5,
            ],
            ["2025-02-30T12:00:00Z", "yesterday", "", "2025-03-01", True, 1e15, "12:00:00"],
        ),
        ("BYTES", ["aGFsbG8="], ["%", 1]),
    ],
)
def test_each_type_takes_its_own_forms_and_no_others(
    fake: FakeBigQuery,
    client: bigquery.Client,
    kind: str,
    good: list[object],
    bad: list[object],
) -> None:
    fake.create_table("p.d.typed", [Column("v", kind, "REQUIRED")])
    assert insert(client, [{"v": value} for value in good], "p.d.typed") == []
    assert [row["v"] for row in fake.rows("p.d.typed")] == good
    for value in bad:
        errors = summary(insert(client, [{"v": value}], "p.d.typed"))
        assert [error[:2] for error in errors[0]] == [("invalid", "v")], value
    assert fake.table_count("p.d.typed") == len(good)


def test_a_day_out_of_the_streaming_bounds_of_a_partitioned_table_is_invalid(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    now = datetime.now(UTC)
    near = [now - timedelta(days=1824), now + timedelta(days=365)]
    assert insert(client, [reading(timestamp=t.isoformat()) for t in near], TABLE) == []
    for moment in (now - timedelta(days=1826), now + timedelta(days=367)):
        bad = [reading(timestamp=moment.isoformat()), reading()]
        errors = summary(insert(client, bad, TABLE))
        assert "outside the allowed bounds" in errors[0][0][2]
        assert errors[1] == [("stopped", "", "")]
    assert fake.count == 2


def test_limits_of_a_request_are_enforced(fake: FakeBigQuery, client: bigquery.Client) -> None:
    with pytest.raises(exceptions.BadRequest, match="No rows present in the request"):
        insert(client, [])
    assert insert(client, [{"n": 1}] * 50_000) == []
    with pytest.raises(exceptions.BadRequest, match="too many rows"):
        insert(client, [{"n": 1}] * 50_001)
    assert insert(client, [{"n": 1, "s": "x" * 9_999_000}]) == []
    with pytest.raises(exceptions.GoogleAPICallError, match="exceeds the limit") as caught:
        insert(client, [{"n": 1, "s": "x" * 10_000_000}])
    assert caught.value.code == 413
    assert fake.count == 50_001


def test_a_body_that_is_no_json_is_a_bad_request(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    # Python's json writes NaN, which is not JSON: the service refuses the request.
    with pytest.raises((exceptions.BadRequest, requests.exceptions.InvalidJSONError)):
        insert(client, [reading(value=float("nan"))], TABLE)
    url = f"{fake.url}/bigquery/v2/projects/p/datasets/d/tables/small/insertAll"
    answer = requests.post(url, data=b'{"rows":[{"json":{"n":NaN}}]}', timeout=DEADLINE_S)
    assert answer.status_code == 400
    assert fake.count == 0


def test_a_gzipped_body_is_understood(fake: FakeBigQuery) -> None:
    url = f"{fake.url}/bigquery/v2/projects/p/datasets/d/tables/small/insertAll"
    body = gzip.compress(json.dumps({"rows": [{"json": {"n": 5}}]}).encode())
    answer = requests.post(url, data=body, headers={"Content-Encoding": "gzip"}, timeout=DEADLINE_S)
    assert answer.json() == {"kind": "bigquery#tableDataInsertAllResponse"}
    assert fake.rows(SMALL) == [{"n": 5}]


def test_an_insert_id_seen_within_the_window_is_not_inserted_again(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    assert insert(client, [{"n": 1}, {"n": 2}], ids=["a", "b"]) == []
    assert insert(client, [{"n": 2}, {"n": 3}], ids=["b", "c"]) == []
    assert insert(client, [{"n": 3}, {"n": 3}]) == []
    assert [row["n"] for row in fake.rows(SMALL)] == [1, 2, 3, 3, 3]


def test_the_window_of_insert_ids_ends() -> None:
    now = 0.0
    store = TableStore(clock=lambda: now)
    store.create_dataset("p.d")
    table = store.create(SMALL, [Column("n", "INTEGER")])
    for now, expected in ((0.0, 1), (59.0, 1), (61.0, 2), (100.0, 2)):  # noqa: B007 - the clock
        store.append(table, ["a"], lambda: [{"n": 1}])
        assert table.count == expected


def test_deduplication_can_be_switched_off() -> None:
    store = TableStore(dedup=False)
    store.create_dataset("p.d")
    table = store.create(SMALL, [Column("n", "INTEGER")])
    for _ in range(2):
        insert_all(store, table, b'{"rows":[{"insertId":"a","json":{"n":1}}]}')
    assert store.rows(SMALL) == [{"n": 1}, {"n": 1}]


def test_wait_for_returns_when_the_rows_are_there(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    assert not fake.wait_for(1, timeout_s=0.0)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(fake.wait_for, 3, DEADLINE_S, SMALL)
        insert(client, [{"n": 1}] * 2)
        assert not waiting.done()
        insert(client, [{"n": 1}])
        assert waiting.result()


@pytest.mark.parametrize(
    ("status", "reason", "raised"),
    [
        (403, "accessDenied", exceptions.Forbidden),
        (403, "quotaExceeded", exceptions.Forbidden),
        (429, "rateLimitExceeded", exceptions.TooManyRequests),
        (500, "internalError", exceptions.InternalServerError),
        (503, "backendError", exceptions.ServiceUnavailable),
    ],
)
def test_a_planned_status_meets_one_request_and_names_its_reason(
    fake: FakeBigQuery,
    client: bigquery.Client,
    status: int,
    reason: str,
    raised: type[exceptions.GoogleAPICallError],
) -> None:
    fake.faults.status(status, reason, "as planned")
    with pytest.raises(raised, match="as planned") as caught:
        insert(client, [{"n": 1}])
    assert caught.value.errors[0]["reason"] == reason
    assert insert(client, [{"n": 1}]) == []
    assert fake.count == 1


def test_a_planned_401_is_answered_as_unauthenticated(fake: FakeBigQuery) -> None:
    # Not by the official client: upon a 401 it refreshes its credentials, and the
    # anonymous ones raise then.
    fake.faults.status(401, "authError", calls={"*"})
    url = f"{fake.url}/bigquery/v2/projects/p/datasets/d/tables/small"
    answer = requests.get(url, timeout=DEADLINE_S)
    assert answer.status_code == 401
    assert answer.json()["error"]["status"] == "UNAUTHENTICATED"


def test_a_fault_until_cleared_stays_and_leaves_other_calls_alone(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    fake.faults.status(503, "backendError", times=None)
    for _ in range(3):
        with pytest.raises(exceptions.ServiceUnavailable):
            insert(client, [{"n": 1}])
    client.get_table(SMALL, retry=NO_RETRY)
    fake.faults.clear()
    assert insert(client, [{"n": 1}]) == []
    fake.faults.status(403, "accessDenied", calls={"tables.get"})
    with pytest.raises(exceptions.Forbidden):
        client.get_table(SMALL, retry=NO_RETRY)


def test_a_hung_request_ends_with_the_client_s_timeout_and_is_not_stored(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    fake.faults.hang()
    with pytest.raises(requests.exceptions.ReadTimeout):
        insert(client, [{"n": 1}], timeout_s=0.2)
    assert insert(client, [{"n": 2}]) == []
    fake.faults.clear()
    assert fake.rows(SMALL) == [{"n": 2}]


def test_clear_lets_a_hung_request_go_without_an_answer(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    fake.faults.hang()
    with ThreadPoolExecutor() as threads:
        hung = threads.submit(insert, client, [{"n": 1}])
        assert fake.faults.wait_fired(1, DEADLINE_S)
        fake.faults.clear()
        assert isinstance(hung.exception(), requests.exceptions.ConnectionError)
    assert fake.count == 0


def test_a_lost_answer_leaves_the_rows_stored_and_the_caller_in_doubt(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    fake.faults.lose_answer()
    with pytest.raises(requests.exceptions.ConnectionError):
        insert(client, [{"n": 1}])
    assert fake.rows(SMALL) == [{"n": 1}]


def test_a_delay_is_waited_for(fake: FakeBigQuery, client: bigquery.Client) -> None:
    fake.faults.delay(0.2, times=1)
    began = time.monotonic()
    assert insert(client, [{"n": 1}]) == []
    assert time.monotonic() - began >= 0.2
    assert fake.count == 1


def test_passing_row_errors_come_with_status_200_and_spare_the_other_rows(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    fake.faults.row_errors("timeout", where=lambda row: row["n"] == 2)
    rows: list[Row] = [{"n": 1}, {"n": 2}, {"n": 3}]
    assert summary(insert(client, rows)) == {1: [("timeout", "", "")]}
    assert [row["n"] for row in fake.rows(SMALL)] == [1, 3]
    fake.faults.row_errors("backendError", where=lambda row: row["n"] == 2, stop_others=True)
    assert summary(insert(client, rows)) == {
        0: [("stopped", "", "")],
        1: [("backendError", "", "")],
        2: [("stopped", "", "")],
    }
    assert insert(client, rows) == []


def test_a_poisoned_row_is_invalid_until_cleared(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    fake.faults.poison = lambda row: row["n"] == 2
    assert summary(insert(client, [{"n": 1}, {"n": 2}]))[1][0][0] == "invalid"
    assert insert(client, [{"n": 1}, {"n": 3}]) == []
    fake.faults.clear()
    assert insert(client, [{"n": 2}]) == []
    assert fake.count == 3


def test_a_stopped_fake_refuses_connections_and_keeps_its_store_and_port(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    url = fake.url
    for n in range(3):
        assert insert(client, [{"n": n}]) == []
        fake.stop()
        with pytest.raises(requests.exceptions.ConnectionError):
            insert(client, [{"n": 99}])
        fake.start()
    assert fake.url == url
    assert [row["n"] for row in fake.rows(SMALL)] == [0, 1, 2]


def test_stop_ends_hung_requests_at_once(fake: FakeBigQuery, client: bigquery.Client) -> None:
    fake.faults.hang(times=None)
    with ThreadPoolExecutor() as threads:
        hung = threads.submit(insert, client, [{"n": 1}])
        assert fake.faults.wait_fired(1, DEADLINE_S)
        fake.stop()
        assert isinstance(hung.exception(timeout=DEADLINE_S), requests.exceptions.ConnectionError)
    assert fake.count == 0


def test_a_port_that_is_taken_is_an_error(fake: FakeBigQuery) -> None:
    with pytest.raises(OSError, match="in use"):
        FakeBigQuery(fake.port).start()


def test_two_fakes_can_stand_before_the_same_tables(
    fake: FakeBigQuery, client: bigquery.Client
) -> None:
    with FakeBigQuery(store=fake.store) as other:
        assert insert(client, [{"n": 1}]) == []
        assert other.rows(SMALL) == [{"n": 1}]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.datetimes().map(lambda t: t.isoformat() + "Z"),
    st.datetimes().map(str),
    st.sampled_from(["1", "-0", "1e5", "NaN", "2025-01-01T00:00:00.1234567Z", "1\n", "1.\n"]),
    st.sampled_from(["2025-01-01T24:00:00Z", "2025-01-01t00:00:00z", "2025-01-01T00:00:00-0130"]),
    st.lists(st.integers(), max_size=2),
)


# The first draw loads tables of characters, which a busy machine does slowly.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(["s", "i", "f", "b", "t", "zzz"]), VALUES),
    st.sampled_from(["NULLABLE", "REQUIRED"]),
)
@example({"i": "0\n"}, "NULLABLE")
@example({"f": "1.\n"}, "NULLABLE")
def test_the_fast_check_takes_nothing_that_the_rules_refuse(row: Row, mode: str) -> None:
    kinds = {"s": "STRING", "i": "INTEGER", "f": "FLOAT", "b": "BOOLEAN", "t": "TIMESTAMP"}
    store = TableStore()
    store.create_dataset("p.d")
    table = store.create("p.d.t", [Column(name, kind, mode) for name, kind in kinds.items()])
    body = json.dumps({"rows": [{"json": row}]}).encode()
    expected = judge_row(row, table.columns, None, ignore_unknown=False) == []
    assert ("insertErrors" not in insert_all(store, table, body)) == expected
    assert store.rows("p.d.t") == ([row] if expected else [])


def test_good_readings_take_the_fast_way() -> None:
    store = TableStore()
    store.create_dataset("p.d")
    table = store.create(TABLE, READINGS, {"timePartitioning": {"field": "timestamp"}})
    assert table.decode_fast is not None
    for row in (reading(), reading(value=3, seq="7"), reading(payload=None)):
        body = json.dumps({"rows": [{"json": row}], "skipInvalidRows": True}).encode()
        assert len(table.decode_fast(body).rows) == 1
        assert "insertErrors" not in insert_all(store, table, body)


def test_it_runs_as_a_process_that_tells_its_counts() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes", "bigquery", "--table", TABLE, "--create"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None
        try:
            serving = json.loads(process.stdout.readline())
            assert serving["event"] == "serving"
            url = f"http://127.0.0.1:{serving['port']}/bigquery/v2/projects/p/datasets/d/tables"
            body: Row = {"rows": [{"json": reading()}]}
            requests.post(f"{url}/readings/insertAll", json=body, timeout=DEADLINE_S)
            process.send_signal(signal.SIGUSR1)
            counts = json.loads(process.stdout.readline())
            assert (counts["event"], counts["count"]) == ("counts", 1)
            process.send_signal(signal.SIGTERM)
            stopped = json.loads(process.stdout.readline())
            assert (stopped["event"], stopped["tables"]) == ("stopped", {TABLE: 1})
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
