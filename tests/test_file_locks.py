"""A lock that another process holds on a file: waited for, named, and nothing is lost for it."""

import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import spool.locks
from spool import (
    FileLockedError,
    LockWait,
    LogNotice,
    Settlement,
    SinkState,
    SpoolWriter,
    sink_path,
    spool_path,
)
from spool.locks import REMINDER_S, STOP_PATIENCE_S, TELL_AFTER_S
from spool.readers import lock_holders
from spool.writer import PAGE_BYTES
from tests.harness import COLLECTOR, Rig, wait_until
from tests.test_spool_writer import look, new_reading

LOCKED = "file is locked by another process"
GOES_ON = "file is no longer locked"
STEP = 40
TIMEOUT_S = 60.0


@contextmanager
def shell(path: Path, statement: str = "BEGIN IMMEDIATE") -> Iterator["subprocess.Popen[bytes]"]:
    """Run the ``sqlite3`` shell with a transaction that its user has not ended."""
    process = subprocess.Popen(
        ["sqlite3", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f".timeout 10000\n{statement};\nselect 'held';\n".encode())
    process.stdin.flush()
    try:
        assert b"held" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()


class Hands:
    """A clock that goes on a second at each step, and what is to happen at one of them."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.notices: list[LogNotice] = []
        self.beats = 0
        self.stopped = False
        self.at: dict[float, subprocess.Popen[bytes]] = {}
        self.wait = LockWait(
            "nothing goes on",
            asked_to_stop=lambda: self.stopped,
            tell=self.notices.append,
            clock=lambda: self.now_s,
        )
        self.wait.beat = self._beat

    def _beat(self) -> None:
        self.beats += 1
        self.now_s += 1.0
        if process := self.at.get(self.now_s):
            process.kill()
            process.wait()


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    monkeypatch.setattr(spool.connection, "LOCK_STEP_S", 0.0)
    return Hands()


def write_spool(directory: Path, hands: Hands) -> None:
    writer = SpoolWriter.open(directory, lock_wait=hands.wait)
    writer.append([new_reading(1)], [], {})
    writer.close()


def write_sink(directory: Path, hands: Hands) -> None:
    state = SinkState.open(directory, "pubsub", lock_wait=hands.wait)
    state.settle(Settlement("e", 1, delivered=1))
    state.close()


WRITES = {"spool": write_spool, "pubsub": write_sink}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("statement", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_an_owner_waits_beyond_any_timeout_and_names_who_holds_the_lock(
    tmp_path: Path, hands: Hands, name: str, statement: str
) -> None:
    WRITES[name](tmp_path, Hands())
    path = tmp_path / f"{name}.db"
    with shell(path, statement) as holder:
        ends_at = TELL_AFTER_S + 2 * REMINDER_S + 5
        hands.at = {ends_at: holder}
        WRITES[name](tmp_path, hands)
    assert hands.beats >= ends_at, "the watchdog is told at each step"
    *told, over = hands.notices
    assert [n.severity for n in told] == ["WARNING"] * 3, "at once, then each minute"
    assert all(LOCKED in n.message and "nothing goes on" in n.message for n in told)
    for notice in told:
        assert notice.values["file"] == str(path)
        assert f"process {holder.pid} (sqlite3 {path})" in str(notice.values["locked_by"])
        assert f"kill {holder.pid}" in str(notice.values["remedy"])
        assert "df -h" not in str(notice.values["remedy"])
    assert GOES_ON in over.message
    assert over.severity == "INFO"


def test_a_lock_of_a_moment_is_waited_for_without_a_word(tmp_path: Path, hands: Hands) -> None:
    write_spool(tmp_path, Hands())
    with shell(spool_path(tmp_path)) as holder:
        hands.at = {3.0: holder}
        write_spool(tmp_path, hands)
    assert hands.notices == []
    assert look(spool_path(tmp_path), "SELECT count(*) FROM readings") == [(2,)]


@pytest.mark.parametrize("name", WRITES)
def test_the_wish_to_stop_ends_the_wait_and_the_next_does_not_begin_again(
    tmp_path: Path, hands: Hands, name: str
) -> None:
    WRITES[name](tmp_path, Hands())
    with shell(tmp_path / f"{name}.db") as holder:
        hands.stopped = True
        for waits_s in (STOP_PATIENCE_S, 0.0):
            begun = hands.now_s
            with pytest.raises(FileLockedError) as raised:
                WRITES[name](tmp_path, hands)
            assert hands.now_s - begun == waits_s
    assert f"locked by process {holder.pid} (sqlite3" in str(raised.value)
    assert "disk" not in str(raised.value), "a lock is no fault of the disk"
    assert "df -h" not in str(raised.value)


def test_space_is_returned_and_files_are_migrated_behind_a_lock(
    tmp_path: Path, hands: Hands
) -> None:
    writer = SpoolWriter.open(tmp_path, lock_wait=hands.wait)
    writer.append([new_reading(n, payload=b"x" * 4000) for n in range(100)], [], {})
    writer.delete_through(100, "pruned")
    free = writer.free_bytes()
    with shell(writer.path) as holder:
        hands.at = {30.0: holder}
        writer.return_space(100 * PAGE_BYTES)
    assert writer.free_bytes() < free
    with sqlite3.connect(sink_path(tmp_path, "pubsub")) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
    conn.close()
    hands.now_s = 0.0
    with shell(sink_path(tmp_path, "pubsub")) as holder:
        hands.at = {30.0: holder}
        write_sink(tmp_path, hands)
    assert hands.now_s >= 30.0


def test_a_commit_that_meets_a_lock_is_committed_later(tmp_path: Path, hands: Hands) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as plain:
        plain.execute("CREATE TABLE t (x)")
    plain.close()
    # In rollback mode a reader is in the way of a commit, and of nothing before it.
    owner = sqlite3.connect(
        path, timeout=0, isolation_level=None, factory=spool.locks.OwnerConnection
    )
    owner.path, owner.lock_wait = path, hands.wait
    with shell(path, "BEGIN; SELECT * FROM t WHERE x") as reader:
        spool.locks.begin(owner)
        owner.execute("INSERT INTO t VALUES (1)")
        hands.at = {20.0: reader}
        spool.locks.commit(owner)
    assert hands.now_s >= 20.0
    assert owner.execute("SELECT * FROM t WHERE x").fetchone() == (1,)
    assert len(hands.notices) == 2
    owner.close()


def test_an_error_that_is_no_lock_is_not_waited_for(tmp_path: Path, hands: Hands) -> None:
    with pytest.raises(sqlite3.OperationalError, match="syntax"):
        hands.wait.run(lambda: sqlite3.connect(":memory:").execute("BEGINN"), tmp_path)
    assert hands.beats == 0


def test_lock_holders_names_no_process_without_a_lock(tmp_path: Path) -> None:
    write_spool(tmp_path, Hands())
    with shell(spool_path(tmp_path), "BEGIN; SELECT * FROM readings WHERE 0"):
        assert lock_holders(spool_path(tmp_path)) == [], "a reader is in no writer's way"
    assert lock_holders(spool_path(tmp_path)) == []
    assert lock_holders(tmp_path / "none.db") == []


OWNERS = {"spool": COLLECTOR, "pubsub": "forwarder-pubsub", "bigquery": "forwarder-bigquery"}


def told_by(rig: Rig, name: str, holder: "subprocess.Popen[bytes]") -> None:
    """Wait until the file's owner has named the holder; it has neither ended nor complained."""
    program = rig.programs[OWNERS[name]]
    wait_until(lambda: program.log_text.count(LOCKED) > 0, TIMEOUT_S, "it says so")
    line = [line for line in program.log_text.splitlines() if LOCKED in line][-1]
    assert f"process {holder.pid} (sqlite3 " in line
    assert f"{name}.db" in line
    assert '"severity": "WARNING"' in line
    assert program.running


@pytest.mark.parametrize("name", OWNERS)
def test_a_shell_that_holds_a_files_lock_ends_no_program_and_loses_nothing(name: str) -> None:
    with Rig() as rig:
        rig.start()
        rig.publish(STEP)
        rig.wait_until_delivered()
        owner = rig.programs[OWNERS[name]]
        with shell(rig.spool_dir / f"{name}.db") as holder:
            begun = time.monotonic()
            acknowledged_by_us = rig.books.counter("received")
            rig.publish(STEP)
            told_by(rig, name, holder)
            if name == "spool":
                assert rig.books.counter("received") == acknowledged_by_us
            else:
                assert rig.books.figures().sinks[name].delivered == STEP, "the cursor stands still"
            wait_until(lambda: time.monotonic() - begun > 13, 20.0, "more than any timeout")
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        assert GOES_ON in owner.log_text
        assert owner.log_text.count('"message": "started"') == 1
        assert "CRITICAL" not in owner.log_text


@pytest.mark.parametrize("name", OWNERS)
def test_a_program_starts_behind_a_lock_and_stops_within_ten_seconds_of_it(name: str) -> None:
    with Rig() as rig:
        rig.start()
        rig.publish(STEP)
        rig.wait_until_delivered()
        owner = rig.programs[OWNERS[name]]
        assert owner.stop()[0] == 0
        with shell(rig.spool_dir / f"{name}.db") as holder:
            owner.start()
            told_by(rig, name, holder)
            code, took_s = owner.stop()
            assert (code, took_s < 10) == (0, True)
            owner.start()
        rig.publish(STEP)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()


def test_sigterm_during_a_lock_ends_the_collector_and_the_broker_keeps_the_rest() -> None:
    with Rig() as rig:
        rig.start()
        collector = rig.programs[COLLECTOR]
        with shell(rig.spool_dir / "spool.db") as holder:
            rig.publish(STEP)
            told_by(rig, "spool", holder)
            code, took_s = collector.stop()
            assert (code, took_s < 10) == (0, True)
            assert "CRITICAL" not in collector.log_text
        rig.start(COLLECTOR)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
