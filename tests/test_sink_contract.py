"""One contract for every sink: each row is delivered, to be tried again, or dead; never lost."""

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forwarder.bigquery
import forwarder.defaultstream
import forwarder.pubsub
import forwarder.storage
import forwarder.writeapi
from forwarder.bigquery import InsertAllSink
from forwarder.defaultstream import DefaultStreamSink
from forwarder.logsink import LogSink
from forwarder.pubsub import PubSubSink
from forwarder.registry import build
from forwarder.sink import CheckingSink, Delivery, FaultKind, JournalledSink, Sink
from forwarder.storage import StorageSink
from lifecycle import Settings, load_settings
from spool import Reading, Settlement, SinkState
from tests.fakes import FakeBigQuery, FakePubSub, FakeWriteApi
from tests.test_spool_writer import new_reading
from tests.torture.token_server import Mood, TokenServer

EPOCH = "an-epoch"
TABLE = "p-1.d.readings"
TOPIC = "projects/p-1/topics/readings"
SITES = ("S1", "S2", "S3")
NOW_US = time.time_ns() // 1000


def readings(
    count: int, *, sites: Sequence[str] = SITES, sensor: str = "", payload: bytes | None = None
) -> list[Reading]:
    """Return whole rows of now: BigQuery takes no others into a partitioned table."""
    rows: list[Reading] = []
    for seq in range(1, count + 1):
        row = list(new_reading(seq, site=sites[seq % len(sites)], payload=payload))
        row[1] = row[2] = NOW_US
        if sensor:
            row[4] = sensor
        rows.append((seq, *row))  # type: ignore[arg-type]
    return rows


class PubSub:
    """PubSubSink before FakePubSub."""

    ordered = True
    independent = True
    """Whether a request may succeed after another one failed."""

    def __init__(self, **environ: str) -> None:
        self.fake = FakePubSub(topics=[TOPIC]).start()
        self.sink: Sink = PubSubSink(
            load_settings(
                {
                    "APP_ENV": "DEV",
                    "GCP_PROJECT_ID": "p-1",
                    "PUBSUB_TOPIC": "readings",
                    "BIGQUERY_ENABLED": "false",
                    "PUBSUB_EMULATOR_HOST": self.fake.address,
                    **environ,
                },
                "gate-1",
            )
        )

    def arrived(self) -> list[int]:
        return [int(m.attributes["seq"]) for m in self.fake.messages(TOPIC)]

    def poison(self, seqs: set[int]) -> None:
        ids = [row[1].hex().encode() for row in readings(max(seqs, default=0)) if row[0] in seqs]
        self.fake.faults.poison = lambda data: any(i in data for i in ids)

    def fail(self, kind: FaultKind, times: int | None = None) -> None:
        transient = kind is FaultKind.TRANSIENT
        code = grpc.StatusCode.UNAVAILABLE if transient else grpc.StatusCode.PERMISSION_DENIED
        self.fake.faults.abort(code, "as planned", times)

    def lose_answer(self) -> None:
        self.fake.faults.lose_answer()

    def hang(self) -> None:
        self.fake.faults.hang(times=None)

    def go_away(self) -> None:
        self.fake.stop()

    def come_back(self) -> None:
        self.fake.start()

    def mend(self) -> None:
        self.fake.faults.clear()

    def close(self) -> None:
        self.sink.close()
        self.fake.stop()
        assert self.fake.violations == [], "two requests of one key were in flight at once"


class BigQuery:
    """InsertAllSink before FakeBigQuery."""

    ordered = False
    """insertAll promises no order, and its requests run side by side."""
    independent = True

    def __init__(self, **environ: str) -> None:
        self.fake = FakeBigQuery().start()
        self.fake.create_table(TABLE)
        self.directory = tempfile.TemporaryDirectory()
        self.state = SinkState.open(Path(self.directory.name), "bigquery")
        self.sink: Sink = InsertAllSink(
            load_settings(
                {
                    "APP_ENV": "DEV",
                    "GCP_PROJECT_ID": "p-1",
                    "BIGQUERY_DATASET": "d",
                    "BIGQUERY_TABLE": "readings",
                    "PUBSUB_ENABLED": "false",
                    "BIGQUERY_WRITE_METHOD": "insert_all",
                    "BIGQUERY_EMULATOR_HOST": self.fake.url,
                    **environ,
                },
                "gate-1",
            ),
            self.state,
        )

    def arrived(self) -> list[int]:
        return [int(str(row["seq"])) for row in self.fake.rows(TABLE)]

    def poison(self, seqs: set[int]) -> None:
        self.fake.faults.poison = lambda row: row["seq"] in seqs

    def fail(self, kind: FaultKind, times: int | None = None) -> None:
        transient = kind is FaultKind.TRANSIENT
        status, reason = (503, "backendError") if transient else (403, "accessDenied")
        self.fake.faults.status(status, reason, times=times)

    def lose_answer(self) -> None:
        self.fake.faults.lose_answer()

    def hang(self) -> None:
        self.fake.faults.hang(times=None)

    def go_away(self) -> None:
        self.fake.stop()

    def come_back(self) -> None:
        self.fake.start()

    def mend(self) -> None:
        self.fake.faults.clear()

    def close(self) -> None:
        self.sink.close()
        self.fake.stop()
        self.state.close()
        self.directory.cleanup()


class Storage:
    """StorageSink before FakeWriteApi."""

    ordered = True
    independent = False
    method = "storage"

    def __init__(self, **environ: str) -> None:
        self.tables = FakeBigQuery().start()
        self.tables.create_table(TABLE)
        self.fake = FakeWriteApi(self.tables.store).start()
        self.directory = tempfile.TemporaryDirectory()
        self.state = SinkState.open(Path(self.directory.name), "bigquery")
        settings = load_settings(
            {
                "APP_ENV": "DEV",
                "GCP_PROJECT_ID": "p-1",
                "BIGQUERY_DATASET": "d",
                "BIGQUERY_TABLE": "readings",
                "PUBSUB_ENABLED": "false",
                "BIGQUERY_WRITE_METHOD": self.method,
                "BIGQUERY_EMULATOR_HOST": self.tables.url,
                "BIGQUERY_STORAGE_EMULATOR_HOST": self.fake.address,
                **environ,
            },
            "gate-1",
        )
        self.sink = self.make(settings)

    def make(self, settings: Settings) -> Sink:
        sink = StorageSink(settings, self.state)
        assert sink.resume(EPOCH) == 0
        return sink

    def arrived(self) -> list[int]:
        return [int(str(row["seq"])) for row in self.tables.rows(TABLE)]

    def poison(self, seqs: set[int]) -> None:
        self.fake.faults.poison = lambda row: row["seq"] in seqs

    def fail(self, kind: FaultKind, times: int | None = None) -> None:
        transient = kind is FaultKind.TRANSIENT
        code = grpc.StatusCode.UNAVAILABLE if transient else grpc.StatusCode.PERMISSION_DENIED
        self.fake.faults.abort(code, "as planned", times)

    def lose_answer(self) -> None:
        self.fake.faults.lose_answer()

    def hang(self) -> None:
        self.fake.faults.hang(times=None)

    def go_away(self) -> None:
        self.fake.stop()

    def come_back(self) -> None:
        self.fake.start()

    def mend(self) -> None:
        self.fake.faults.clear()

    def settle(self, seq: int) -> None:
        self.state.settle(Settlement(EPOCH, seq))

    def close(self) -> None:
        self.sink.close()
        self.fake.stop()
        self.tables.stop()
        assert self.fake.violations == []
        self.state.close()
        self.directory.cleanup()


class DefaultStream(Storage):
    """DefaultStreamSink before FakeWriteApi."""

    ordered = False
    """An append that is tried again comes behind those that were on their way with it."""
    method = "storage_default"

    def make(self, settings: Settings) -> Sink:
        return DefaultStreamSink(settings, self.state)


Service = PubSub | BigQuery | Storage
SERVICES: dict[str, type[PubSub] | type[BigQuery] | type[Storage]] = {
    "pubsub": PubSub,
    "insert_all": BigQuery,
    "storage": Storage,
    "storage_default": DefaultStream,
}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    made = SERVICES[request.param]()
    yield made
    made.close()


def check(service: Service, rows: Sequence[Reading], delivery: Delivery) -> None:
    """Hold one delivery to the contract."""
    retry = [row[0] for row in delivery.retry]
    dead = [letter.row[0] for letter in delivery.dead]
    assert retry == sorted(set(retry))
    assert not set(retry) & set(dead)
    assert len(dead) == len(set(dead))
    assert bool(retry) <= (delivery.fault is not None), "a retry without a reason"
    assert all(letter.reason and letter.row in rows for letter in delivery.dead)
    settled = {row[0] for row in rows} - set(retry) - set(dead)
    arrived = service.arrived()
    assert settled <= set(arrived), "reported as delivered, but never arrived"
    assert not set(dead) & set(arrived)
    if service.ordered:
        for site in {row[4] for row in rows}:
            waiting = [row[0] for row in delivery.retry if row[4] == site]
            later = {row[0] for row in rows if row[4] == site and waiting and row[0] > waiting[0]}
            assert not settled & later, "a row overtook an earlier one of its site"


def check_order(service: Service, rows: Sequence[Reading]) -> None:
    """Each site's first arrivals are in order."""
    if service.ordered:
        site_of = {row[0]: row[4] for row in rows}
        for site in set(site_of.values()):
            firsts = list(dict.fromkeys(s for s in service.arrived() if site_of[s] == site))
            assert firsts == sorted(firsts)


def deliver_to_the_end(service: Service, rows: Sequence[Reading]) -> list[int]:
    """Retry as the drain loop does; return the dead."""
    dead: list[int] = []
    todo = list(rows)
    for _ in range(50):
        if not todo:
            return sorted(dead)
        delivery = service.sink.deliver(todo)
        check(service, todo, delivery)
        dead += [letter.row[0] for letter in delivery.dead]
        todo = delivery.retry
    raise AssertionError("the delivery does not come to its end")


def test_everything_arrives_once_and_in_order(service: Service) -> None:
    rows = readings(4321)
    assert deliver_to_the_end(service, rows) == []
    assert sorted(service.arrived()) == [row[0] for row in rows]
    check_order(service, rows)


def test_one_site_with_more_rows_than_a_request_takes_arrives_in_order(service: Service) -> None:
    rows = readings(1001, sites=["S1"])
    delivery = service.sink.deliver(rows)
    check(service, rows, delivery)
    assert (delivery.retry, delivery.dead) == ([], [])
    assert sorted(service.arrived()) == list(range(1, 1002))
    check_order(service, rows)


@pytest.mark.parametrize("guilty", [{1}, {1001}, {500, 501}, {1, 2, 3, 400, 777}])
def test_poison_kills_exactly_the_guilty_rows(service: Service, guilty: set[int]) -> None:
    rows = readings(1001)
    service.poison(guilty)
    assert deliver_to_the_end(service, rows) == sorted(guilty)
    assert sorted(service.arrived()) == sorted({row[0] for row in rows} - guilty)
    check_order(service, rows)


def test_a_batch_of_nothing_but_poison_is_all_dead(service: Service) -> None:
    rows = readings(20)
    service.poison(set(range(1, 21)))
    assert deliver_to_the_end(service, rows) == list(range(1, 21))
    assert service.arrived() == []


def test_a_transient_fault_returns_all_rows_with_its_reason(service: Service) -> None:
    rows = readings(100)
    service.fail(FaultKind.TRANSIENT)
    delivery = service.sink.deliver(rows)
    assert delivery.retry == rows
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    assert "as planned" in delivery.fault.problem or "backendError" in delivery.fault.problem
    service.mend()
    assert deliver_to_the_end(service, rows) == []
    check_order(service, rows)


def test_what_only_a_person_can_mend_is_a_hold_with_its_remedy(service: Service) -> None:
    rows = readings(100)
    service.fail(FaultKind.HOLD)
    delivery = service.sink.deliver(rows)
    check(service, rows, delivery)
    assert delivery.retry == rows
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert "allow it" in delivery.fault.remedy
    assert service.sink.name in delivery.fault.remedy or "bq " in delivery.fault.remedy
    service.mend()
    assert deliver_to_the_end(service, rows) == []


def test_one_failed_request_among_many_leaves_the_others_delivered(service: Service) -> None:
    rows = readings(1800)
    service.fail(FaultKind.TRANSIENT, times=1)
    delivery = service.sink.deliver(rows)
    check(service, rows, delivery)
    assert 0 < len(delivery.retry) < len(rows) + (not service.independent)
    service.mend()
    assert deliver_to_the_end(service, delivery.retry) == []
    assert sorted(service.arrived()) == [row[0] for row in rows]
    check_order(service, rows)


def test_after_a_lost_answer_the_rows_are_tried_again(service: Service) -> None:
    rows = readings(30, sites=["S1"])
    service.lose_answer()
    delivery = service.sink.deliver(rows)
    assert delivery.retry == rows
    assert deliver_to_the_end(service, delivery.retry) == []
    assert set(service.arrived()) == {row[0] for row in rows}
    check_order(service, rows)


def test_a_service_that_is_gone_is_a_transient_fault_until_it_is_back(service: Service) -> None:
    rows = readings(30)
    service.go_away()
    for _ in range(2):
        delivery = service.sink.deliver(rows)
        assert delivery.retry == rows
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.TRANSIENT
    service.come_back()
    for _ in range(100):  # the channel may still be waiting before it connects again
        delivery = service.sink.deliver(rows)
        if not delivery.retry:
            break
        time.sleep(0.1)
    assert delivery.retry == []
    assert set(service.arrived()) == {row[0] for row in rows}


def test_a_service_that_hangs_is_left_after_the_deadline(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.pubsub, "DEADLINE_S", 0.3)
    monkeypatch.setattr(forwarder.bigquery, "DEADLINE_S", 0.3)
    monkeypatch.setattr(forwarder.writeapi, "DEADLINE_S", 0.3)
    rows = readings(30)
    service.hang()
    delivery = service.sink.deliver(rows)
    assert delivery.retry == rows
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    service.mend()
    monkeypatch.undo()
    assert deliver_to_the_end(service, rows) == []


def test_a_batch_of_large_rows_is_cut_into_lawful_requests(service: Service) -> None:
    rows = readings(70, sites=["S1"], sensor="é" * 100_000)
    assert deliver_to_the_end(service, rows) == []
    assert sorted(service.arrived()) == list(range(1, 71))
    check_order(service, rows)


def test_payloads_that_grow_when_escaped_are_delivered_all_the_same(service: Service) -> None:
    rows = readings(40, payload=b'{"t":"%s"}' % ("é" * 100_000).encode())
    assert deliver_to_the_end(service, rows) == []
    assert sorted(service.arrived()) == list(range(1, 41))


def test_a_row_that_was_delivered_before_may_come_again(service: Service) -> None:
    rows = readings(10)
    assert deliver_to_the_end(service, rows) == []
    assert deliver_to_the_end(service, rows) == []


def test_a_search_that_takes_too_long_hands_the_rest_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.pubsub, "GIVE_BACK_AFTER_S", 0.0)
    monkeypatch.setattr(forwarder.bigquery, "GIVE_BACK_AFTER_S", 0.0)
    monkeypatch.setattr(forwarder.storage, "GIVE_BACK_AFTER_S", 0.0)
    monkeypatch.setattr(forwarder.defaultstream, "GIVE_BACK_AFTER_S", 0.0)
    rows = readings(1500)
    service.poison({700})
    delivery = service.sink.deliver(rows)
    check(service, rows, delivery)
    assert delivery.retry
    assert delivery.fault is not None
    assert "not finished yet" in delivery.fault.problem
    monkeypatch.undo()
    # The write API names the guilty row at once; the others are searched by halves.
    dead = [letter.row[0] for letter in delivery.dead]
    assert dead + deliver_to_the_end(service, delivery.retry) == [700]
    assert sorted(service.arrived()) == [row[0] for row in rows if row[0] != 700]


@pytest.mark.parametrize("name", SERVICES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(st.sampled_from([FaultKind.TRANSIENT, FaultKind.HOLD, None]), max_size=6),
    guilty=st.sets(st.integers(1, 200), max_size=5),
)
def test_any_mixture_of_faults_loses_and_reorders_nothing(
    name: str, faults: list[FaultKind | None], guilty: set[int]
) -> None:
    service = SERVICES[name]()
    try:
        rows = readings(200)
        service.poison(guilty)
        for kind in faults:
            if kind is None:
                service.lose_answer()
            else:
                service.fail(kind, times=1)
        assert deliver_to_the_end(service, rows) == sorted(guilty)
        assert set(service.arrived()) == {row[0] for row in rows} - guilty
        check_order(service, rows)
    finally:
        service.close()


@pytest.fixture
def _errors_alone() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    yield
    root.setLevel(level)


@pytest.mark.usefixtures("_errors_alone")
def test_the_log_takes_everything_in_order_whatever_the_level(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = LogSink("pubsub", 0.0)
    rows = readings(100)
    assert sink.deliver(rows) == Delivery()
    found = [record.__dict__["fields"] for record in caplog.records]
    assert [line["seq"] for line in found] == [row[0] for row in rows]
    assert found[0]["event"]["event_id"] == rows[0][1].hex()
    assert found[0]["sink"] == "pubsub"
    sink.close()


CLOUD = {
    "APP_ENV": "DEV",
    "GCP_PROJECT_ID": "p-1",
    "PUBSUB_TOPIC": "readings",
    "BIGQUERY_DATASET": "d",
    "BIGQUERY_TABLE": "readings",
}
SINKS_OF_THE_CLOUD = [("pubsub", "storage"), *(("bigquery", m) for m in SERVICES if m != "pubsub")]


def test_a_check_that_finds_nothing_wrong_writes_nothing(service: Service) -> None:
    assert isinstance(service.sink, CheckingSink)
    assert service.sink.check() is None
    assert service.arrived() == []


@pytest.mark.parametrize(("name", "method"), SINKS_OF_THE_CLOUD)
def test_a_check_tells_what_a_delivery_would(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": str(key), "BIGQUERY_WRITE_METHOD": method}
    state = SinkState.open(tmp_path, name)
    sink = build(name, load_settings(CLOUD | environ, "gate-1"), state)
    assert isinstance(sink, CheckingSink)
    if isinstance(sink, JournalledSink):
        sink.resume(EPOCH)
    fault = sink.check()
    assert fault is not None
    assert fault.kind is FaultKind.HOLD
    assert str(key) in fault.problem
    assert sink.deliver(readings(1)).fault == fault
    with TokenServer() as tokens:
        tokens.make_key(key)
        tokens.mood = Mood.GONE
        away = sink.check()
        assert away is not None
        assert away.kind is FaultKind.TRANSIENT
        tokens.mood = Mood.REVOKED
        revoked = sink.check()
        assert revoked is not None
        assert revoked.kind is FaultKind.HOLD
    sink.close()
    state.close()
