"""A commit changes as few pages as can be, and numbers are given once, also after an upgrade."""

import subprocess
from pathlib import Path

import pytest
from sqlite_utils import Database

from spool import CorruptFileError, SpoolReader, SpoolWriter, StorageFaultError, spool_path
from spool.connection import open_owner
from spool.insertion import ADD_COUNTER
from spool.locks import begin, commit
from spool.migrations import spool_migrations
from spool.records import READING_COLUMNS
from tests.harness.wal import commits
from tests.test_spool_writer import edit, look, new_reading


def test_a_commit_of_few_readings_changes_their_page_and_the_counters(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(0)], [], {"received": 1, "spooled": 1})
    writer.checkpoint()
    for number in range(1, 5):
        writer.append([new_reading(number)], [], {"received": 1, "spooled": 1})
    made = commits(writer.path)
    assert len(made) == 4
    assert {len(pages) for pages in made} == {2}
    assert len({page for pages in made for page in pages}) == 2
    writer.close()


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A spool of the release before, of whose 5 readings the last 2 are there."""
    conn = open_owner(spool_path(tmp_path))
    begin(conn)
    spool_migrations.apply(Database(conn, execute_plugins=False), stop_before="4")
    conn.execute("INSERT INTO meta VALUES ('epoch', 'E'), ('app_env', 'DEV')")
    marks = ",".join("?" * len(READING_COLUMNS.split(",")))
    conn.executemany(
        f"INSERT INTO reading_row ({READING_COLUMNS}) VALUES ({marks})",  # noqa: S608 - our own constants
        [new_reading(number) for number in range(5)],
    )
    conn.execute("DELETE FROM reading_row WHERE seq <= 3")
    conn.execute(ADD_COUNTER, ("spooled", 5))
    commit(conn)
    conn.close()
    return tmp_path


def test_a_spool_of_the_release_before_goes_on_with_its_numbers(older: Path) -> None:
    reader = SpoolReader.open(older)  # a forwarder may be there before its collector
    assert reader.last_seq() == 5
    writer = SpoolWriter.open(older)
    assert (writer.epoch, writer.last_seq()) == ("E", 5)
    writer.append([new_reading(7)], [], {})
    assert reader.last_seq() == 6
    assert [row[0] for row in reader.read_after(3, 10, 10**9)] == [4, 5, 6]
    assert look(writer.path, "PRAGMA integrity_check") == [("ok",)]
    writer.checkpoint()
    writer.append([new_reading(8)], [], {})
    assert [len(pages) for pages in commits(writer.path)] == [2]
    reader.close()
    writer.close()


def test_a_forwarder_of_the_release_before_passes_no_reading(older: Path) -> None:
    # What it asks a spool whose collector has been upgraded under it.
    writer = SpoolWriter.open(older)
    writer.append([new_reading(7)], [], {})
    ((last_seq,),) = look(writer.path, "SELECT seq FROM sqlite_sequence WHERE name = 'reading_row'")
    assert last_seq == 5, "it takes seq 6 for damage, and ends; above 6 it would note a gap"
    writer.close()


def test_an_emptied_spool_gives_no_number_again(older: Path) -> None:
    writer = SpoolWriter.open(older)
    assert writer.delete_through(5, "pruned") == 2
    writer.close()
    writer = SpoolWriter.open(older)
    assert (writer.first_seq(), writer.last_seq()) == (6, 5)
    writer.append([new_reading(9)], [], {})
    assert look(writer.path, "SELECT seq FROM reading_row") == [(6,)]
    writer.close()


def test_a_batch_that_fails_takes_no_number(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(1)], [], {})
    damaged = (b"short", *new_reading(2)[1:])
    with pytest.raises(StorageFaultError, match="CHECK"):
        writer.append([new_reading(3), damaged], [], {})
    writer.append([new_reading(4)] * 120, [], {})  # fifty in one statement, and the rest
    assert look(writer.path, "SELECT count(*), min(seq), max(seq) FROM reading_row") == [
        (121, 1, 121)
    ]
    assert writer.last_seq() == 121
    writer.close()


def test_a_number_that_is_there_already_is_found_to_be_damage(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(1)], [], {})
    edit(writer.path, "UPDATE reading_row SET seq = 2")  # while the collector runs
    with pytest.raises(StorageFaultError):
        writer.append([new_reading(2)], [], {})
    writer.close()
    with pytest.raises(CorruptFileError):  # after which the file is set aside, and read
        SpoolWriter.open(tmp_path)


def test_a_file_of_the_release_before_gets_small_pages_by_the_command_in_the_docs(
    older: Path,
) -> None:
    SpoolWriter.open(older).close()
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    command = next(line for line in text.splitlines() if "page_size=2048" in line)
    pragmas = command.split('"')[1]
    subprocess.run(
        ["sqlite3", spool_path(older), pragmas],
        check=True,
        capture_output=True,
    )
    assert look(spool_path(older), "PRAGMA page_size") == [(2048,)]
    assert look(spool_path(older), "PRAGMA auto_vacuum") == [(2,)], "incremental, as before"
    writer = SpoolWriter.open(older)
    assert (writer.epoch, writer.last_seq()) == ("E", 5)
    writer.append([new_reading(7)], [], {})
    assert look(writer.path, "SELECT seq FROM reading_row") == [(4,), (5,), (6,)]
    writer.close()
