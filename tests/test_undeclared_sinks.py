"""One list of sinks; and a sink's file that is not on it holds pruning, and says so."""

import configparser
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from forwarder.registry import BUILDERS
from lifecycle import SINKS, Settings
from spool import SinkFiles, SinkState, connection, sink_path
from spool.progress import UNDECLARED
from spool.retention import FEW_EACH_S
from tests.collector_parts import Logbook, deliver_through, logbook
from tests.harness import FORWARDERS, Rig, wait_until
from tests.house import HOUR_US, House, house_maker
from tests.test_spool_writer import look

ROOT = Path(__file__).parent.parent
WARNING = "undeclared sink file holds pruning"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with house_maker(tmp_path) as make:
        yield make()


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook() as opened:
        yield opened


def shown(house: House) -> dict[object, tuple[object, ...]]:
    rows = look(house.directory / "spool.db", "SELECT sink, pending, state, detail FROM backlog")
    return {row[0]: row[1:] for row in rows}


def filled(house: House) -> None:
    """Ten readings that every declared sink has, and that no retention keeps."""
    house.fill(10)
    house.now_us = HOUR_US + 1
    house.deliver(10)


def test_there_is_one_list_of_sinks() -> None:
    assert SINKS == ("pubsub", "bigquery")
    assert tuple(BUILDERS) == SINKS
    assert all(f"{sink}_enabled" in Settings.__struct_fields__ for sink in SINKS)
    config = configparser.RawConfigParser()
    config.read(ROOT / "supervisord.conf")
    programs = {s.partition(":")[2] for s in config.sections() if s.startswith("program:")}
    assert programs == {"collector", *FORWARDERS}


def test_no_other_list_of_sinks_is_written_down() -> None:
    """A forgotten second list let readings be pruned that a new sink had not read."""
    packages = ("collector", "forwarder", "lifecycle", "spool", "demo", "bench", "tests/harness")
    listed = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if '"pubsub", "bigquery"' in path.read_text(encoding="utf-8")
    }
    # What kinds of a service the benchmarks can stand in for.
    assert listed <= {"bench/distant.py"}


def test_a_copy_in_the_making_makes_the_writer_wait_for_nothing_and_holds_nothing_afterwards(
    house: House,
) -> None:
    filled(house)
    copy = house.directory / "copy.db"
    shutil.copy(house.directory / "spool.db", copy)
    with closing(sqlite3.connect(copy, isolation_level=None)) as copying:
        copying.execute("PRAGMA journal_mode=DELETE")
        copying.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        house.turn(1.0)
        house.turn(1.0)
        assert time.monotonic() - begun < connection.BUSY_TIMEOUT_S / 2
        assert shown(house)["copy"][1] == "unreadable"
        (condition,) = look(house.directory / "spool.db", "SELECT name, detail FROM condition")
        assert condition == ("undeclared_sink", "nothing is pruned behind the cursor of copy")
        copying.execute("ROLLBACK")
    # It is a spool's copy, and no sink's file.
    house.turn(1.0)
    house.turn(1.0)
    assert "copy" not in shown(house)
    assert look(house.directory / "spool.db", "SELECT * FROM condition") == []


def test_a_sinks_file_that_is_not_declared_holds_pruning_at_its_cursor(
    house: House, book: Logbook
) -> None:
    filled(house)
    deliver_through(house.directory, 4, house.writer.epoch, "toy")
    house.turn()
    assert house.left == (5, 10)
    assert not house.keeping.make_room(house.writer, drop_oldest=False)
    pending, state, detail = shown(house)["toy"]
    assert (pending, state) == (6, UNDECLARED)
    assert f"mv {house.directory / 'toy.db'}*" in str(detail)
    (values,) = book.values(WARNING)
    assert (values["sink"], values["cursor_seq"]) == ("toy", 4)
    deliver_through(house.directory, 9, house.writer.epoch, "toy")
    house.turn(FEW_EACH_S)
    assert house.left == (10, 10)
    house.turn(60.0)
    assert len(book.values(WARNING)) == 1
    house.turn(3600.0)
    assert len(book.values(WARNING)) == 2


def test_a_new_sinks_file_without_a_cursor_holds_everything(house: House) -> None:
    filled(house)
    SinkState.open(house.directory, "toy").close()
    house.turn()
    assert house.left == (1, 10)
    assert shown(house)["toy"][:2] == (10, UNDECLARED)


def test_what_is_moved_away_holds_nothing_and_leaves_the_backlog(
    house: House, book: Logbook
) -> None:
    filled(house)
    house.turn()
    house.fill(10)
    house.deliver(20)
    copy = house.directory / "pubsub-old.db"
    shutil.copy(sink_path(house.directory, "pubsub"), copy)
    house.turn(1.0)
    assert "pubsub-old" in shown(house)
    for path in house.directory.glob("pubsub-old.db*"):
        path.unlink()
    house.turn(FEW_EACH_S)
    assert house.left == (21, 20)
    assert {*shown(house)} == {*SINKS}
    shutil.copy(sink_path(house.directory, "pubsub"), copy)
    house.turn(1.0)
    assert len(book.values(WARNING)) == 2, "it is there again, so it is told again"


def test_the_backlog_forgets_a_sink_also_while_readings_come(house: House) -> None:
    filled(house)
    SinkState.open(house.directory, "toy").close()
    house.turn()
    sink_path(house.directory, "toy").unlink()
    house.clock.now_s += 1.0
    house.keeping._read_progress(house.clock.now_s)  # noqa: SLF001 - as a turn does
    house.writer.append([], [], {"received": 1}, house.keeping.progress_if_due())
    assert {*shown(house)} == {*SINKS}


def _another_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("CREATE TABLE cursor (id)")
        conn.commit()


def _ours_but_no_sink(path: Path) -> None:
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(f"PRAGMA application_id={0x536C7563}")
        conn.execute("CREATE TABLE request (id)")
        conn.commit()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("operator.db", _ours_but_no_sink),
        ("other.db", _another_database),
        ("notes.db", lambda path: path.write_text("no database, but text\n" * 100)),
        ("empty.db", lambda path: path.touch()),
    ],
)
def test_other_files_hold_nothing(
    name: str, make: Callable[[Path], object], house: House, book: Logbook
) -> None:
    make(house.directory / name)
    filled(house)
    for _ in range(3):
        house.turn(1.0)
    assert house.left == (11, 10)
    assert book.lines(WARNING) == []
    assert {*shown(house)} == {*SINKS}


@pytest.mark.parametrize("name", ["pubsub.db.bak", "pubsub.db.damaged-20260101T000000Z", "pubsub"])
def test_copies_under_other_names_hold_nothing(name: str, house: House) -> None:
    filled(house)
    state = SinkState.open(house.directory, "toy")
    state.close()
    sink_path(house.directory, "toy").rename(house.directory / name)
    house.turn()
    assert house.left == (11, 10)


def test_an_undeclared_file_that_cannot_be_read_holds_everything(
    house: House, book: Logbook
) -> None:
    filled(house)
    deliver_through(house.directory, 10, house.writer.epoch, "toy")
    path = sink_path(house.directory, "toy")
    content = bytearray(path.read_bytes())
    content[100:200] = b"\xff" * 100  # the schema's page; the header is whole
    path.write_bytes(content)
    for side in ("-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    house.turn()
    assert house.left == (1, 10)
    assert shown(house)["toy"][1] == "unreadable"
    assert len(book.lines(WARNING)) == 1


def test_a_directory_that_cannot_be_listed_lets_no_known_file_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SinkState.open(tmp_path, "toy").close()
    files = SinkFiles(tmp_path, {"pubsub": True})
    assert [f.read().sink for f in files] == ["pubsub", "toy"]

    def fail(_: object) -> list[Path]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "iterdir", fail)
    assert [f.read().sink for f in files] == ["pubsub", "toy"]


def test_a_file_that_is_just_being_made_is_looked_at_again(tmp_path: Path) -> None:
    """Its tables are in the log at first: the file itself does not change when they come."""
    path = tmp_path / "toy.db"
    files = SinkFiles(tmp_path, {})
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
        assert [*files] == []
        state = SinkState.open(tmp_path, "toy")
        assert len([*files]) == 1
        state.close()


def test_the_collector_keeps_what_a_sink_that_it_does_not_know_has_not_read() -> None:
    """A toy sink's file is there, the collector of this release has never heard of it."""
    with Rig(SPOOL_RETENTION_HOURS="0") as rig:
        SinkState.open(rig.spool_dir, "toy").close()
        rig.start()
        rig.publish(50)
        rig.wait_until_delivered()
        wait_until(
            lambda: all(rig.books.backlog(s)["pending"] == 0 for s in rig.sinks),
            20.0,
            "the collector has seen that both sinks have everything",
        )
        rig.publish(1)  # what would be pruned leaves with the next batch at the latest
        rig.wait_until_delivered()
        assert rig.books.backlog("toy")["state"] == UNDECLARED
        assert rig.books.rows("spool", "SELECT min(seq), max(seq) FROM reading_row") == [(1, 51)]
        assert WARNING in rig.programs["collector"].log_text
        for path in rig.spool_dir.glob("toy.db*"):
            path.unlink()
        wait_until(
            lambda: rig.books.rows("spool", "SELECT count(*) FROM reading_row") == [(0,)],
            20.0,
            "without the file everything is pruned",
        )
