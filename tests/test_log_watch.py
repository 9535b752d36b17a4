"""The write-ahead log under a reader: who is named, and when commits are few, or none."""

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

import spool.logwatch
from spool import (
    Condition,
    Conditions,
    DiskFullError,
    LogWatch,
    SinkState,
    SpoolWriter,
    sink_path,
    spool_path,
)
from spool.connection import APPLICATION_ID
from spool.locks import LOCK_STEP_S
from spool.logwatch import CHECKPOINT_WAIT_S, COSTLY_TRY_SHARE, FULL_REMINDER_S, LOOK_INTERVAL_S
from spool.readers import LogReader, log_readers
from spool.sinkstate import SINK_FORMAT
from spool.writer import SPOOL_FORMAT
from tests.collector_parts import MIB, Clock, message, read
from tests.harness.short_logs import pager
from tests.store_desk import Desk, desks
from tests.test_spool_writer import look, new_reading

KEPT = 64 * 1024
SCHEMA = Path(spool.logwatch.__file__).parent / "schema"


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpoolWriter]:
    monkeypatch.setattr(spool.logwatch, "WAL_KEPT_BYTES", KEPT)
    opened = SpoolWriter.open(tmp_path)
    yield opened
    opened.close()


def grow(writer: SpoolWriter, log_bytes: int) -> None:
    while writer.wal_bytes() <= log_bytes:
        writer.append([new_reading(n, payload=b"x" * 2000) for n in range(20)], [], {})


class Watched:
    """A watch over a log, with a clock of its own."""

    def __init__(self, *, max_bytes: int = MIB, free_bytes: int = 10**12) -> None:
        self.clock = Clock()
        self.tries: list[float] = []
        self.watch = LogWatch(
            max_bytes,
            stands_still="nothing goes on",
            before_try=self.tries.append,
            clock=self.clock,
            free_bytes=lambda _: free_bytes,
        )
        self.told: list[str] = []

    def looks(self, owner: SpoolWriter | SinkState, times: int = 4) -> None:
        for _ in range(times):
            self.clock.now_s += LOOK_INTERVAL_S
            notice = self.watch.look(owner)
            if notice is not None:
                self.told.append(notice.severity)


def test_a_reader_is_named_with_its_command_and_this_process_is_not(writer: SpoolWriter) -> None:
    grow(writer, KEPT)
    with closing(sqlite3.connect(writer.path)) as own, pager(writer.path) as process:
        own.execute("BEGIN")
        own.execute("SELECT count(*) FROM reading_row").fetchone()
        (found,) = log_readers(writer.path)
        assert found.pid == process.pid
        assert found.command.startswith(f"sqlite3 -readonly {writer.path}")
    assert log_readers(writer.path) == []


def test_who_only_has_the_file_open_is_no_reader(writer: SpoolWriter) -> None:
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
        "c.execute('select count(*) from reading_row').fetchone(); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, writer.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert log_readers(writer.path) == []
        process.communicate(b"\n")


def proc_with(directory: Path, locks: Sequence[str], comm: str = "") -> Path:
    proc = directory / "proc"
    (proc / "77").mkdir(parents=True)
    (proc / "locks").write_text("".join(f"{line}\n" for line in locks))
    if comm:
        (proc / "77" / "comm").write_text(comm)
    return proc


def test_locks_are_told_apart_by_kind_place_and_file(writer: SpoolWriter, tmp_path: Path) -> None:
    shm = Path(f"{writer.path}-shm").stat()
    here = f"{os.major(shm.st_dev):02x}:{os.minor(shm.st_dev):02x}:{shm.st_ino}"
    lines = [
        f"1: POSIX  ADVISORY  READ 77 {here} 124 124",
        f"2: POSIX  ADVISORY  READ 78 {here} 128 128",  # the dead man's switch
        f"3: POSIX  ADVISORY  WRITE 79 {here} 124 124",
        f"4: FLOCK  ADVISORY  READ 80 {here} 0 EOF",
        f"4: -> POSIX  ADVISORY  READ 81 {here} 124 124",
        f"5: OFDLCK ADVISORY  READ -1 {here} 124 124",
        f"6: POSIX  ADVISORY  READ 82 ff:ff:{shm.st_ino} 124 124",  # its inode by chance
        f"7: POSIX  ADVISORY  READ 83 {here[:6]}{shm.st_ino + 1} 124 124",
        f"8: POSIX  ADVISORY  READ {os.getpid()} {here} 125 125",
        "garbage",
        "9: POSIX ADVISORY READ x y z EOF",
    ]
    proc = proc_with(tmp_path, lines, comm="less\x1b[2J\n")
    assert log_readers(writer.path, proc) == [LogReader(77, "less?[2J")]


def test_where_the_device_differs_the_inode_decides(writer: SpoolWriter, tmp_path: Path) -> None:
    inode = Path(f"{writer.path}-shm").stat().st_ino
    proc = proc_with(tmp_path, [f"1: POSIX  ADVISORY  READ 77 00:2f:{inode} 123 123"])
    (found,) = log_readers(writer.path, proc)
    assert str(found) == "process 77 (its command is not visible)"
    assert log_readers(writer.path, tmp_path / "nowhere") == []


def test_a_long_log_that_nobody_pins_is_worked_off_and_told_to_nobody(writer: SpoolWriter) -> None:
    grow(writer, 4 * KEPT)
    watched = Watched()
    watched.looks(writer, 1)
    assert writer.wal_bytes() == 0
    assert watched.told == []
    assert len(watched.tries) == 1


@pytest.mark.parametrize("worked_off", [False, True])
def test_a_pinned_log_is_told_bounded_and_worked_off_once_the_reader_has_left(
    writer: SpoolWriter, *, worked_off: bool
) -> None:
    """A reader that began at a log that was worked off holds another lock."""
    writer.append([new_reading(1)], [], {"received": 1})
    if worked_off:
        assert writer.checkpoint()
    watched = Watched()
    with pager(writer.path) as process:
        grow(writer, 2 * KEPT)
        watched.looks(writer)
        assert watched.told == ["WARNING"]
        assert (watched.watch.pinned, watched.watch.full) == (True, False)
        shown = watched.watch.condition
        assert f"process {process.pid} (sqlite3" in (shown.detail if shown else "")
        grow(writer, KEPT + MIB)
        watched.looks(writer)
        assert watched.told == ["WARNING", "CRITICAL"]
        assert (watched.watch.pinned, watched.watch.full) == (True, True)
        watched.clock.now_s += FULL_REMINDER_S
        watched.looks(writer)
        assert watched.told == ["WARNING", "CRITICAL", "CRITICAL"]
    watched.looks(writer, 1)
    assert watched.told[-1] == "INFO"
    assert (watched.watch.pinned, watched.watch.full) == (False, False)
    assert watched.watch.condition is None
    assert writer.wal_bytes() == 0


def test_the_bound_is_lower_where_the_disk_has_no_room_to_work_the_log_off(
    writer: SpoolWriter,
) -> None:
    watched = Watched(max_bytes=10**12, free_bytes=6 * KEPT)
    with pager(writer.path):
        grow(writer, KEPT + KEPT // 2)
        watched.looks(writer)
        assert watched.told == ["WARNING"]
        grow(writer, 6 * KEPT)
        watched.looks(writer)
        assert watched.told == ["WARNING", "CRITICAL"]


def test_while_it_is_pinned_no_commit_makes_a_checkpoint(writer: SpoolWriter) -> None:
    conn = writer._conn  # noqa: SLF001 - the pragma of this very connection is the claim
    usual = conn.execute("PRAGMA wal_autocheckpoint").fetchone()
    watched = Watched()
    with pager(writer.path):
        grow(writer, 2 * KEPT)
        watched.looks(writer)
        assert conn.execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)
    watched.looks(writer, 1)
    assert conn.execute("PRAGMA wal_autocheckpoint").fetchone() == usual != (0,)


def test_costly_tries_are_few_unless_a_reader_has_left(writer: SpoolWriter) -> None:
    grow(writer, 2 * KEPT)
    clock = Clock()
    readers = [LogReader(1)]
    tries = []

    class Costly:
        path = writer.path

        def wal_bytes(self) -> int:
            return 10 * KEPT

        def restart_log(self) -> bool:
            tries.append(clock.now_s)
            clock.now_s += 1.0
            return False

        def checkpoint_in_commits(self, *, wanted: bool) -> None:
            assert not wanted

    watch = LogWatch(
        10**9, stands_still="", clock=clock, readers=lambda _: readers, free_bytes=lambda _: 10**12
    )
    for _ in range(40):
        clock.now_s += LOOK_INTERVAL_S
        watch.look(Costly())
    assert len(tries) <= 2
    clock.now_s += COSTLY_TRY_SHARE
    watch.look(Costly())
    before = len(tries)
    readers.clear()
    clock.now_s += LOOK_INTERVAL_S
    watch.look(Costly())
    assert len(tries) == before + 1


def test_cutting_the_log_does_not_wait_for_a_reader_that_stays(writer: SpoolWriter) -> None:
    with pager(writer.path):
        writer.append([new_reading(1)], [], {})
        begun = time.monotonic()
        assert not writer.checkpoint()
        assert time.monotonic() - begun < CHECKPOINT_WAIT_S + 2.0
        (timeout_ms,) = writer._conn.execute("PRAGMA busy_timeout").fetchone()  # noqa: SLF001 - see above
        assert timeout_ms == 1000 * LOCK_STEP_S
    assert writer.checkpoint()


# --- what the collector does with it


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Desk]]:
    monkeypatch.setattr(spool.logwatch, "WAL_KEPT_BYTES", KEPT)
    with desks(tmp_path) as make:
        yield make


def test_a_stop_while_the_log_is_full_acknowledges_nothing(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = desk()
    monkeypatch.setattr(d.house.log, "look", lambda _: None)
    d.house.log.full = d.house.log.pinned = True
    d.stop.request("SIGTERM")
    d.inbox.put(read(message(1)))
    d.begin()
    d.store.join()
    assert d.acked == []
    assert d.rows() == []


# --- conditions

WRONG = Condition("log_pinned", "WARNING", "process 1", "kill 1")


def test_conditions_are_shown_and_written_only_when_they_change(tmp_path: Path) -> None:
    with (
        closing(SpoolWriter.open(tmp_path)) as writer,
        closing(SinkState.open(tmp_path, "pubsub")) as state,
    ):
        for file in (writer, state):
            shown = "SELECT name, severity, detail, remedy FROM health"
            assert look(file.path, shown) == []
            conditions = Conditions()
            conditions.put(WRONG)
            conditions.store(file)
            assert look(file.path, shown) == [("log_pinned", "WARNING", "process 1", "kill 1")]
            size = file.wal_bytes()
            for _ in range(3):
                conditions.put(WRONG)
                conditions.store(file)
            assert file.wal_bytes() == size
            since = look(file.path, "SELECT since_us FROM condition")
            conditions.put(Condition("log_pinned", "CRITICAL", "process 1", "kill 1"))
            conditions.store(file)
            assert look(file.path, "SELECT severity, since FROM health")[0][0] == "CRITICAL"
            assert look(file.path, "SELECT since_us FROM condition") == since
            conditions.clear("log_pinned")
            conditions.store(file)
            assert look(file.path, shown) == []


def test_what_an_earlier_process_left_is_cleared(tmp_path: Path) -> None:
    with closing(SpoolWriter.open(tmp_path)) as writer:
        writer.set_conditions([WRONG])
    with closing(SpoolWriter.open(tmp_path)) as writer:
        Conditions().store(writer)
        assert look(writer.path, "SELECT * FROM health") == []


def test_a_condition_that_finds_no_room_is_tried_again_a_minute_later() -> None:
    clock = Clock()
    conditions = Conditions(clock)
    tried = []

    class Full:
        def set_conditions(self, _: object) -> bool:
            tried.append(clock.now_s)
            raise DiskFullError("no room")

    conditions.put(WRONG)
    with pytest.raises(DiskFullError):
        conditions.store(Full())
    conditions.store(Full())
    assert len(tried) == 1
    clock.now_s += 60.0
    with pytest.raises(DiskFullError):
        conditions.store(Full())


# --- files of the release before


def older(path: Path, scripts: Sequence[str], version: int) -> None:
    """Make a file as the release before did, with its name for what was migrated."""
    from sqlite_utils import Database  # noqa: PLC0415 - as spool.migrations

    from spool.migrations import sink_migrations, spool_migrations  # noqa: PLC0415 - the same

    migrations = spool_migrations if path.name == "spool.db" else sink_migrations
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA auto_vacuum=INCREMENTAL")
        conn.execute("PRAGMA journal_mode=WAL")
        migrations.apply(Database(conn), stop_before=str(len(scripts) + 1))
        assert conn.execute("PRAGMA user_version").fetchone() == (version,)
        assert conn.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


def test_a_spool_of_the_release_before_is_migrated_with_all_it_holds(tmp_path: Path) -> None:
    path = spool_path(tmp_path)
    older(path, ["spool_1.sql"], 1)
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        for key in ("epoch", "created_at", "app_env"):
            conn.execute("INSERT INTO meta VALUES (?, ?)", (key, key))
        conn.execute(
            "INSERT INTO rejected_row (received_us, reason, detail, topic, payload, "
            "payload_bytes, qos, retained) VALUES (1, 'not_json', 'dé', 'tü', x'0102', 2, 1, 0)"
        )
        conn.execute("INSERT INTO counter VALUES ('rejected_kept_bytes', 2), ('received', 1)")
    with closing(SpoolWriter.open(tmp_path)) as writer:
        assert writer.epoch == "epoch"
        assert writer.counter("rejected_kept_bytes") == 2 + 3 + 3 + 100
        assert writer.counter("received") == 1
        assert writer.set_conditions([WRONG])
        assert writer.trim_rejected(0) == 1
        assert writer.counter("rejected_kept_bytes") == 0
    assert look(path, "PRAGMA user_version") == [(SPOOL_FORMAT,)]


def test_a_sinks_file_of_the_release_before_is_migrated(tmp_path: Path) -> None:
    path = sink_path(tmp_path, "bigquery")
    older(path, ["sink_1.sql", "sink_2.sql"], 2)
    with closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("INSERT INTO cursor VALUES (1, 'e', 7, 1)")
    with closing(SinkState.open(tmp_path, "bigquery")) as state:
        assert state.position("e") == 7
        assert state.set_conditions([WRONG])
    assert look(path, "PRAGMA user_version") == [(SINK_FORMAT,)]
