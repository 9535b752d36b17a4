"""The whole collector on a damaged spool: looked at twice, set aside, copied, never mixed.

The broker refuses every connection.
"""

import socket
from collections.abc import Iterator

import pytest

from collector.__main__ import _body
from collector.store import SALVAGE_KEY
from lifecycle import SINKS, StopRequest
from spool import (
    SPOOL_DAMAGED,
    CorruptFileError,
    NewReading,
    SinkState,
    SpoolWriter,
    StorageFaultError,
    WrongEnvironmentError,
    spool_path,
)
from tests.collector_parts import Logbook, deliver_through
from tests.test_salvage_start import ROWS, SET_ASIDE, Start, book, seqs, start
from tests.test_spool_writer import edit, look

__all__ = ["book", "start"]

COPIED = "what could be read of the damaged spool is in the new one"


@pytest.fixture
def no_broker() -> Iterator[str]:
    """A port that is taken but that nobody listens on."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield str(holder.getsockname()[1])


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    made = StopRequest()
    yield made
    made.close()


def on_disk(start: Start) -> list[NewReading]:
    columns = "event_id, received_us, timestamp_us, site_code, sensor_id, pi_tag, value, topic"
    sql = f"SELECT {columns}, payload, crc FROM reading_row ORDER BY seq"  # noqa: S608
    return look(spool_path(start.directory), sql)  # type: ignore[return-value]


def run_body(start: Start, stop: StopRequest, port: str, **variables: str) -> None:
    where = {"MQTT_BROKER": "127.0.0.1", "MQTT_PORT": port}
    _body(start.settings(**where, **variables), stop)


@pytest.mark.parametrize("window", ["10", "100000"])
def test_damage_that_shows_later_is_set_aside_by_its_owner_and_copied_at_the_next_start(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook, window: str
) -> None:
    start.fill()
    start.damage_page()
    state = SinkState.open(start.directory, "pubsub")
    state.set_status(SPOOL_DAMAGED, "a forwarder could not read it")
    state.close()
    with pytest.raises(CorruptFileError):
        run_body(start, stop, no_broker, DEDUP_WINDOW=window)
    # A large window is read at the start; else it is the forwarder's word that shows it.
    assert stop.requested is (window == "10")
    assert start.damaged_files() == [], "it may have been a read error that passes"
    assert spool_path(start.directory).exists()
    # supervisord starts it again.
    second = StopRequest()
    with pytest.raises(CorruptFileError):
        run_body(start, second, no_broker, DEDUP_WINDOW=window)
    second.close()
    (damaged,) = start.damaged_files()
    assert not spool_path(start.directory).exists()
    assert book.values(SET_ASIDE) == [{"file": str(damaged)}]
    # supervisord starts it again.
    again = StopRequest()
    book.when(COPIED, lambda: again.request("all is copied"))
    run_body(start, again, no_broker)
    again.close()
    (told,) = book.values(COPIED)
    rows = on_disk(start)
    lost = sorted(set(range(1, ROWS + 1)) - set(seqs(rows)))
    assert 0 < len(lost) < 30
    assert told == {
        "file": str(damaged),
        "salvaged_rows": ROWS - len(lost),
        "damaged_rows": len(lost),
    }
    assert len(set(seqs(rows))) == len(rows)


def test_a_read_error_that_passes_while_it_runs_sets_nothing_aside(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = start.fill()
    real = SpoolWriter.tail_event_ids
    errors = [CorruptFileError("EIO", spool_path(start.directory))]

    def failing_once(self: SpoolWriter, count: int) -> list[bytes]:
        if errors:
            raise errors.pop()
        return real(self, count)

    monkeypatch.setattr(SpoolWriter, "tail_event_ids", failing_once)
    with pytest.raises(CorruptFileError):
        run_body(start, stop, no_broker)
    again = StopRequest()
    book.when("cannot reach the broker", lambda: again.request("SIGTERM"))
    run_body(start, again, no_broker)
    again.close()
    assert start.damaged_files() == []
    assert len(on_disk(start)) == ROWS
    ((found,),) = look(spool_path(start.directory), "SELECT value FROM meta WHERE key='epoch'")
    assert found == epoch


def test_damage_is_not_believed_while_no_mark_of_it_can_be_made(
    start: Start, stop: StopRequest, no_broker: str
) -> None:
    start.fill()
    start.damage_page()
    mark = start.directory / "spool.db.suspected"
    mark.mkdir()
    for _ in range(2):
        with pytest.raises(StorageFaultError, match=r"is damaged.*to note that in .*suspected"):
            run_body(start, stop, no_broker)
    assert start.damaged_files() == []
    mark.rmdir()
    for _ in range(2):
        with pytest.raises(CorruptFileError):
            run_body(start, stop, no_broker)
    assert len(start.damaged_files()) == 1


@pytest.mark.parametrize("damage", ["schema", "schema and header"])
def test_the_salvage_of_another_environments_readings_refuses_the_start_until_it_is_set_again(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook, damage: str
) -> None:
    start.fill(30, app_env="PRD")
    start.damage_schema()
    if "header" in damage:
        start.damage_header()
    for _ in range(2):  # the second one finds the salvage under way
        with pytest.raises(WrongEnvironmentError, match=r"under PRD .*30 for pubsub"):
            run_body(start, stop, no_broker)
    assert on_disk(start) == []
    again = StopRequest()
    book.when(COPIED, lambda: again.request("all is copied"))
    cloud = {"GCP_PROJECT_ID": "project-1", "PUBSUB_TOPIC": "topic", "BIGQUERY_DATASET": "set"}
    run_body(start, again, no_broker, APP_ENV="PRD", BIGQUERY_TABLE="rows", **cloud)
    again.close()
    assert len(on_disk(start)) == 30
    # And then the guard of the new file itself.
    with pytest.raises(WrongEnvironmentError):
        run_body(start, stop, no_broker)


def test_another_environments_readings_that_every_sink_has_refuse_nothing(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook
) -> None:
    epoch = start.fill(30, app_env="PRD")
    for sink in SINKS:
        deliver_through(start.directory, 30, epoch, sink)
    start.damage_schema()
    book.when(COPIED, lambda: stop.request("all is copied"))
    run_body(start, stop, no_broker)
    assert on_disk(start) == []


def test_an_environment_that_cannot_be_read_counts_as_the_present_one_and_that_is_told(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook
) -> None:
    start.fill(30, app_env="PRD")
    edit(spool_path(start.directory), "DELETE FROM meta WHERE key='app_env'")
    start.damage_schema()
    book.when(COPIED, lambda: stop.request("all is copied"))
    run_body(start, stop, no_broker)
    assert len(on_disk(start)) == 30
    assert book.levels("which APP_ENV the damaged spool") == ["CRITICAL"]


def test_a_spool_that_is_damaged_while_it_takes_over_another_leaves_nothing_of_either(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook
) -> None:
    start.fill()
    start.damage_schema()
    writer, salvage = start.open()
    assert salvage is not None
    writer.append(salvage.step(), (), {}, meta={SALVAGE_KEY: salvage.position()})
    start.close()
    start.damage_header()

    def stop_after_both() -> None:
        if len(book.lines(COPIED)) == 2:
            stop.request("both are copied")

    book.when(COPIED, stop_after_both)
    run_body(start, stop, no_broker)
    assert sorted(seqs(on_disk(start))) == list(range(1, ROWS + 1))
    first, second = start.damaged_files()
    assert [told["file"] for told in book.values(COPIED)] == [str(second), str(first)]
    assert look(spool_path(start.directory), "SELECT value FROM meta WHERE key='salvage'") == [
        ("",)
    ]


def test_a_start_and_stop_without_a_broker_is_clean(
    start: Start, stop: StopRequest, no_broker: str, book: Logbook
) -> None:
    book.when("cannot reach the broker", lambda: stop.request("SIGTERM"))
    run_body(start, stop, no_broker)
    assert len(book.lines("cannot reach the broker")) == 1
    assert look(spool_path(start.directory), "SELECT value FROM meta WHERE key='app_env'") == [
        ("LOCAL",)
    ]
    shown = look(spool_path(start.directory), "SELECT sink, state FROM backlog")
    assert shown == [("bigquery", "no file"), ("pubsub", "no file")]


def test_another_environments_readings_refuse_the_start(
    start: Start, stop: StopRequest, no_broker: str
) -> None:
    start.fill(3, app_env="PRD")
    with pytest.raises(WrongEnvironmentError):
        run_body(start, stop, no_broker)
    assert len(on_disk(start)) == 3
