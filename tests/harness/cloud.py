"""Both fakes, and what arrived at them in a form that can be compared with the ledger."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import grpc

from tests.fakes import FakeBigQuery, FakePubSub, FakeWriteApi
from tests.fakes.rows import Row
from tests.harness.waiting import free_port

PROJECT, TOPIC, DATASET, TABLE = "acme-edge", "kpi-events", "plant", "readings"
TOPIC_PATH = f"projects/{PROJECT}/topics/{TOPIC}"
TABLE_REF = f"{PROJECT}.{DATASET}.{TABLE}"


@dataclass(frozen=True, slots=True)
class Received:
    """One reading at one service."""

    number: int
    site: str
    seq: int
    event_id: str


class Cloud:
    """The services, with topic and table in place."""

    def __init__(self) -> None:
        self.pubsub = FakePubSub(free_port(), topics=[TOPIC_PATH])
        self.bigquery = FakeBigQuery(free_port())
        self.bigquery.create_table(TABLE_REF)
        self.write_api = FakeWriteApi(self.bigquery.store, free_port())

    def start(self) -> Self:
        """Serve."""
        self.pubsub.start()
        self.start_bigquery()
        return self

    def stop(self) -> None:
        """Be away."""
        self.pubsub.stop()
        self.stop_bigquery()

    def stop_bigquery(self) -> None:
        """Let BigQuery be away, by whichever way it is written to."""
        self.bigquery.stop()
        self.write_api.stop()

    def start_bigquery(self) -> None:
        """Let BigQuery be there again."""
        self.bigquery.start()
        self.write_api.start()

    def hang_bigquery(self) -> None:
        """Let BigQuery take every request and never answer."""
        self.bigquery.faults.hang(times=None, calls={"*"})
        self.write_api.faults.hang(times=None, calls={"*"})

    def refuse_bigquery(self, status: int, reason: str, code: grpc.StatusCode) -> None:
        """Let BigQuery answer each request with an error, in the words of REST and of gRPC."""
        self.bigquery.faults.status(status, reason, times=None, calls={"*"})
        self.write_api.faults.abort(code, reason, times=None, calls={"*"})

    def poison_bigquery(self, poison: Callable[[Row], bool]) -> None:
        """Let BigQuery refuse the rows for which ``poison`` holds."""
        self.bigquery.faults.poison = self.write_api.faults.poison = poison

    def mend_bigquery(self) -> None:
        """Let BigQuery be well again."""
        self.bigquery.faults.clear()
        self.write_api.faults.clear()

    def create_topic_again(self) -> None:
        """Create the topic, and a subscription to it."""
        self.pubsub.create_topic(TOPIC_PATH)
        self.pubsub.create_subscription(f"projects/{PROJECT}/subscriptions/again", TOPIC_PATH)

    def environment(self) -> dict[str, str]:
        """Return the variables that lead the forwarders here."""
        return {
            "GCP_PROJECT_ID": PROJECT,
            "PUBSUB_TOPIC": TOPIC,
            "BIGQUERY_DATASET": DATASET,
            "BIGQUERY_TABLE": TABLE,
            "PUBSUB_EMULATOR_HOST": self.pubsub.address,
            "BIGQUERY_EMULATOR_HOST": self.bigquery.url,
            "BIGQUERY_STORAGE_EMULATOR_HOST": self.write_api.address,
        }

    def received(self, sink: str) -> list[Received]:
        """Return what the service of ``sink`` has, in order of arrival."""
        if sink == "pubsub":
            return [
                event_received(m.data, m.attributes["seq"], m.ordering_key)
                for m in self.pubsub.messages(TOPIC_PATH)
            ]
        return [row_received(row) for row in self.bigquery.rows(TABLE_REF)]


def event_received(data: bytes, seq: str, key: str) -> Received:
    """Return what a message of Pub/Sub says."""
    event = json.loads(data)
    assert key == event["site_code"], "the ordering key is the site"
    return Received(int(event["value"]), event["site_code"], int(seq), event["event_id"])


def row_received(row: dict[str, object]) -> Received:
    """Return what a row of BigQuery says."""
    numbers = [int(str(row["seq"])), int(float(str(row["value"])))]
    return Received(numbers[1], str(row["site_code"]), numbers[0], str(row["event_id"]))
