"""The ids of a gate: kept over a change of the host name, and told when they are changed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.identity import KeptIdentity
from lifecycle import (
    Identity,
    SessionId,
    Settings,
    load_settings,
    read_identity,
    write_identity,
)
from lifecycle.identity import FORMER_SESSIONS_MAX, IDENTITY_FILE
from tests.collector_parts import Logbook, logbook

OLD = SessionId("sluice-old", "localhost", 1883)
MOVED = "MQTT session has changed"


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook("collector") as opened:
        yield opened


def settings(directory: Path, host_name: str, **variables: str) -> Settings:
    return load_settings({"APP_ENV": "LOCAL", "SPOOL_DIR": str(directory), **variables}, host_name)


def started(
    directory: Path, host_name: str, *, noted: SessionId | None = None, **variables: str
) -> KeptIdentity:
    """Return the identity as a collector's start has it."""
    remembered = [] if noted is None else [noted.broker, noted.port, noted.client_id, "a/#"]
    return KeptIdentity(
        settings(directory, host_name, **variables), remembered, chosen=bool(variables)
    )


def test_the_first_ids_follow_the_host_name_and_then_no_longer(tmp_path: Path) -> None:
    first = started(tmp_path, "old").settings
    assert (first.instance_id, first.mqtt_client_id) == ("old", "sluice-old")
    renamed = settings(tmp_path, "new")
    assert (renamed.instance_id, renamed.mqtt_client_id) == ("old", "sluice-old")
    assert (tmp_path / IDENTITY_FILE).stat().st_mode & 0o077 in {0o040, 0o044}


def test_every_program_has_the_ids_that_the_collector_keeps(tmp_path: Path) -> None:
    started(tmp_path, "old", MQTT_CLIENT_ID="mine").subscribed()
    assert settings(tmp_path, "new").instance_id == "old"
    assert settings(tmp_path, "new").mqtt_client_id == "mine", "what is no longer set stays"


def test_what_is_set_is_obeyed_and_the_old_session_is_named(tmp_path: Path, book: Logbook) -> None:
    started(tmp_path, "old").subscribed()
    changed = started(tmp_path, "old", MQTT_CLIENT_ID="new", MQTT_BROKER="far", MQTT_PORT="8883")
    assert changed.settings.mqtt_client_id == "new"
    (told,) = book.values(MOVED)
    assert (told["old_client_id"], told["old_broker"]) == ("sluice-old", "localhost:1883")
    assert (told["client_id"], told["broker"]) == ("new", "far:8883")
    assert "MQTT_CLIENT_ID=sluice-old, MQTT_BROKER=localhost, MQTT_PORT=1883" in str(told["remedy"])
    started(tmp_path, "old", MQTT_CLIENT_ID="new", MQTT_BROKER="far", MQTT_PORT="8883")
    assert len(book.values(MOVED)) == 2, "told until the broker grants the new session"
    changed.subscribed()
    started(tmp_path, "old", MQTT_CLIENT_ID="new", MQTT_BROKER="far", MQTT_PORT="8883")
    assert len(book.values(MOVED)) == 2
    kept = read_identity(tmp_path)
    assert kept is not None
    assert kept.former == (OLD,)


def test_another_instance_has_another_session_also_after_a_start_without_a_broker(
    tmp_path: Path, book: Logbook
) -> None:
    started(tmp_path, "old").subscribed()
    for _ in range(2):
        changed = started(tmp_path, "old", INSTANCE_ID="plant-7")
        assert changed.settings.mqtt_client_id == "sluice-plant-7"
    assert book.values("INSTANCE_ID has changed") == 2 * [{"before": "old", "now": "plant-7"}]
    assert len(book.values(MOVED)) == 2
    changed.subscribed()
    assert settings(tmp_path, "new").mqtt_client_id == "sluice-plant-7"
    assert settings(tmp_path, "new").instance_id == "plant-7"


def test_an_instance_that_keeps_its_client_id_has_the_same_session(
    tmp_path: Path, book: Logbook
) -> None:
    started(tmp_path, "old").subscribed()
    started(tmp_path, "old", INSTANCE_ID="plant-7", MQTT_CLIENT_ID="sluice-old")
    assert book.values(MOVED) == []
    assert settings(tmp_path, "new").instance_id == "plant-7"
    assert settings(tmp_path, "new").mqtt_client_id == "sluice-old"


def test_the_session_of_an_earlier_release_is_kept(tmp_path: Path, book: Logbook) -> None:
    adopted = started(tmp_path, "new", noted=OLD).settings
    assert (adopted.instance_id, adopted.mqtt_client_id) == ("old", "sluice-old")
    assert len(book.values("ids of the last run are kept")) == 1
    assert settings(tmp_path, "newer").mqtt_client_id == "sluice-old"


def test_a_client_id_that_names_no_instance_leaves_that_to_the_host(tmp_path: Path) -> None:
    noted = SessionId("mine", "localhost", 1883)
    adopted = started(tmp_path, "host", noted=noted).settings
    assert (adopted.instance_id, adopted.mqtt_client_id) == ("host", "mine")


def test_what_is_set_is_obeyed_also_after_an_earlier_release(tmp_path: Path, book: Logbook) -> None:
    changed = started(tmp_path, "new", noted=OLD, MQTT_CLIENT_ID="chosen")
    assert changed.settings.mqtt_client_id == "chosen"
    assert [v["old_client_id"] for v in book.values(MOVED)] == ["sluice-old"]


def test_a_session_that_only_the_spool_has_noted_is_no_change(
    tmp_path: Path, book: Logbook
) -> None:
    """The file could not be written when the session began (a full disk)."""
    write_identity(tmp_path, Identity(instance_id="old", session=OLD))
    noted = SessionId("chosen", "localhost", 1883)
    started(tmp_path, "old", noted=noted, MQTT_CLIENT_ID="chosen")
    assert book.values(MOVED) == []
    kept = read_identity(tmp_path)
    assert kept == Identity(instance_id="old", session=noted, former=(OLD,))


def test_former_sessions_are_a_short_list_without_repetitions() -> None:
    identity = Identity(instance_id="gate")
    for number in (*range(20), 15):
        identity = identity.moved_to(SessionId(f"c{number}", "localhost", 1883))
    assert [s.client_id for s in identity.former] == [
        f"c{n}" for n in (11, 12, 13, 14, 16, 17, 18, 19)
    ]
    assert len(identity.former) == FORMER_SESSIONS_MAX
    assert identity.moved_to(SessionId("c15", "localhost", 1883)) == identity


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0" * 200,
        b"[]",
        b'{"instance_id": "-bad"}',
        b'{"instance_id": "a", "session": {"client_id": "", "broker": "b", "port": 1}}',
    ],
)
def test_a_file_that_cannot_be_read_stops_no_start(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / IDENTITY_FILE).write_bytes(garbage)
    assert read_identity(tmp_path) is None
    assert started(tmp_path, "host", noted=OLD).settings.mqtt_client_id == "sluice-old"
    assert read_identity(tmp_path) == Identity(instance_id="old", session=OLD)


def test_a_full_disk_stops_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, book: Logbook
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lifecycle.identity.os.fsync", full)
    started(tmp_path, "host").subscribed()
    assert book.levels("cannot keep the identity") == ["WARNING", "WARNING"]
    assert [*tmp_path.iterdir()] == []


def test_an_id_that_ends_in_a_new_line_is_none(tmp_path: Path) -> None:
    """It would end in the client id and in every row."""
    (tmp_path / IDENTITY_FILE).write_text('{"instance_id": "gate\\n"}')
    assert read_identity(tmp_path) is None
    (tmp_path / IDENTITY_FILE).write_text('{"instance_id": "gate"}')
    assert read_identity(tmp_path) is not None
