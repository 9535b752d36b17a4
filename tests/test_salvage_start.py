"""How the collector finds its spool at start: whole, damaged, half salvaged, or gone."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.__main__ import SINKS, _body, _open_spool
from collector.store import SALVAGE_KEY
from lifecycle import Settings, StopRequest, load_settings
from spool import (
    SPOOL_DAMAGED,
    CorruptFileError,
    DiskFullError,
    NewReading,
    Salvage,
    SinkFile,
    SinkState,
    SpoolWriter,
    StorageFaultError,
    WrongEnvironmentError,
    claim_environment,
    prepare_apart,
    set_aside,
    spool_path,
)
from tests.collector_parts import Logbook, deliver_through, logbook
from tests.test_spool_recovery import PAYLOAD as PADDED
from tests.test_spool_recovery import garble, pages_of_rows
from tests.test_spool_writer import edit, look, new_reading

ROWS = 2_000
COPIED = "what could be read of the damaged spool is in the new one"
SET_ASIDE = "the damaged spool was set aside, nothing was deleted"


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook() as opened:
        yield opened


class Start:
    """A spool's directory, and the collector's start on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opened: list[SpoolWriter] = []
        self._salvages: list[Salvage] = []

    def settings(self, **variables: str) -> Settings:
        environ = {"APP_ENV": "LOCAL", "SPOOL_DIR": str(self.directory)} | variables
        return load_settings(environ, "host")

    def open(self, **variables: str) -> tuple[SpoolWriter, Salvage | None]:
        settings = self.settings(**variables)
        sinks = [SinkFile(self.directory, s, enabled=s in settings.enabled_sinks) for s in SINKS]
        writer, salvage = _open_spool(settings, sinks)
        self.opened.append(writer)
        if salvage is not None:
            self._salvages.append(salvage)
        for sink in sinks:
            sink.close()
        return writer, salvage

    def fill(self, rows: int = ROWS, app_env: str = "LOCAL") -> str:
        """Make a spool of so many readings; return its epoch."""
        writer = SpoolWriter.open(self.directory)
        writer.append([new_reading(n, payload=PADDED) for n in range(rows)], [], {})
        writer.set_meta("app_env", app_env)
        writer.close()
        return writer.epoch

    def damage_header(self) -> None:
        with spool_path(self.directory).open("r+b") as file:
            file.write(b"not a database at all")

    def damage_page(self) -> None:
        """Garble a page in the middle, which only reading that far brings to light."""
        pages = pages_of_rows(spool_path(self.directory))
        garble(spool_path(self.directory), pages[len(pages) // 2])

    def damage_schema(self) -> None:
        """Change the mark of our files, so that the file is refused but can be read."""
        edit(spool_path(self.directory), "PRAGMA application_id=1")

    def damaged_files(self) -> list[Path]:
        found = sorted(self.directory.glob("spool.db.damaged-*"))
        return [path for path in found if not path.name.endswith(("-wal", "-shm"))]

    def close(self) -> None:
        for writer in self.opened:
            writer.close()
        for salvage in self._salvages:
            salvage.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made = Start(tmp_path)
    yield made
    made.close()


def copied(salvage: Salvage) -> list[NewReading]:
    rows: list[NewReading] = []
    while not salvage.done:
        rows += salvage.step()
    return rows


def seqs(rows: list[NewReading]) -> list[int]:
    """Return which readings these are, counted from 1 like the numbers that they had."""
    known = {new_reading(n, payload=PADDED)[0]: n + 1 for n in range(ROWS)}
    return [known[row[0]] for row in rows]


def test_the_first_start_of_all_is_silent(start: Start, book: Logbook) -> None:
    writer, salvage = start.open()
    assert (writer.last_seq(), salvage) == (0, None)
    assert writer.meta(SALVAGE_KEY) == ""
    assert book.lines() == []


def test_a_whole_spool_is_opened_as_it_is(start: Start, book: Logbook) -> None:
    epoch = start.fill()
    writer, salvage = start.open()
    assert (writer.epoch, salvage) == (epoch, None)
    assert writer.last_seq() == ROWS
    assert book.lines() == []


def test_a_damaged_spool_is_set_aside_and_copied_from_the_slowest_enabled_cursor(
    start: Start, book: Logbook
) -> None:
    epoch = start.fill()
    deliver_through(start.directory, 1_700, epoch, "pubsub")
    deliver_through(start.directory, 1_200, epoch, "bigquery")
    start.damage_schema()
    writer, salvage = start.open()
    assert writer.epoch != epoch
    assert writer.last_seq() == 0
    assert salvage is not None
    assert [salvage.path] == start.damaged_files()
    assert writer.meta(SALVAGE_KEY) == salvage.position() != ""
    assert seqs(copied(salvage)) == list(range(1_201, ROWS + 1))
    assert book.levels("the spool is damaged") == ["CRITICAL"]
    assert book.levels(SET_ASIDE) == ["CRITICAL"]
    assert book.values(SET_ASIDE) == [{"file": str(salvage.path)}]


def test_a_disabled_sink_makes_nobody_copy_more(start: Start) -> None:
    epoch = start.fill()
    deliver_through(start.directory, 1_700, epoch, "pubsub")
    deliver_through(start.directory, 12, epoch, "bigquery")
    start.damage_schema()
    _, salvage = start.open(BIGQUERY_ENABLED="false")
    assert salvage is not None
    assert seqs(copied(salvage)) == list(range(1_701, ROWS + 1))


@pytest.mark.parametrize("other", ["no file", "another epoch", "no sink enabled"])
def test_everything_is_copied_where_a_sink_may_need_it_all(start: Start, other: str) -> None:
    epoch = start.fill()
    deliver_through(start.directory, 1_700, epoch, "pubsub")
    if other == "another epoch":
        deliver_through(start.directory, 1_900, "another", "bigquery")
    start.damage_schema()
    none = {"PUBSUB_ENABLED": "false", "BIGQUERY_ENABLED": "false"}
    _, salvage = start.open(**(none if other == "no sink enabled" else {}))
    assert salvage is not None
    assert seqs(copied(salvage)) == list(range(1, ROWS + 1))


def test_a_copy_is_taken_up_again_after_a_restart_where_the_spool_says(
    start: Start, book: Logbook
) -> None:
    start.fill()
    start.damage_schema()
    writer, salvage = start.open()
    assert salvage is not None
    first = salvage.step()
    writer.append(first, (), {}, meta={SALVAGE_KEY: salvage.position()})
    salvage.step()  # this one was not stored
    epoch = writer.epoch
    start.close()
    book.records.clear()
    # A cursor that has moved since belongs to the new spool, and moves nothing in the old one.
    deliver_through(start.directory, 500, epoch, "pubsub")
    again, resumed = start.open()
    assert resumed is not None
    assert (again.epoch, resumed.path) == (epoch, salvage.path)
    assert seqs(first) + seqs(copied(resumed)) == list(range(1, ROWS + 1))
    assert book.lines() == []
    again.set_meta(SALVAGE_KEY, resumed.position())
    start.close()
    _, nothing_left = start.open()
    assert nothing_left is None


def test_a_start_that_was_killed_before_the_new_file_was_made_copies_all_the_same(
    start: Start, book: Logbook
) -> None:
    start.fill()
    aside = set_aside(spool_path(start.directory))
    writer, salvage = start.open()
    assert writer.last_seq() == 0
    assert salvage is not None
    assert salvage.path == aside
    assert seqs(copied(salvage)) == list(range(1, ROWS + 1))
    assert book.lines("was not there") == []


def test_a_start_that_was_killed_just_after_it_made_the_new_file_copies_all_the_same(
    start: Start,
) -> None:
    start.fill()
    aside = set_aside(spool_path(start.directory))
    prepare_apart(start.directory, os.environ)
    writer, salvage = start.open()
    assert writer.last_seq() == 0
    assert salvage is not None
    assert salvage.path == aside
    assert seqs(copied(salvage)) == list(range(1, ROWS + 1))


def test_of_several_damaged_files_the_last_one_is_copied(start: Start) -> None:
    for rows, now_s in ((3, 0), (4, 86_400), (5, 86_400)):
        start.fill(rows)
        set_aside(spool_path(start.directory), now_s=now_s)
    start.fill(6)
    start.damage_schema()
    _, salvage = start.open()
    assert salvage is not None
    assert len(copied(salvage)) == 6
    assert len(start.damaged_files()) == 4
    spool_path(start.directory).unlink()
    start.damaged_files()[-1].unlink()
    _, salvage = start.open()
    assert salvage is not None
    assert len(copied(salvage)) == 5, "the second one of that second"


def test_a_spool_without_a_readable_header_is_set_aside_and_begun_anew(
    start: Start, book: Logbook
) -> None:
    epoch = start.fill()
    deliver_through(start.directory, 1_000, epoch, "pubsub")
    start.damage_header()
    writer, salvage = start.open()
    assert writer.epoch != epoch
    assert salvage is not None
    assert salvage.done
    assert book.levels(SET_ASIDE) == ["CRITICAL"]
    assert len(start.damaged_files()) == 1


def test_a_spool_that_is_gone_is_told_of_where_forwarders_have_worked_on_one(
    start: Start, book: Logbook
) -> None:
    epoch = start.fill()
    deliver_through(start.directory, 5, epoch, "bigquery")
    for path in start.directory.glob("spool.db*"):
        path.unlink()
    writer, salvage = start.open()
    assert (writer.last_seq(), salvage) == (0, None)
    assert writer.epoch != epoch
    assert book.levels("spool.db was not there") == ["CRITICAL"]
    assert "still in it" in book.lines("spool.db was not there")[0]
    claim_environment(writer, "LOCAL", [])
    start.close()
    book.records.clear()
    start.open()
    assert book.lines() == [], "it is there now"


def test_forwarders_that_were_there_first_are_no_reason_for_an_alarm(
    start: Start, book: Logbook
) -> None:
    SinkState.open(start.directory, "pubsub").close()
    start.open()
    assert book.lines() == []


@pytest.mark.parametrize("error", [StorageFaultError("EMFILE"), DiskFullError("full")])
def test_a_spool_that_cannot_be_opened_is_not_set_aside(
    start: Start, monkeypatch: pytest.MonkeyPatch, error: StorageFaultError
) -> None:
    start.fill()

    def failing(_: Path) -> SpoolWriter:
        raise error

    monkeypatch.setattr(SpoolWriter, "open", failing)
    with pytest.raises(StorageFaultError):
        start.open()
    assert start.damaged_files() == []
    assert spool_path(start.directory).exists()


# The whole body, with a broker that refuses every connection.


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
