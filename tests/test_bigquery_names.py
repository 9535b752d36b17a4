"""Names that are lawful at BigQuery, however odd, lead to the table they name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from forwarder.bigquery import InsertAllSink
from forwarder.defaultstream import DefaultStreamSink
from forwarder.pubsub import PubSubSink
from forwarder.sink import Delivery, FaultKind, Sink
from forwarder.storage import StorageSink
from forwarder.tablename import TableName
from lifecycle import Settings, load_settings
from spool import SinkState
from tests.fakes import FakeBigQuery, FakePubSub, FakeWriteApi
from tests.test_sink_contract import EPOCH, readings
from tests.torture.google import earnest

METHODS = ("storage", "storage_default", "insert_all")
NAMES = (
    TableName("p-1", "d", "größe"),
    TableName("p-1", "d", "readings of 2026 - all"),
    TableName("p-1", "d", "温度"),
    TableName("example.com:my-proj", "d", "readings"),
    TableName("example.co.uk:my-proj", "d_2", "größe"),
)
REGIONAL = (
    "europe-west1-pubsub.googleapis.com",
    "bigquery.europe-west1.rep.googleapis.com",
    "bigquerystorage.europe-west1.rep.googleapis.com",
)
READINGS = 50


class Service:
    """Both fakes, and a sink of any method before them."""

    def __init__(self, directory: Path) -> None:
        self.tables = FakeBigQuery().start()
        self.api = FakeWriteApi(self.tables.store).start()
        self.state = SinkState.open(directory, "bigquery")

    def sink(self, method: str, name: TableName) -> Sink:
        settings = load_settings(
            {
                "APP_ENV": "DEV",
                "GCP_PROJECT_ID": name.project,
                "BIGQUERY_DATASET": name.dataset,
                "BIGQUERY_TABLE": name.table,
                "PUBSUB_ENABLED": "false",
                "BIGQUERY_WRITE_METHOD": method,
                "BIGQUERY_EMULATOR_HOST": self.tables.url,
                "BIGQUERY_STORAGE_EMULATOR_HOST": self.api.address,
            },
            "gate-1",
        )
        return self._made(method, settings)

    def _made(self, method: str, settings: Settings) -> Sink:
        if method == "insert_all":
            return InsertAllSink(settings)
        if method == "storage_default":
            return DefaultStreamSink(settings)
        sink = StorageSink(settings, self.state)
        sink.resume(EPOCH)
        return sink

    def close(self) -> None:
        self.state.close()
        self.api.stop()
        self.tables.stop()
        assert self.api.violations == [], "a header that Google's clients would not send"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", NAMES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rows_reach_a_table_of_any_lawful_name(
    service: Service, method: str, name: TableName
) -> None:
    service.tables.create_table(str(name))
    sink = service.sink(method, name)
    rows = readings(30)
    for begin in (0, 10, 20):
        assert sink.deliver(rows[begin : begin + 10]) == Delivery()
    sink.close()
    assert service.tables.table_count(str(name)) == 30
    assert len(service.api.streams.names) == (method == "storage")


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_stream_of_any_lawful_name_is_finalized_and_followed_by_another(
    service: Service, name: TableName
) -> None:
    """Its name stands in the routing header of each call that is about it."""
    service.tables.create_table(str(name))
    sink = service.sink("storage", name)
    rows = readings(20)
    assert sink.deliver(rows[:10]) == Delivery()
    service.api.streams.finalize(service.api.streams.names[0])
    assert sink.deliver(rows[10:]) == Delivery()
    sink.close()
    assert len(service.api.streams.names) == 2


@pytest.mark.parametrize("method", METHODS)
def test_the_remedies_name_a_domain_scoped_table_as_the_tools_do(
    service: Service, method: str
) -> None:
    name = TableName("example.com:my-proj", "d", "readings")
    sink = service.sink(method, name)
    delivery = sink.deliver(readings(3))
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert "CREATE TABLE `example.com:my-proj.d.readings`" in delivery.fault.remedy
    service.tables.faults.status(403, "accessDenied", times=None, calls={"*"})
    delivery = sink.deliver(readings(3))
    assert delivery.fault is not None
    assert delivery.fault.remedy.endswith(" example.com:my-proj:d.readings")
    sink.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_domain_scoped_table_is_created(service: Service, method: str) -> None:
    name = TableName("example.com:my-proj", "d", "größe")
    service.tables.create_dataset("example.com:my-proj.d")
    settings = load_settings(
        {
            "APP_ENV": "DEV",
            "GCP_PROJECT_ID": name.project,
            "BIGQUERY_DATASET": name.dataset,
            "BIGQUERY_TABLE": name.table,
            "PUBSUB_ENABLED": "false",
            "BIGQUERY_WRITE_METHOD": method,
            "BIGQUERY_CREATE_TABLE": "true",
            "BIGQUERY_EMULATOR_HOST": service.tables.url,
            "BIGQUERY_STORAGE_EMULATOR_HOST": service.api.address,
        },
        "gate-1",
    )
    sink = service._made(method, settings)  # noqa: SLF001 - this module's own
    assert sink.deliver(readings(3)) == Delivery()
    sink.close()
    assert service.tables.table_count(str(name)) == 3


def test_a_topic_of_a_domain_scoped_project_is_published_to_and_named_in_the_remedies() -> None:
    topic = "projects/example.com:my-proj/topics/readings"
    with FakePubSub(topics=[topic]) as fake:
        settings = load_settings(
            {
                "APP_ENV": "DEV",
                "GCP_PROJECT_ID": "example.com:my-proj",
                "PUBSUB_TOPIC": "readings",
                "BIGQUERY_ENABLED": "false",
                "PUBSUB_EMULATOR_HOST": fake.address,
            },
            "gate-1",
        )
        sink = PubSubSink(settings)
        assert sink.deliver(readings(3)) == Delivery()
        assert len(fake.messages(topic)) == 3
        fake.delete_topic(topic)
        fault = sink.deliver(readings(3)).fault
        assert fault is not None
        assert fault.remedy.startswith("create it: gcloud pubsub topics create readings ")
        assert "--project=example.com:my-proj" in fault.remedy
        sink.close()


@pytest.mark.parametrize("method", ["storage", "insert_all"])
def test_regional_endpoints_are_what_is_asked_and_nothing_else(method: str, tmp_path: Path) -> None:
    """Behind the gate nothing but these names exists: the usual ones cannot be reached."""
    endpoints = {
        "BIGQUERY_ENDPOINT": REGIONAL[1],
        "BIGQUERY_STORAGE_ENDPOINT": REGIONAL[2],
        "PUBSUB_ENDPOINT": REGIONAL[0],
    }
    with earnest(tmp_path, method, hosts=REGIONAL) as system:
        for program in system.rig.programs.values():
            program.environment |= endpoints
        system.rig.start()
        system.rig.publish(READINGS)
        system.rig.wait_until_delivered()
        system.rig.assert_nothing_lost()
