"""What sensors publish reaches both services: every reading, in order per site."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.auth.credentials import AnonymousCredentials
from google.pubsub_v1 import PublisherClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from google.pubsub_v1.types import PubsubMessage
from jsonschema import Draft202012Validator, FormatChecker

from tests.harness import COLLECTOR, SITES, Rig, assert_all_received, assert_in_order, wait_until
from tests.harness.cloud import TABLE_REF, TOPIC_PATH, event_received
from tests.harness.emulator import Emulator, find_emulator
from tests.harness.programs import ROOT

READINGS = 4_000
PULL_TIMEOUT_S = 30.0
SUBSCRIPTION = "projects/acme-edge/subscriptions/everything"


class Subscriber:
    """An ordered subscription, on whatever Pub/Sub it is told of."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        anonymous = AnonymousCredentials()
        self.publisher = PublisherClient(
            transport=PublisherGrpcTransport(channel=self._channel, credentials=anonymous)
        )
        self._client = SubscriberClient(
            transport=SubscriberGrpcTransport(channel=self._channel, credentials=anonymous)
        )

    def subscribe(self) -> None:
        self._client.create_subscription(
            request={"name": SUBSCRIPTION, "topic": TOPIC_PATH, "enable_message_ordering": True}
        )

    def pull(self, count: int) -> list[PubsubMessage]:
        """Return the first ``count`` messages, each acknowledged, in order of delivery."""
        messages: list[PubsubMessage] = []

        def enough() -> bool:
            answer = self._client.pull(
                request={"subscription": SUBSCRIPTION, "max_messages": 1_000}, timeout=10.0
            )
            found = list(answer.received_messages)
            if found:
                self._client.acknowledge(
                    request={"subscription": SUBSCRIPTION, "ack_ids": [m.ack_id for m in found]}
                )
            messages.extend(m.message for m in found)
            return len(messages) >= count

        wait_until(enough, PULL_TIMEOUT_S, f"the subscriber gets {count} messages")
        return messages

    def close(self) -> None:
        self._channel.close()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A system through which all readings have gone."""
    with Rig() as rig:
        subscriber = Subscriber(rig.cloud.pubsub.address)
        subscriber.subscribe()
        subscriber.close()
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered()
        yield rig


def test_every_reading_reaches_both_services_in_order_per_site(rig: Rig) -> None:
    rig.assert_nothing_lost()
    assert {sample.site for sample in rig.publisher.samples} == set(SITES)


def test_a_subscriber_gets_every_event_in_order_per_site(rig: Rig) -> None:
    subscriber = Subscriber(rig.cloud.pubsub.address)
    messages = subscriber.pull(READINGS)
    subscriber.close()
    assert len(messages) == READINGS
    received = [event_received(m.data, m.attributes["seq"], m.ordering_key) for m in messages]
    assert_all_received(rig.publisher.samples, received)
    assert_in_order(received)


def test_each_event_and_its_attributes_are_as_documented(rig: Rig) -> None:
    schema = json.loads((ROOT / "docs" / "kpi-event.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    formats = FormatChecker()
    assert "date-time" in formats.checkers, "jsonschema[format] is installed"
    validator = Draft202012Validator(schema, format_checker=formats)
    samples = {sample.number: sample for sample in rig.publisher.samples}
    for message in rig.cloud.pubsub.messages(TOPIC_PATH):
        event = json.loads(message.data)
        validator.validate(event)
        sample = samples[int(event["value"])]
        assert (event["kpi_name"], event["sensor_id"]) == (sample.tag, sample.sensor)
        assert event["source_topic"] == sample.topic
        assert event["timestamp"] == f"{sample.measured_at:%Y-%m-%dT%H:%M:%S.%fZ}"
        compact = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
        assert message.data == compact.encode(), "compact UTF-8"
        seq = message.attributes["seq"]
        assert message.attributes == {
            "event_id": event["event_id"],
            "site_code": sample.site,
            "kpi_name": sample.tag,
            "source": "rig",
            "seq": seq,
            "schema_version": "1",
        }


def test_each_row_holds_the_reading_and_its_payload(rig: Rig) -> None:
    samples = {sample.number: sample for sample in rig.publisher.samples}
    rows = rig.cloud.bigquery.rows(TABLE_REF)
    assert len(rows) == READINGS
    for row in rows:
        sample = samples[int(float(str(row["value"])))]
        assert row["payload"] == sample.payload.decode()
        assert (row["topic"], row["pi_tag"]) == (sample.topic, sample.tag)
        assert (row["site_code"], row["sensor_id"]) == (sample.site, sample.sensor)
        assert row["timestamp"] == f"{sample.measured_at:%Y-%m-%dT%H:%M:%S.%fZ}"
        assert row["source"] == "rig"


def test_googles_emulator_takes_and_delivers_every_event_in_order(tmp_path: Path) -> None:
    command = find_emulator()
    if command is None:
        pytest.skip("Google's Pub/Sub emulator, or Java, is not installed")
    emulator = Emulator(command, tmp_path)
    emulator.start()
    subscriber = Subscriber(emulator.address)
    try:
        subscriber.publisher.create_topic(name=TOPIC_PATH)
        subscriber.subscribe()
        with Rig(PUBSUB_EMULATOR_HOST=emulator.address, BIGQUERY_ENABLED="false") as rig:
            rig.start(COLLECTOR, "forwarder-pubsub")
            rig.publish(READINGS)
            messages = subscriber.pull(READINGS)
            rig.wait_until_delivered()
            received = [
                event_received(m.data, m.attributes["seq"], m.ordering_key) for m in messages
            ]
            assert_all_received(rig.publisher.samples, received)
            assert_in_order(received)
    finally:
        subscriber.close()
        emulator.kill()
