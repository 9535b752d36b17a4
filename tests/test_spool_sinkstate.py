"""A forwarder's own file: the cursor, and everything that explains how it moved."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database, Migrations

from spool import (
    Ahead,
    AheadStep,
    AppendJournal,
    CorruptFileError,
    DeadLetter,
    Gap,
    Journal,
    NewerFormatError,
    Reading,
    Settlement,
    SinkFile,
    SinkState,
    StorageFaultError,
    load_ahead,
    presentable,
    sink_path,
)
from spool.connection import open_owner
from spool.migrations import _run_script, migrate
from spool.sinkstate import SINK_FORMAT
from tests.test_spool_writer import edit, look, new_reading

EPOCH = "an-epoch"

first_format = Migrations("sink")


@first_format(name="1")
def _first(db: Database) -> None:
    _run_script(db, "sink_1.sql", 1)


second_format = Migrations("sink")
second_format(name="1")(_first)


@second_format(name="2")
def _second(db: Database) -> None:
    _run_script(db, "sink_2.sql", 2)


def row(seq: int) -> Reading:
    return (seq, *new_reading(seq))


def dead(seq: int, reason: str = "invalid") -> DeadLetter:
    return DeadLetter(row(seq), reason, "the service's own words")


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SinkState]:
    opened = SinkState.open(tmp_path, "pubsub")
    yield opened
    opened.close()


def test_a_new_file_stands_before_the_first_row_of_every_epoch(state: SinkState) -> None:
    assert state.known_epoch() == ""
    assert (state.position(EPOCH), state.position("")) == (0, 0)
    assert state.counters() == {}


def test_the_file_syncs_every_commit(state: SinkState) -> None:
    conn = state._conn  # noqa: SLF001 - the pragmas of this very connection are the claim
    assert conn.execute("PRAGMA synchronous").fetchone() == (2,)
    assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert state.path.stat().st_mode & 0o777 == 0o640


def test_what_was_settled_is_there_after_a_kill(tmp_path: Path) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    state.settle(Settlement(EPOCH, 7, delivered=7))
    # No close: as after SIGKILL, another connection finds the file and its log.
    again = SinkState.open(tmp_path, "pubsub")
    assert (again.position(EPOCH), again.known_epoch()) == (7, EPOCH)
    assert again.counters() == {"delivered": 7}


def test_a_cursor_of_another_epoch_counts_for_nothing(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 7, delivered=7))
    assert state.position("another") == 0
    state.settle(Settlement("another", 2, delivered=2))
    assert (state.position("another"), state.position(EPOCH)) == (2, 0)
    assert state.counters() == {"delivered": 9}


def test_delivered_dead_and_dropped_are_what_the_cursor_has_passed(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 10, 4, [dead(3), dead(8)], [Gap(4, 7, "left")]))
    state.settle(Settlement(EPOCH, 12, 2))
    assert state.counters() == {"delivered": 6, "dead_lettered": 2, "dropped": 4}
    assert sum(state.counters().values()) == state.position(EPOCH)
    assert look(state.path, "SELECT first_seq, last_seq, reason FROM gap") == [(4, 7, "left")]


def test_a_dead_letter_that_is_settled_twice_is_one_dead_letter(state: SinkState) -> None:
    for _ in range(2):
        state.settle(Settlement(EPOCH, 3, 2, [dead(2)]))
    assert look(state.path, "SELECT seq, reason, payload FROM dead_letters") == [
        (2, "invalid", '{"n":2}')
    ]
    assert state.counters()["dead_lettered"] == 1


def test_the_same_number_in_two_epochs_is_two_dead_letters(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 1, 0, [dead(1)]))
    state.settle(Settlement("another", 1, 0, [dead(1)]))
    assert look(state.path, "SELECT count(*) FROM dead_letter") == [(2,)]


def test_a_dead_letter_keeps_a_whole_copy_of_the_row(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 5, 4, [dead(5)]))
    columns = (
        "seq, event_id, received_us, timestamp_us, site_code, sensor_id, pi_tag, value, topic, "
        "payload, crc"
    )
    assert look(state.path, f"SELECT {columns} FROM dead_letter") == [row(5)]  # noqa: S608


def test_a_row_whose_types_were_damaged_can_be_kept_as_a_dead_letter(state: SinkState) -> None:
    damaged: Reading = (5, None, 1.5, "x", b"\xff", None, b"a", "2", 7, "text", None)  # type: ignore[assignment]
    state.settle(Settlement(EPOCH, 5, 4, [DeadLetter(presentable(damaged), "corrupt_row", "d")]))
    assert look(state.path, "SELECT seq, site_code, payload FROM dead_letters") == [
        (5, "\ufffd", "text")
    ]


def test_a_failed_settlement_moves_nothing(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 1, 1))
    with pytest.raises(StorageFaultError):
        state.settle(Settlement(EPOCH, 9, 5, [dead(3)], [Gap(7, 2, "backwards")]))
    assert state.position(EPOCH) == 1
    assert state.counters() == {"delivered": 1}
    assert look(state.path, "SELECT count(*) FROM dead_letter") == [(0,)]
    state.settle(Settlement(EPOCH, 2, 1))
    assert state.position(EPOCH) == 2


def test_a_status_keeps_since_when_it_holds(state: SinkState) -> None:
    state.set_status("retrying", "first")
    edit(state.path, "UPDATE status SET since_us=5")
    state.set_status("retrying", "second")
    assert look(state.path, "SELECT state, detail, since_us FROM status") == [
        ("retrying", "second", 5)
    ]
    state.set_status("delivering", "")
    assert int(str(look(state.path, "SELECT since_us FROM status")[0][0])) > 5
    assert look(state.path, "SELECT state FROM now") == [("delivering",)]


def test_a_file_of_the_first_format_is_migrated_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = sink_path(tmp_path, "bigquery")
    conn = open_owner(path)
    migrate(conn, first_format, lambda _: None)
    conn.close()
    edit(path, "INSERT INTO cursor VALUES (1, 'an-epoch', 7, 0)")
    state = SinkState.open(tmp_path, "bigquery")
    assert state.position(EPOCH) == 7
    assert AppendJournal(state).load(EPOCH) == Journal()
    state.close()
    assert look(path, "PRAGMA user_version") == [(SINK_FORMAT,)]


def test_a_file_of_format_2_is_migrated_with_all_that_it_holds(tmp_path: Path) -> None:
    path = sink_path(tmp_path, "pubsub")
    conn = open_owner(path)
    migrate(conn, second_format, lambda _: None)
    conn.close()
    edit(path, "INSERT INTO cursor VALUES (1, 'an-epoch', 7, 0)")
    edit(path, "INSERT INTO counter VALUES ('delivered', 7)")
    state = SinkState.open(tmp_path, "pubsub")
    assert state.position(EPOCH) == 7
    assert state.counters() == {"delivered": 7}
    assert load_ahead(state, EPOCH) is None
    state.settle(Settlement(EPOCH, 8, 1), AheadStep(20, {"S1": (9, "why")}))
    state.close()
    state = SinkState.open(tmp_path, "pubsub")
    assert load_ahead(state, EPOCH) == Ahead(20, {"S1": (9, "why")}, [])
    assert load_ahead(state, "another-epoch") is None
    state.settle(Settlement(EPOCH, 20, 12), AheadStep())
    assert load_ahead(state, EPOCH) is None
    state.close()
    assert look(path, "PRAGMA user_version") == [(SINK_FORMAT,)]


def test_a_note_is_kept_and_removed(tmp_path: Path) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    assert state.remembered("topic_missing") == ""
    state.remember({"topic_missing": "since today"})
    state.close()
    state = SinkState.open(tmp_path, "pubsub")
    assert state.remembered("topic_missing") == "since today"
    state.remember({"topic_missing": ""})
    assert state.remembered("topic_missing") == ""
    state.close()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    SinkState.open(tmp_path, "pubsub").close()
    edit(sink_path(tmp_path, "pubsub"), f"PRAGMA user_version={SINK_FORMAT + 1}")
    with pytest.raises(NewerFormatError):
        SinkState.open(tmp_path, "pubsub")


def test_garbage_and_another_programs_database_are_corrupt(tmp_path: Path) -> None:
    sink_path(tmp_path, "pubsub").write_bytes(b"garbage" * 1000)
    edit(sink_path(tmp_path, "bigquery"), "CREATE TABLE theirs (a)")
    for sink in ("pubsub", "bigquery"):
        with pytest.raises(CorruptFileError):
            SinkState.open(tmp_path, sink)


def test_the_collector_sees_the_cursor_and_the_counters(tmp_path: Path, state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 10, 4, [dead(3), dead(8)], [Gap(4, 7, "left")]))
    state.set_status("on hold", "no permission")
    seen = SinkFile(tmp_path, "pubsub", enabled=True).read()
    assert (seen.epoch, seen.seq, seen.position_in(EPOCH)) == (EPOCH, 10, 10)
    assert (seen.delivered, seen.dead_lettered, seen.dropped) == (4, 2, 4)
    assert (seen.state, seen.detail) == ("on hold", "no permission")
    assert seen.position_in("another") == 0


def test_a_missing_empty_or_unreadable_file_counts_as_no_progress(tmp_path: Path) -> None:
    sink_path(tmp_path, "empty").touch()
    sink_path(tmp_path, "garbage").write_bytes(b"garbage" * 1000)
    sink_path(tmp_path, "directory").mkdir()
    edit(sink_path(tmp_path, "foreign"), "CREATE TABLE cursor (a)")
    states = {}
    for sink in ("missing", "empty", "garbage", "directory", "foreign"):
        seen = SinkFile(tmp_path, sink, enabled=True).read()
        assert (seen.seq, seen.position_in(""), seen.enabled) == (0, 0, True)
        states[sink] = seen.state
    assert states.pop("missing") == states.pop("empty") == "no file"
    assert set(states.values()) == {"unreadable"}


def test_a_directory_that_cannot_be_searched_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refused)
    assert SinkFile(tmp_path, "pubsub", enabled=True).read().state == "unreadable"


def test_a_file_that_was_replaced_is_opened_again(tmp_path: Path) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    state.settle(Settlement(EPOCH, 9, 9))
    file = SinkFile(tmp_path, "pubsub", enabled=True)
    assert file.read().seq == 9
    state.close()
    for path in tmp_path.glob("pubsub.db*"):
        path.unlink()
    assert file.read().seq == 0
    state = SinkState.open(tmp_path, "pubsub")
    state.settle(Settlement(EPOCH, 2, 2))
    assert file.read().seq == 2


def test_the_collector_cannot_write_to_a_sinks_file(tmp_path: Path, state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 1, 1))
    file = SinkFile(tmp_path, "pubsub", enabled=True)
    file.read()
    conn = file._conn  # noqa: SLF001 - that this very connection cannot write is the claim
    assert conn is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        conn.execute("UPDATE cursor SET seq=0")
