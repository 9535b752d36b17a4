"""One contract for every sink, over real sockets: see forwarder/sink.py."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest

from forwarder.bigquery import InsertAllSink
from forwarder.event import kpi_event
from forwarder.logsink import LogSink
from forwarder.pubsub import PubSubSink
from forwarder.sink import FaultKind, Sink
from lifecycle import load_settings
from spool import Reading, event_id, row_crc
from tests.harness.cloud import Cloud

SITES = ("A", "B", "C")


def row(seq: int, *, site: str | None = None, tag: str = "T", pad: int = 0) -> Reading:
    """Return a whole row; its value is its seq."""
    site = site if site is not None else SITES[seq % len(SITES)]
    topic = f"FCTS/FAE/{site}/SolvExtract/{tag}" + "x" * pad
    payload = f'{{"n":{seq}}}'.encode()
    identity = event_id(topic.encode(), payload)
    now_us = 1_795_500_000_000_000 + seq
    crc = row_crc(identity, (now_us, now_us, float(seq)), f"{site}s{tag}{topic}", payload)
    return (seq, identity, now_us, now_us, site, "s", tag, float(seq), topic, payload, crc)


def rows(count: int) -> list[Reading]:
    return [row(seq) for seq in range(1, count + 1)]


@dataclass
class Case:
    """A sink, and how to make its service misbehave."""

    sink: Sink
    cloud: Cloud

    @property
    def name(self) -> str:
        return self.sink.name

    def received(self) -> list[int]:
        return [one.number for one in self.cloud.received(self.name)]

    def poison(self, number: float) -> None:
        if self.name == "pubsub":
            self.cloud.pubsub.faults.poison = lambda data: json.loads(data)["value"] == number
        else:
            self.cloud.bigquery.faults.poison = lambda r: r["value"] == number

    def refuse(self, *, for_good: bool) -> None:
        if self.name == "pubsub":
            code = grpc.StatusCode.PERMISSION_DENIED if for_good else grpc.StatusCode.UNAVAILABLE
            self.cloud.pubsub.faults.abort(code, "no", times=None)
        elif for_good:
            self.cloud.bigquery.faults.status(403, "accessDenied", times=None)
        else:
            self.cloud.bigquery.faults.status(503, "backendError", times=None)

    def clear(self) -> None:
        self.cloud.pubsub.faults.clear()
        self.cloud.bigquery.faults.clear()

    def lose_answer(self) -> None:
        fake = self.cloud.pubsub if self.name == "pubsub" else self.cloud.bigquery
        fake.faults.lose_answer(times=1)


BUILDERS: tuple[Callable[[dict[str, str]], Sink], ...] = (
    lambda env: PubSubSink(load_settings(env, "host")),
    lambda env: InsertAllSink(load_settings(env, "host")),
)


@pytest.fixture(params=BUILDERS, ids=["pubsub", "insert_all"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Each sink with its fake."""
    cloud = Cloud().start()
    sink = request.param({"APP_ENV": "DEV", "INSTANCE_ID": "edge-1", **cloud.environment()})
    made = Case(sink, cloud)
    yield made
    sink.close()
    made.clear()
    cloud.stop()


def test_everything_is_delivered_in_order_per_site(case: Case) -> None:
    batch = rows(2_500)
    delivery = case.sink.deliver(batch)
    assert (delivery.retry, delivery.dead, delivery.fault) == ([], [], None)
    received = case.cloud.received(case.name)
    assert sorted(one.number for one in received) == list(range(1, 2_501))
    if case.name == "pubsub":
        for site in SITES:
            numbers = [one.number for one in received if one.site == site]
            assert numbers == sorted(numbers)
        assert case.cloud.pubsub.violations == []


def test_more_of_one_site_than_a_request_may_hold(case: Case) -> None:
    batch = [row(seq, site="A") for seq in range(1, 1_002)]
    assert case.sink.deliver(batch).fault is None
    assert case.received() == sorted(case.received()) or case.name != "pubsub"
    assert len(case.received()) == 1_001


def test_requests_stay_below_the_limit_of_bytes(case: Case) -> None:
    batch = [row(seq, site="A", pad=60_000) for seq in range(1, 401)]
    delivery = case.sink.deliver(batch)
    assert (delivery.retry, delivery.dead, delivery.fault) == ([], [], None)
    assert len(case.received()) == 400


@pytest.mark.parametrize("place", [1, 500, 1_000])
def test_one_guilty_row_is_the_only_dead_one(case: Case, place: int) -> None:
    case.poison(float(place))
    batch = rows(1_000)
    delivery = case.sink.deliver(batch)
    assert delivery.fault is None
    assert delivery.retry == []
    assert [letter.row[0] for letter in delivery.dead] == [place]
    assert delivery.dead[0].reason
    assert delivery.dead[0].detail
    assert sorted(case.received()) == [n for n in range(1, 1_001) if n != place]


def test_a_batch_of_guilty_rows_is_dead_to_the_last(case: Case) -> None:
    if case.name == "pubsub":
        case.cloud.pubsub.faults.poison = lambda _: True
    else:
        case.cloud.bigquery.faults.poison = lambda _: True
    delivery = case.sink.deliver(rows(20))
    assert sorted(letter.row[0] for letter in delivery.dead) == list(range(1, 21))
    assert (delivery.retry, delivery.fault) == ([], None)


def test_a_passing_trouble_leaves_all_rows_to_be_tried_again(case: Case) -> None:
    case.refuse(for_good=False)
    batch = rows(100)
    delivery = case.sink.deliver(batch)
    assert delivery.retry == batch
    assert delivery.dead == []
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    case.clear()
    assert case.sink.deliver(delivery.retry).fault is None
    assert sorted(case.received()) == list(range(1, 101))


def test_what_a_person_must_mend_is_a_hold_with_the_command(case: Case) -> None:
    case.refuse(for_good=True)
    delivery = case.sink.deliver(rows(10))
    assert len(delivery.retry) == 10
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert "--role=roles/" in delivery.fault.remedy
    case.clear()
    assert case.sink.deliver(delivery.retry).fault is None


def test_a_service_that_is_not_there_is_a_passing_trouble(case: Case) -> None:
    case.cloud.stop()
    delivery = case.sink.deliver(rows(10))
    assert len(delivery.retry) == 10
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.TRANSIENT
    case.cloud.start()
    while (delivery := case.sink.deliver(delivery.retry)).retry:
        assert delivery.fault is not None  # the channel still waits to connect again
    assert sorted(case.received()) == list(range(1, 11))


def test_a_lost_answer_is_tried_again_and_loses_nothing(case: Case) -> None:
    case.lose_answer()
    delivery = case.sink.deliver([row(seq, site="A") for seq in range(1, 11)])
    assert len(delivery.retry) == 10
    assert case.sink.deliver(delivery.retry).fault is None
    assert set(case.received()) == set(range(1, 11))


def test_an_empty_table_of_sites_and_hostile_names_pass(case: Case) -> None:
    hostile = ["é" * 200, "'; DROP TABLE x; --", "a b", "\u202e", "\U0001d6c2"]
    batch = [row(n, site=name, tag=name) for n, name in enumerate(hostile, 1)]
    delivery = case.sink.deliver(batch)
    assert (delivery.retry, delivery.dead, delivery.fault) == ([], [], None)
    assert {one.site for one in case.cloud.received(case.name)} == set(hostile)


def test_a_key_that_pubsub_can_never_take_is_dead_there_and_only_there(case: Case) -> None:
    batch = [row(1), row(2, site="é" * 513), row(3, tag="x" * 1_025), row(4)]
    delivery = case.sink.deliver(batch)
    assert delivery.fault is None
    if case.name == "pubsub":
        assert [letter.row[0] for letter in delivery.dead] == [2, 3]
        assert "1024" in delivery.dead[0].detail
        assert sorted(case.received()) == [1, 4]
    else:
        assert delivery.dead == []


def test_the_log_sink_writes_one_event_a_row(caplog: pytest.LogCaptureFixture) -> None:
    sink = LogSink("pubsub")
    delivery = sink.deliver(rows(3))
    assert (delivery.retry, delivery.dead, delivery.fault) == ([], [], None)
    events = [record.__dict__["fields"]["event"] for record in caplog.records]
    assert events == [json.loads(kpi_event(r)) for r in rows(3)]
    sink.close()
