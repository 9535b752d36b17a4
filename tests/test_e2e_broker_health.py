"""What the view ``health`` says of the broker, with a real Mosquitto and the real collector."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, Rig, wait_until

SECRET = "s3cret-of-the-plant"  # noqa: S105 - made for this test
SOON_S = 20.0
READINGS = 20


def health(rig: Rig) -> dict[str, dict[str, str]]:
    """Return the rows that the operator sees, by name; none before the file is there."""
    if not rig.books.rows("spool", "SELECT 1 FROM meta"):
        return {}
    return {
        row["name"]: row
        for row in rig.books.as_operator("select * from health where subject = 'broker'")
    }


def wait_for_row(rig: Rig, name: str) -> dict[str, str]:
    rows = wait_until(lambda: name in (r := health(rig)) and r, SOON_S, f"{name} is in health")
    assert rows
    return rows[name]


def wait_until_well(rig: Rig) -> None:
    wait_until(lambda: not health(rig), SOON_S, "health is empty")


def restart_broker(rig: Rig) -> None:
    """Let the broker save its sessions and end, and start it again."""
    assert rig.broker.stop()[0] == 0
    rig.broker.start()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(APP_ENV="LOCAL") as made:
        yield made


def test_a_broker_that_dies_is_in_health_until_it_is_back(rig: Rig) -> None:
    rig.start(COLLECTOR)
    restart_broker(rig)  # which saves the session: a kill is not to lose it as well
    wait_until_well(rig)
    rig.broker.kill()
    row = wait_for_row(rig, "broker_disconnected")
    assert row["severity"] == "WARNING"
    assert f"127.0.0.1:{rig.broker.port}" in row["detail"]
    assert "is safe" in row["detail"], "it says what is lost: nothing"
    assert row["remedy"]
    wait_until(
        lambda: "refused" in wait_for_row(rig, "broker_disconnected")["detail"], SOON_S, "why"
    )
    rig.broker.start()
    wait_until_well(rig)


def test_a_broker_that_was_never_there_is_in_health(rig: Rig) -> None:
    collector = rig.programs[COLLECTOR]
    collector.start()
    collector.wait_for_log("cannot reach the broker")
    row = wait_for_row(rig, "broker_disconnected")
    assert "Connection refused" in row["detail"]
    rig.broker.start()
    wait_until_well(rig)
    assert "lost the session" not in collector.log_text, "a first start has lost nothing"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Rig]:
    """A broker that asks for a password and has an access list."""
    passwords, access = tmp_path / "passwords", tmp_path / "access"
    subprocess.run(
        ["mosquitto_passwd", "-b", "-c", passwords, "gate", SECRET], check=True, capture_output=True
    )
    access.write_text("user gate\ntopic readwrite #\n", encoding="ascii")
    options: dict[str, str | None] = {
        "allow_anonymous": "false",
        "password_file": str(passwords),
        "acl_file": str(access),
    }
    secret = tmp_path / "secret"
    secret.write_text(SECRET, encoding="ascii")
    names = {"MQTT_USERNAME": "gate", "MQTT_PASSWORD_FILE": str(secret)}
    with Rig(APP_ENV="LOCAL", broker_options=options, **names) as made:
        yield made


def test_a_refused_password_is_in_health_with_its_remedy(guarded: Rig) -> None:
    collector = guarded.programs[COLLECTOR]
    secret = Path(collector.environment["MQTT_PASSWORD_FILE"])
    secret.write_text("wrong", encoding="ascii")
    guarded.broker.start()
    collector.start()
    row = wait_for_row(guarded, "broker_refuses")
    assert row["severity"] == "CRITICAL"
    assert "MQTT_PASSWORD_FILE" in row["remedy"]
    assert "broker_disconnected" in health(guarded)
    secret.write_text(SECRET, encoding="ascii")
    wait_until_well(guarded)


def test_a_password_file_that_goes_away_is_named_and_the_collector_goes_on(guarded: Rig) -> None:
    guarded.start(COLLECTOR)
    collector = guarded.programs[COLLECTOR]
    secret = Path(collector.environment["MQTT_PASSWORD_FILE"])
    secret.unlink()
    restart_broker(guarded)
    collector.wait_for_log(f"MQTT_PASSWORD_FILE={secret}: No such file")
    secret.write_bytes(b"\xff\xfe")
    collector.wait_for_log("codec can't decode")
    wait_until(
        lambda: str(secret) in health(guarded)["broker_disconnected"]["detail"], SOON_S, "so too"
    )
    secret.write_text(SECRET, encoding="ascii")
    wait_until_well(guarded)
    assert collector.log_text.count('"message": "started"') == 1


def test_a_session_that_the_broker_has_lost_is_a_warning_and_in_health(rig: Rig) -> None:
    rig.start(COLLECTOR)
    collector = rig.programs[COLLECTOR]
    assert "lost the session" not in collector.log_text
    assert rig.broker.stop()[0] == 0
    (rig.directory / "broker" / "mosquitto.db").unlink()
    rig.broker.start()
    row = wait_for_row(rig, "session_lost")
    assert "are gone" in row["detail"]
    assert "the last connection ended at" in row["detail"]
    assert row["severity"] == "WARNING"
    told = [line for line in collector.log_text.splitlines() if "has lost the session" in line]
    assert len(told) == 1
    assert '"WARNING"' in told[0]
    wait_until(lambda: set(health(rig)) == {"session_lost"}, SOON_S, "and it is connected again")
    assert "the MQTT session has changed" not in collector.log_text


def test_a_session_lost_while_the_collector_was_away_is_told_too(rig: Rig) -> None:
    rig.start(COLLECTOR)
    rig.publish(READINGS)
    rig.wait_until_spooled()
    assert rig.programs[COLLECTOR].stop()[0] == 0
    rig.publish(READINGS)
    assert rig.broker.stop()[0] == 0
    (rig.directory / "broker" / "mosquitto.db").unlink()
    rig.start(COLLECTOR)
    rig.programs[COLLECTOR].wait_for_log("has lost the session")
    row = wait_for_row(rig, "session_lost")
    assert "the last reading before it was received at 20" in row["detail"]
    assert rig.books.counter("spooled") == READINGS, "the broker had acknowledged the others"


def test_another_client_id_is_told_once_and_not_as_a_lost_session(rig: Rig) -> None:
    rig.start(COLLECTOR)
    collector = rig.programs[COLLECTOR]
    assert collector.stop()[0] == 0
    collector.environment["MQTT_CLIENT_ID"] = "another"
    rig.start(COLLECTOR)
    collector.wait_for_log('"message": "subscribed"')
    assert "the MQTT session has changed" in collector.log_text
    assert "lost the session" not in collector.log_text
    wait_until_well(rig)


def test_a_broker_that_grants_qos_0_only_is_in_health_until_it_does_better(rig: Rig) -> None:
    config = rig.directory / "broker" / "mosquitto.conf"
    strong = config.read_text(encoding="utf-8")
    config.write_text(f"{strong}\nmax_qos 0\n", encoding="utf-8")
    rig.start(COLLECTOR)
    assert "QoS 0 only" in wait_for_row(rig, "qos_granted")["detail"]
    # Also over a restart of the collector, which the broker's session survives.
    assert rig.programs[COLLECTOR].stop()[0] == 0
    assert not health(rig)
    rig.start(COLLECTOR)
    assert '"session_resumed": true' in rig.programs[COLLECTOR].log_text
    wait_for_row(rig, "qos_granted")
    config.write_text(strong, encoding="utf-8")
    assert rig.broker.stop()[0] == 0
    rig.broker.start()
    wait_until_well(rig)
