"""How programs end, and when they refuse to begin."""

import sqlite3
from collections.abc import Iterator

import pytest

from lifecycle import Settings
from tests.harness import COLLECTOR, FORWARDERS, PROGRAMS, Rig, assert_adds_up, wait_until

STOP_S = 10.0
RATE = 2_000
READINGS = 500
SOON_S = 20.0
CONFIG, STORAGE = 78, 75


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A system of its own for each test."""
    with Rig() as rig:
        yield rig


def test_sigterm_under_load_ends_each_program_in_under_10_s(rig: Rig) -> None:
    rig.start()
    with rig.load(RATE):
        wait_until(lambda: rig.books.counter("spooled") > RATE, SOON_S, "traffic flows")
        for name in (*FORWARDERS, COLLECTOR):
            code, seconds = rig.programs[name].stop()
            assert code == 0, name
            assert seconds < STOP_S, name
    rig.start(*PROGRAMS)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()


def test_sigterm_during_an_outage_ends_each_program_in_under_10_s(rig: Rig) -> None:
    rig.cloud.stop()
    rig.start()
    rig.publish(READINGS)
    for sink in rig.sinks:
        wait_until(
            lambda sink=sink: rig.books.backlog(sink)["state"] == "retrying",  # type: ignore[misc]
            SOON_S,
            f"{sink} retries",
        )
    for name in PROGRAMS:
        code, seconds = rig.programs[name].stop()
        assert code == 0, name
        assert seconds < STOP_S, name


def test_sigterm_while_the_services_hang_ends_the_forwarders_in_under_10_s(rig: Rig) -> None:
    rig.cloud.pubsub.faults.hang(times=None, calls={"*"})
    rig.cloud.hang_bigquery()
    rig.start()
    rig.publish(READINGS)
    assert rig.cloud.pubsub.faults.wait_fired(1, SOON_S)
    assert rig.cloud.bigquery.faults.wait_fired(1, SOON_S)
    for name in FORWARDERS:
        code, seconds = rig.programs[name].stop()
        assert code == 0, name
        assert seconds < STOP_S, name
    rig.cloud.pubsub.faults.clear()
    rig.cloud.mend_bigquery()
    rig.start(*FORWARDERS)
    rig.wait_until_delivered()
    assert_adds_up(rig.books, rig.sinks)


def test_a_second_program_of_a_role_is_refused_by_name_of_the_first(rig: Rig) -> None:
    rig.start(COLLECTOR)
    first = rig.programs[COLLECTOR].pid
    with Rig(SPOOL_DIR=str(rig.spool_dir), MQTT_PORT=str(rig.broker.port)) as other:
        second = other.programs[COLLECTOR]
        second.start()
        assert second.wait() == STORAGE
        assert f"process {first}" in second.log_text
    assert rig.programs[COLLECTOR].running


def test_everything_wrong_at_once_is_one_report_that_names_each_variable() -> None:
    wrong: dict[str, str] = {
        "APP_ENV": "PROD",
        "GCP_PROJECT_ID": "no project",
        "BIGQUERY_DATASET": "a-b",
        "BIGQUERY_TABLE": "a.b",
        "PUBSUB_TOPIC": "1",
        "MQTT_BROKER": "a b",
        "MQTT_PORT": "70000",
        "MQTT_TOPIC": "a/#/b",
        "MQTT_CLIENT_ID": "x" * 241,
        "MQTT_PASSWORD_FILE": "/does/not/exist",
        "MQTT_TLS_CA_FILE": "/does/not/exist",
        "MQTT_TLS_CERT_FILE": "/does/not/exist",
        "MQTT_TLS_KEY_FILE": "/does/not/exist",
        "CLOUD_CA_FILE": "/does/not/exist",
        "INSTANCE_ID": "-",
        "SPOOL_DIR": "somewhere",
        "SPOOL_MAX_BYTES": "lots",
        "DEAD_LETTER_MAX_BYTES": "plenty",
        "SPOOL_FULL_POLICY": "hope",
        "SPOOL_RETENTION_HOURS": "-1",
        "DEDUP_WINDOW": "x",
        "COMMIT_DELAY_MS": "soon",
        "TIMESTAMP_FORMATS": "iso",
        "SITE_MISMATCH": "maybe",
        "REFUSED_POLICY": "lose",
        "MAX_PAYLOAD_BYTES": "0",
        "MAX_DRAIN_RATE": "fast",
        "PUBSUB_ENABLED": "perhaps",
        "PUBSUB_ENDPOINT": "https://host",
        "PUBSUB_EMULATOR_HOST": "a:b",
        "BIGQUERY_ENABLED": "often",
        "BIGQUERY_ENDPOINT": "http://x",
        "BIGQUERY_STORAGE_ENDPOINT": "https://x",
        "BIGQUERY_EMULATOR_HOST": "localhost:9050",
        "BIGQUERY_STORAGE_EMULATOR_HOST": "http://x",
        "BIGQUERY_CREATE_TABLE": "si",
        "BIGQUERY_WRITE_METHOD": "fax",
        "LOG_LEVEL": "LOUD",
        "LOG_FORMAT": "xml",
    }
    assert {field.upper() for field in Settings.__struct_fields__} - wrong.keys() == {
        "MQTT_USERNAME",  # any text will do
        "GOOGLE_APPLICATION_CREDENTIALS",  # the client's own business
    }
    with Rig(broker_options=None, forwarder="forwarder", **wrong) as rig:
        for name in PROGRAMS:
            program = rig.programs[name]
            program.start()
            assert program.wait() == CONFIG
            assert program.log_text.count("nothing was started") == 1
            for variable in wrong:
                assert f": {variable}: " in program.log_text, f"{name} does not name {variable}"


def test_app_env_unset_is_refused() -> None:
    with Rig(APP_ENV="") as rig:
        for name in PROGRAMS:
            rig.programs[name].start()
            assert rig.programs[name].wait() == CONFIG
            assert "APP_ENV: not set" in rig.programs[name].log_text
        assert not (rig.spool_dir / "spool.db").exists()


def test_another_app_env_is_refused_with_a_backlog_and_accepted_without(rig: Rig) -> None:
    rig.cloud.stop()
    rig.start()
    rig.publish(READINGS)
    rig.wait_until_spooled()
    for name in PROGRAMS:
        assert rig.programs[name].stop()[0] == 0
        rig.programs[name].environment["APP_ENV"] = "PRD"
    rig.cloud.start()
    for name in PROGRAMS:
        rig.programs[name].start()
        assert rig.programs[name].wait() == CONFIG, name
        assert "taken under DEV" in rig.programs[name].log_text
    assert rig.cloud.received("pubsub") == []
    assert rig.cloud.received("bigquery") == []
    for name in PROGRAMS:
        rig.programs[name].environment["APP_ENV"] = "DEV"
    rig.start()
    rig.wait_until_delivered()
    for name in PROGRAMS:
        assert rig.programs[name].stop()[0] == 0
        rig.programs[name].environment["APP_ENV"] = "PRD"
    rig.start()
    rig.publish(READINGS)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()


def test_a_lost_cursor_does_not_bring_readings_of_another_app_env(rig: Rig) -> None:
    rig.start()
    rig.publish(READINGS)
    rig.wait_until_delivered()
    for name in PROGRAMS:
        assert rig.programs[name].stop()[0] == 0
        rig.programs[name].environment["APP_ENV"] = "PRD"
    rig.start(COLLECTOR)
    wait_until(
        lambda: rig.books.rows("spool", "SELECT 1 FROM meta WHERE value = 'PRD'"),
        SOON_S,
        "the spool belongs to PRD",
    )
    for file in rig.spool_dir.glob("pubsub.db*"):
        file.unlink()
    rig.start("forwarder-pubsub")
    wait_until(
        lambda: rig.books.rows("pubsub", "SELECT last_seq FROM gap") == [(READINGS,)],
        SOON_S,
        "the old environment's readings are passed over",
    )
    assert len(rig.cloud.received("pubsub")) == READINGS


def test_a_member_of_the_group_can_look_after_everything_ended(rig: Rig) -> None:
    rig.start()
    rig.publish(READINGS)
    rig.wait_until_delivered()
    for name in PROGRAMS:
        assert rig.programs[name].stop()[0] == 0
    backlog = rig.books.as_operator("select sink, pending from backlog")
    assert backlog == [{"sink": "bigquery", "pending": 0}, {"sink": "pubsub", "pending": 0}]
    with pytest.raises(sqlite3.OperationalError):
        sqlite3.connect(f"file:{rig.spool_dir}/spool.db?mode=ro", uri=True).execute(
            "DELETE FROM reading_row"
        )
