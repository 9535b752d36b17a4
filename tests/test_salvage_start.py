"""How the collector finds its spool at start: whole, damaged, half salvaged, or gone."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector.__main__ import _open_spool
from collector.store import SALVAGE_KEY
from lifecycle import SINKS, Settings, load_settings
from spool import (
    CorruptFileError,
    DiskFullError,
    NewReading,
    Salvage,
    SinkFile,
    SinkState,
    SpoolWriter,
    StorageFaultError,
    claim_environment,
    prepare_apart,
    set_aside,
    spool_path,
)
from tests.collector_parts import Logbook, deliver_through, logbook
from tests.test_spool_recovery import PAYLOAD as PADDED
from tests.test_spool_recovery import garble, pages_of_rows
from tests.test_spool_writer import edit, new_reading

ROWS = 2_000
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
    start.close()
    for path in (spool_path(start.directory), *start.directory.glob("spool.db-*")):
        path.unlink(missing_ok=True)
    start.damaged_files()[-1].unlink()
    _, salvage = start.open()
    assert salvage is not None
    assert len(copied(salvage)) == 5, "the second one of that second"


def test_a_spool_without_a_readable_header_is_copied_from_the_slowest_cursor_all_the_same(
    start: Start, book: Logbook
) -> None:
    epoch = start.fill()
    deliver_through(start.directory, 1_000, epoch, "pubsub")
    deliver_through(start.directory, 1_500, epoch, "bigquery")
    start.damage_header()
    writer, salvage = start.open()
    assert writer.epoch != epoch
    assert salvage is not None
    assert salvage.epoch == epoch
    assert seqs(copied(salvage)) == list(range(1_001, ROWS + 1))
    assert (salvage.readable, salvage.unreadable) == (ROWS - 1_000, 0)
    assert book.levels(SET_ASIDE) == ["CRITICAL"]
    assert len(start.damaged_files()) == 1


def test_a_read_error_that_passes_at_the_start_sets_nothing_aside(
    start: Start, book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = start.fill()
    real = SpoolWriter.open
    errors = [CorruptFileError("EIO", spool_path(start.directory))]

    def failing_once(directory: Path, **_: object) -> SpoolWriter:
        if errors:
            raise errors.pop()
        return real(directory)

    monkeypatch.setattr(SpoolWriter, "open", failing_once)
    writer, salvage = start.open()
    assert (writer.epoch, salvage) == (epoch, None)
    assert start.damaged_files() == []
    assert book.levels("opened once more") == ["WARNING"]
    assert book.lines("the spool is damaged") == []


@pytest.mark.parametrize("left", ["nothing", "no bytes"])
def test_a_log_whose_database_is_gone_is_set_aside_and_its_readings_are_copied(
    start: Start, book: Logbook, left: str
) -> None:
    writer = SpoolWriter.open(start.directory)
    writer.append([new_reading(n, payload=PADDED) for n in range(50)], [], {})
    log = start.directory / "spool.db-wal"
    content = log.read_bytes()
    writer.close()
    for path in start.directory.glob("spool.db*"):
        path.unlink()
    log.write_bytes(content)  # as a kill leaves it
    if left == "no bytes":
        spool_path(start.directory).touch()
    new, salvage = start.open()
    assert new.epoch != writer.epoch
    assert salvage is not None
    assert salvage.epoch == writer.epoch
    assert seqs(copied(salvage)) == list(range(1, 51))
    assert book.levels(SET_ASIDE) == ["CRITICAL"]
    (aside,) = start.damaged_files()
    assert aside.with_name(f"{aside.name}-wal").read_bytes() == content


def test_an_empty_file_without_a_log_is_a_new_spool(start: Start, book: Logbook) -> None:
    spool_path(start.directory).touch()
    (start.directory / "spool.db-wal").touch()
    _, salvage = start.open()
    assert salvage is None
    assert book.lines() == []


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

    def failing(_: Path, **_options: object) -> SpoolWriter:
        raise error

    monkeypatch.setattr(SpoolWriter, "open", failing)
    with pytest.raises(StorageFaultError):
        start.open()
    assert start.damaged_files() == []
    assert spool_path(start.directory).exists()


def test_what_was_taken_under_an_earlier_environment_is_not_copied(start: Start) -> None:
    start.fill(30)
    edit(
        spool_path(start.directory), "INSERT INTO meta (key, value) VALUES ('app_env_from_seq', 20)"
    )
    start.damage_schema()
    _, salvage = start.open()  # of a sink whose own file is gone, so that it has no cursor
    assert salvage is not None
    assert seqs(copied(salvage)) == list(range(21, 31))
