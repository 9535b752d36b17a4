"""What is Pub/Sub's own: the event, its limits, ordering keys, gRPC codes, credentials."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import google.auth
import grpc
import jsonschema
import pytest
from google.auth.credentials import Credentials
from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from hypothesis import given
from hypothesis import strategies as st

import forwarder.pubsub
from forwarder.event import kpi_event, rfc3339
from forwarder.faults import PLUGIN_FAILURE
from forwarder.pubsub import PubSubSink
from forwarder.sink import Delivery, Fault, FaultKind
from lifecycle import load_settings
from spool import Reading, SinkState
from tests.fakes import FakePubSub
from tests.test_sink_contract import readings
from tests.test_spool_writer import new_reading

TOPIC = "projects/p-1/topics/readings"
SCHEMA = json.loads(
    (Path(__file__).parent.parent / "docs" / "kpi-event.schema.json").read_text(encoding="utf-8")
)


@pytest.fixture
def fake() -> Iterator[FakePubSub]:
    with FakePubSub(topics=[TOPIC]) as server:
        yield server


def made(fake: FakePubSub, notes: SinkState | None = None, **variables: str) -> PubSubSink:
    environment = {
        "APP_ENV": "DEV",
        "GCP_PROJECT_ID": "p-1",
        "PUBSUB_TOPIC": "readings",
        "BIGQUERY_ENABLED": "false",
        "PUBSUB_EMULATOR_HOST": fake.address,
    }
    return PubSubSink(load_settings(environment | variables, "gate-1"), notes)


@pytest.fixture
def sink(fake: FakePubSub) -> Iterator[PubSubSink]:
    opened = made(fake)
    yield opened
    opened.close()


def test_a_message_is_the_event_with_its_attributes_and_key(
    fake: FakePubSub, sink: PubSubSink
) -> None:
    (row,) = readings(1, sites=["Ünïty"])
    assert sink.deliver([row]) == Delivery()
    (message,) = fake.messages(TOPIC)
    assert message.ordering_key == "Ünïty"
    assert message.attributes == {
        "event_id": row[1].hex(),
        "site_code": "Ünïty",
        "kpi_name": "TI-101.PV",
        "source": "gate-1",
        "seq": "1",
        "schema_version": "1",
    }
    event = json.loads(message.data)
    jsonschema.validate(event, SCHEMA, format_checker=jsonschema.FormatChecker())
    assert event["source_topic"] == row[8]
    assert event["value"] == 1.5
    assert message.data == kpi_event(row)
    assert b" " not in message.data.replace("Ünïty".encode(), b"")


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
    st.text(min_size=1, max_size=20).filter(lambda t: t.isprintable()),
)
def test_any_reading_is_an_event_of_the_schema(value: float, time_us: int, sensor: str) -> None:
    row = new_reading(1, value=value, timestamp_us=time_us)
    event = json.loads(kpi_event((1, *row[:4], sensor, *row[5:])))
    jsonschema.validate(event, SCHEMA)
    assert event["value"] == value
    assert event["sensor_id"] == sensor
    assert event["timestamp"] == rfc3339(time_us)


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (-1, "1969-12-31T23:59:59.999999Z"),
        (1_704_067_200_000_001, "2024-01-01T00:00:00.000001Z"),
        (-62_135_596_800_000_000, "0001-01-01T00:00:00.000000Z"),
        (253_402_300_799_999_999, "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_times_are_rfc3339_in_utc_with_microseconds(time_us: int, text: str) -> None:
    assert rfc3339(time_us) == text


@pytest.mark.parametrize("column", [4, 6])
@pytest.mark.parametrize("text", ["x" * 1024, "é" * 512])
def test_a_key_or_attribute_at_the_limit_is_taken_and_one_above_is_a_dead_letter(
    fake: FakePubSub, sink: PubSubSink, column: int, text: str
) -> None:
    rows = [list(row) for row in readings(3, sites=["S1"])]
    rows[0][column] = text
    rows[1][column] = text + "x"
    delivery = sink.deliver([tuple(row) for row in rows])  # type: ignore[misc]
    assert [letter.row[0] for letter in delivery.dead] == [2]
    assert delivery.dead[0].reason == "limit"
    assert "at most 1024" in delivery.dead[0].detail
    assert (delivery.retry, delivery.fault) == ([], None)
    assert sorted(m.attributes["seq"] for m in fake.messages(TOPIC)) == ["1", "3"]


def test_a_topic_that_does_not_exist_is_a_hold_with_the_command_that_makes_it(
    fake: FakePubSub,
) -> None:
    sink = made(fake, PUBSUB_TOPIC="nowhere")
    delivery = sink.deliver(readings(3))
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert "gcloud pubsub topics create nowhere --project=p-1" in delivery.fault.remedy
    fake.create_topic("projects/p-1/topics/nowhere")
    fake.create_subscription(SUBSCRIPTION, "projects/p-1/topics/nowhere")
    assert sink.deliver(delivery.retry) == Delivery()
    sink.close()


SUBSCRIPTION = "projects/p-1/subscriptions/dashboards"


def recreate(fake: FakePubSub, sink: PubSubSink, rows: list[Reading]) -> Fault:
    """Delete the topic, have that noticed, create it again; return what was told."""
    fake.create_subscription(SUBSCRIPTION, TOPIC)
    assert sink.deliver(rows[:1]) == Delivery()
    fake.delete_topic(TOPIC)
    delivery = sink.deliver(rows[1:])
    assert delivery.retry == rows[1:]
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    fake.create_topic(TOPIC)
    return delivery.fault


def test_the_remedy_for_a_missing_topic_creates_its_subscriptions_too(
    fake: FakePubSub, sink: PubSubSink
) -> None:
    remedy = recreate(fake, sink, readings(3)).remedy
    assert "gcloud pubsub topics create readings --project=p-1" in remedy
    assert "gcloud pubsub subscriptions create SUBSCRIPTION --topic=readings" in remedy
    assert "--enable-message-ordering" in remedy


@pytest.mark.parametrize("starts", [1, 2])
def test_a_topic_that_was_created_again_gets_nothing_until_it_has_a_subscription(
    fake: FakePubSub, tmp_path: Path, starts: int, caplog: pytest.LogCaptureFixture
) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    rows = readings(30)
    sink = made(fake, notes=state)
    recreate(fake, sink, rows)
    if starts > 1:
        sink.close()
        state.close()
        state = SinkState.open(tmp_path, "pubsub")
        sink = made(fake, notes=state)
    for _ in range(2):
        delivery = sink.deliver(rows[1:])
        assert delivery.retry == rows[1:]
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.HOLD
        assert "has no subscription" in delivery.fault.problem
        assert "gcloud pubsub subscriptions create" in delivery.fault.remedy
        assert fake.topic_count(TOPIC) == 0
    fake.create_subscription("projects/p-1/subscriptions/again", TOPIC)
    assert sink.deliver(rows[1:]) == Delivery()
    assert fake.topic_count(TOPIC) == len(rows) - 1
    (line,) = [r for r in caplog.records if "created again" in r.message]
    assert line.levelname == "WARNING"
    assert line.__dict__["fields"]["first_seq"] == 2
    assert state.remembered("topic_missing") == ""
    assert '"first_seq":"2"' in state.remembered("topic_created_again")
    assert sink.deliver(rows) == Delivery(), "and no look is needed any more"
    sink.close()
    state.close()


def test_a_topic_that_is_deleted_amid_a_delivery_is_missing_and_not_created_again(
    fake: FakePubSub, tmp_path: Path
) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    sink = made(fake, notes=state)
    text = "Resource not found (resource=readings)."
    # The first keys were still taken.
    fake.faults.refuse_key("S2", grpc.StatusCode.NOT_FOUND, text)
    rows = readings(6, sites=("S1", "S2"))
    delivery = sink.deliver(rows)
    assert {row[4] for row in delivery.retry} == {"S2"}
    assert state.remembered("topic_missing")
    assert not state.remembered("topic_created_again")
    fake.faults.clear()
    sink.close()
    state.close()


def test_where_subscriptions_cannot_be_listed_it_is_told_from_which_reading_on(
    fake: FakePubSub, sink: PubSubSink, caplog: pytest.LogCaptureFixture
) -> None:
    fake.publisher_only = True
    rows = readings(30)
    recreate(fake, sink, rows)
    assert sink.deliver(rows[1:]) == Delivery()
    assert sink.deliver(rows) == Delivery()
    (line,) = [r for r in caplog.records if "created again" in r.message]
    assert line.levelname == "ERROR"
    assert line.__dict__["fields"]["first_seq"] == 2
    assert "SPOOL_RETENTION_HOURS" in line.message


def test_a_look_that_fails_for_the_moment_is_tried_again_and_nothing_is_published(
    fake: FakePubSub, sink: PubSubSink
) -> None:
    rows = readings(30)
    recreate(fake, sink, rows)
    fake.create_subscription("projects/p-1/subscriptions/again", TOPIC)
    for code, kind in (
        (grpc.StatusCode.UNAVAILABLE, FaultKind.TRANSIENT),
        (grpc.StatusCode.UNAUTHENTICATED, FaultKind.HOLD),
    ):
        fake.faults.abort(code, "planned", calls={"ListTopicSubscriptions"})
        delivery = sink.deliver(rows[1:])
        assert delivery.fault is not None
        assert delivery.fault.kind is kind
        assert fake.topic_count(TOPIC) == 0
    assert sink.deliver(rows[1:]) == Delivery()


def test_another_topic_is_not_held_for_the_one_that_was_missing(
    fake: FakePubSub, tmp_path: Path
) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    sink = made(fake, notes=state, PUBSUB_TOPIC="nowhere")
    assert sink.deliver(readings(1)).fault is not None
    sink.close()
    sink = made(fake, notes=state)
    assert sink.deliver(readings(1)) == Delivery()
    sink.close()
    state.close()


@pytest.mark.parametrize("name", ["a+b", "a%41b", "a%b", "a~b.c-d_e"])
def test_the_routing_header_names_any_lawful_topic(fake: FakePubSub, name: str) -> None:
    topic = f"projects/p-1/topics/{name}"
    fake.create_topic(topic)
    sink = made(fake, PUBSUB_TOPIC=name)
    assert sink.deliver(readings(2)) == Delivery()
    assert fake.topic_count(topic) == 2
    fake.delete_topic(topic)
    assert sink.deliver(readings(1)).fault is not None
    fake.create_topic(topic)
    fake.create_subscription(SUBSCRIPTION, topic)
    assert sink.deliver(readings(1)) == Delivery()
    sink.close()


@pytest.mark.parametrize(
    ("variables", "warned"),
    [
        ({"PUBSUB_EMULATOR_HOST": ""}, ["WARNING"]),
        ({"PUBSUB_EMULATOR_HOST": "", "PUBSUB_ENDPOINT": "pubsub.googleapis.com:443"}, ["WARNING"]),
        ({"PUBSUB_EMULATOR_HOST": "", "PUBSUB_ENDPOINT": "europe-west1-pubsub.googleapis.com"}, []),
        ({}, []),
    ],
)
def test_an_endpoint_that_may_use_several_regions_is_warned_of_once(
    fake: FakePubSub, variables: dict[str, str], warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made(fake, None, **variables)
    lines = [r.levelname for r in caplog.records if "one region only" in r.message]
    assert lines == warned


def test_many_sites_are_sent_a_few_at_once_and_no_deadline_runs_while_they_wait(
    fake: FakePubSub, sink: PubSubSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.pubsub, "IN_FLIGHT_MAX", 5)
    monkeypatch.setattr(forwarder.pubsub, "DEADLINE_S", 1.0)
    fake.faults.delay(0.2)
    sites = [f"S{number}" for number in range(60)]
    began = time.monotonic()
    assert sink.deliver(readings(120, sites=sites)) == Delivery()
    assert time.monotonic() - began > 60 / 5 * 0.2
    assert fake.most_at_once == 5
    assert fake.requests == 60


def test_sites_that_cannot_be_sent_in_time_are_handed_back_without_blame(
    fake: FakePubSub, sink: PubSubSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.pubsub, "IN_FLIGHT_MAX", 2)
    monkeypatch.setattr(forwarder.pubsub, "START_WITHIN_S", 0.3)
    fake.faults.delay(0.2)
    rows = readings(12, sites=[f"S{number}" for number in range(12)])
    delivery = sink.deliver(rows)
    assert 4 <= len(delivery.retry) <= 8
    assert (delivery.fault, delivery.faults) == (None, {})
    while delivery.retry:
        delivery = sink.deliver(delivery.retry)
    assert fake.count == 12


def test_a_batch_may_be_larger_where_there_are_many_sites(
    fake: FakePubSub, sink: PubSubSink
) -> None:
    few = sink.max_rows
    assert sink.deliver(readings(8, sites=[f"S{number}" for number in range(8)])) == Delivery()
    assert sink.max_rows == few
    sites = [f"S{number}" for number in range(1500)]
    assert sink.deliver(readings(1500, sites=sites)) == Delivery()
    assert sink.max_rows == 1500 * 8
    for _ in range(3):
        assert sink.deliver(readings(1)) == Delivery()
    assert sink.max_rows == few
    assert fake.count == 1511


def test_a_site_that_is_refused_is_named_and_the_others_are_delivered(
    fake: FakePubSub, sink: PubSubSink
) -> None:
    fake.faults.refuse_key("S2", grpc.StatusCode.UNAVAILABLE, "not this key")
    rows = readings(30)
    delivery = sink.deliver(rows)
    assert delivery.retry == [row for row in rows if row[4] == "S2"]
    assert delivery.fault is not None
    assert delivery.faults == {"S2": delivery.fault}
    assert sink._connection is not None, "the connection is well"  # noqa: SLF001 - the claim


def test_a_refusal_of_the_whole_topic_names_no_site(fake: FakePubSub, sink: PubSubSink) -> None:
    fake.faults.abort(grpc.StatusCode.PERMISSION_DENIED, times=None)
    assert sink.deliver(readings(30)).faults == {}


def test_a_full_topic_name_of_another_project_is_used_as_it_is(fake: FakePubSub) -> None:
    fake.create_topic("projects/other/topics/theirs")
    sink = made(fake, PUBSUB_TOPIC="projects/other/topics/theirs")
    assert sink.deliver(readings(2)) == Delivery()
    assert fake.topic_count("projects/other/topics/theirs") == 2
    sink.close()


CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
@pytest.mark.parametrize("count", [1, 7])
def test_no_grpc_code_raises_or_loses_a_row(
    fake: FakePubSub, sink: PubSubSink, code: grpc.StatusCode, count: int
) -> None:
    fake.faults.abort(code, "planned", times=None)
    rows = readings(count)
    delivery = sink.deliver(rows)
    assert sorted([*delivery.retry, *(d.row for d in delivery.dead)]) == rows
    assert bool(delivery.dead) == (code.name in {"INVALID_ARGUMENT", "OUT_OF_RANGE"})
    assert all(letter.detail == "planned" for letter in delivery.dead)
    fake.faults.clear()
    fake.create_subscription(SUBSCRIPTION, TOPIC)  # asked for after NOT_FOUND
    assert sink.deliver(delivery.retry or rows[:1]).retry == []


class Account(Credentials):
    """Credentials that can have no token, for the reason given."""

    def __init__(self, error: GoogleAuthError | None) -> None:
        super().__init__()
        self.error = error
        self.asked = 0

    def refresh(self, request: object) -> None:
        assert callable(request)
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (RefreshError("invalid_grant: Invalid JWT"), FaultKind.HOLD, "GOOGLE_APPLICATION_CRED"),
        (RefreshError("unavailable", retryable=True), FaultKind.TRANSIENT, ""),
        (TransportError("no route"), FaultKind.TRANSIENT, ""),
        (None, FaultKind.TRANSIENT, ""),
    ],
)
def test_a_call_without_a_token_is_judged_by_why_there_is_none(
    fake: FakePubSub,
    sink: PubSubSink,
    error: GoogleAuthError | None,
    kind: FaultKind,
    remedy: str,
) -> None:
    account = sink._credentials = Account(error)  # noqa: SLF001 - an emulator needs none
    fake.faults.abort(grpc.StatusCode.UNAVAILABLE, f"{PLUGIN_FAILURE} with error: ", times=3)
    rows = readings(30)
    delivery = sink.deliver(rows)
    assert (delivery.retry, delivery.dead) == (rows, [])
    assert delivery.fault is not None
    assert delivery.fault.kind is kind
    assert remedy in delivery.fault.remedy
    assert account.asked == 1, "once for all sites"
    assert sink.deliver(rows) == Delivery()


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("", "pubsub.googleapis.com:443"),
        ("europe-west1-pubsub.googleapis.com", "europe-west1-pubsub.googleapis.com:443"),
        ("localhost:8443", "localhost:8443"),
        ("[::1]", "[::1]:443"),
        ("[::1]:8443", "[::1]:8443"),
    ],
)
def test_an_endpoint_without_a_port_is_that_of_https(
    fake: FakePubSub, endpoint: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def channel(host: str, **_: object) -> grpc.Channel:
        asked.append(host)
        return grpc.insecure_channel(fake.address)

    monkeypatch.setattr(google.auth, "default", lambda **_: (Account(None), "p-1"))
    monkeypatch.setattr(PublisherGrpcTransport, "create_channel", channel)
    sink = made(fake, PUBSUB_EMULATOR_HOST="", PUBSUB_ENDPOINT=endpoint)
    assert sink.deliver(readings(1)) == Delivery()
    assert asked == [target]
    sink.close()


def test_a_hold_is_told_even_if_another_lane_failed_for_the_moment(
    fake: FakePubSub, sink: PubSubSink
) -> None:
    fake.faults.abort(grpc.StatusCode.UNAVAILABLE, times=1)
    fake.faults.abort(grpc.StatusCode.PERMISSION_DENIED, times=1)
    delivery = sink.deliver(readings(3))
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert [row[0] for row in delivery.retry] == sorted(row[0] for row in delivery.retry)


def test_after_a_deadline_the_next_try_begins_with_a_new_connection(
    fake: FakePubSub, sink: PubSubSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.pubsub, "DEADLINE_S", 0.2)
    assert sink.deliver(readings(1)) == Delivery()
    first = sink._connection  # noqa: SLF001 - the connection is the claim
    fake.faults.hang()
    assert len(sink.deliver(readings(1)).retry) == 1
    assert sink._connection is None  # noqa: SLF001
    monkeypatch.undo()
    assert sink.deliver(readings(1)) == Delivery()
    assert sink._connection is not first  # noqa: SLF001


def test_a_reading_alone_needs_no_thread(sink: PubSubSink, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sink.deliver(readings(1)) == Delivery()
    started = []
    start = threading.Thread.start

    def counted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", counted)
    assert sink.deliver(readings(1)) == Delivery()
    assert started == []
    assert sink.deliver(readings(30)) == Delivery()
    assert started, "gRPC starts one for calls side by side; otherwise this test shows nothing"


def test_sites_are_published_side_by_side(fake: FakePubSub, sink: PubSubSink) -> None:
    fake.faults.delay(0.3)
    began = time.monotonic()
    assert sink.deliver(readings(8, sites=[f"S{n}" for n in range(8)])) == Delivery()
    assert time.monotonic() - began < 4 * 0.3
    assert fake.violations == []
