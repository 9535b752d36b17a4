"""spool.db as its writer makes it: format, durability, counters, the ring, the views."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import spool.insertion
from spool import (
    CorruptFileError,
    FileMissingError,
    NewerFormatError,
    NewReading,
    Reading,
    Rejection,
    SinkProgress,
    SpoolReader,
    SpoolWriter,
    StorageFaultError,
    WrongEnvironmentError,
    claim_environment,
    event_id,
    row_crc,
    spool_path,
)
from spool.connection import open_owner
from spool.migrations import migrate, spool_migrations
from spool.writer import SPOOL_FORMAT

SITE = "S1"
ROW_TOPIC = "FCTS/FAE/S1/SolvExtract/TI-101.PV"


def new_reading(  # noqa: PLR0913 - a row has so many columns
    number: int,
    *,
    site: str = SITE,
    value: float = 1.5,
    payload: bytes | None = None,
    received_us: int = 1_700_000_000_000_000,
    timestamp_us: int = 1_700_000_000_123_456,
) -> NewReading:
    """Return a whole row that is told from others by its number."""
    topic = f"FCTS/FAE/{site}/SolvExtract/TI-101.PV"
    content = b'{"n":%d}' % number if payload is None else payload
    identity = event_id(topic.encode(), b"%d" % number)
    names = f"{site}PT-1TI-101.PV{topic}"
    crc = row_crc(identity, (received_us, timestamp_us, value), names, content)
    return (
        identity,
        received_us,
        timestamp_us,
        site,
        "PT-1",
        "TI-101.PV",
        value,
        topic,
        content,
        crc,
    )


def rejection(
    payload: bytes = b"x", *, topic: str = "t", reason: str = "not_json", at_us: int = 1_000_000
) -> Rejection:
    """Return a rejected message."""
    return (at_us, reason, "a sentence", topic, payload, len(payload), 1, 0)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SpoolWriter]:
    opened = SpoolWriter.open(tmp_path)
    yield opened
    opened.close()


def look(path: Path, sql: str, *parameters: object) -> list[tuple[object, ...]]:
    """Ask as an operator does, with a connection that cannot write."""
    conn = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        return conn.execute(sql, parameters).fetchall()
    finally:
        conn.close()


def edit(path: Path, sql: str, *parameters: object) -> None:
    """Change the file behind its owner's back, as damage does."""
    conn = sqlite3.connect(path)
    conn.execute("PRAGMA ignore_check_constraints=ON")
    conn.execute(sql, parameters)
    conn.commit()
    conn.close()


def read_all(directory: Path) -> list[Reading]:
    reader = SpoolReader.open(directory)
    try:
        return reader.read_after(0, 1_000_000, 10**9)
    finally:
        reader.close()


def test_a_new_file_is_wal_full_incremental_and_marked_as_ours(writer: SpoolWriter) -> None:
    conn = writer._conn  # noqa: SLF001 - the pragmas of this very connection are the claim
    pragmas = {
        name: conn.execute(f"PRAGMA {name}").fetchone()[0]
        for name in (
            "journal_mode",
            "synchronous",
            "secure_delete",
            "auto_vacuum",
            "user_version",
            "trusted_schema",
            "temp_store",
        )
    }
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 0,
        "auto_vacuum": 2,
        "user_version": SPOOL_FORMAT,
        "trusted_schema": 0,
        "temp_store": 2,
    }
    assert conn.execute("PRAGMA application_id").fetchone()[0] == 0x536C7563
    assert spool_path(writer.path.parent).stat().st_mode & 0o777 == 0o640


def test_every_commit_is_one_sync(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    script = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:]\n"
        "from spool import SpoolWriter\n"
        "from tests.test_spool_writer import new_reading\n"
        "w = SpoolWriter.open(pathlib.Path(sys.argv[1]))\n"
        "w.append([new_reading(-1)], [], {})\n"
        "print('begin', flush=True)\n"
        "for n in range(20): w.append([new_reading(n)], [], {'spooled': 1})\n"
        "print('end', flush=True)\n"
    )
    log = tmp_path / "strace"
    directory = tmp_path / "spool"
    directory.mkdir()
    command = ["strace", "-f", "-e", "trace=fdatasync,fsync,write", "-o", str(log)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*command, sys.executable, "-c", script, str(directory), root],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "ptrace" in done.stderr:
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if '"begin' in line)
    end = next(i for i, line in enumerate(lines) if '"end' in line)
    assert sum("sync(" in line for line in lines[begin:end]) == 20


def test_the_file_keeps_its_epoch_and_another_file_has_another(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = SpoolWriter.open(tmp_path)
    epoch, created = first.epoch, first.created
    first.close()
    again = SpoolWriter.open(tmp_path)
    other = SpoolWriter.open(tmp_path / "other")
    assert (created, again.created, again.epoch) == (True, False, epoch)
    assert other.epoch != epoch


def test_numbers_go_on_after_the_table_was_emptied_and_the_file_reopened(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n) for n in range(5)], [], {})
    assert writer.delete_through(5, "pruned") == 5
    assert (writer.first_seq(), writer.last_seq()) == (6, 5)
    writer.close()
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(5)], [], {})
    assert [row[0] for row in read_all(tmp_path)] == [6]
    assert writer.counter("pruned") == 5


def test_a_file_of_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    SpoolWriter.open(tmp_path).close()
    path = spool_path(tmp_path)
    edit(path, "PRAGMA user_version=99")
    with pytest.raises(NewerFormatError, match="99"):
        SpoolWriter.open(tmp_path)
    with pytest.raises(NewerFormatError, match="99"):
        SpoolReader.open(tmp_path)
    assert look(path, "PRAGMA user_version") == [(99,)]


def test_a_zero_length_file_becomes_a_spool_and_is_no_spool_to_a_reader(tmp_path: Path) -> None:
    spool_path(tmp_path).touch()
    with pytest.raises(FileMissingError):
        SpoolReader.open(tmp_path)
    assert SpoolWriter.open(tmp_path).created
    assert SpoolReader.open(tmp_path).epoch


def test_a_crash_within_the_making_leaves_nothing_half_made(tmp_path: Path) -> None:
    path = spool_path(tmp_path)
    conn = open_owner(path)

    def power_cut(_: sqlite3.Connection) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(conn, spool_migrations, power_cut)
    assert conn.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,)
    conn.close()
    writer = SpoolWriter.open(tmp_path)
    assert writer.created
    assert writer.epoch


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"\0" * 8192])
def test_what_is_no_database_is_corrupt(tmp_path: Path, content: bytes) -> None:
    spool_path(tmp_path).write_bytes(content)
    with pytest.raises(CorruptFileError) as caught:
        SpoolWriter.open(tmp_path)
    assert caught.value.path == spool_path(tmp_path)
    with pytest.raises(CorruptFileError):
        SpoolReader.open(tmp_path)


def test_another_programs_database_is_corrupt_to_us(tmp_path: Path) -> None:
    edit(spool_path(tmp_path), "CREATE TABLE theirs (a)")
    with pytest.raises(CorruptFileError, match="not one of Sluice's"):
        SpoolWriter.open(tmp_path)


def test_a_missing_directory_is_a_storage_fault_and_no_corruption(tmp_path: Path) -> None:
    with pytest.raises(StorageFaultError) as caught:
        SpoolWriter.open(tmp_path / "nowhere")
    assert not isinstance(caught.value, CorruptFileError)


def test_running_out_of_descriptors_is_no_corruption(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, resource, sys; sys.path[:0] = sys.argv[2:]\n"
        "from spool import CorruptFileError, SpoolReader, SpoolWriter, StorageFaultError\n"
        "d = pathlib.Path(sys.argv[1])\n"
        "SpoolWriter.open(d).close()\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "held = []\n"
        "try:\n"
        "    while True: held.append(os.open('/dev/null', os.O_RDONLY))\n"
        "except OSError: pass\n"
        "for free in range(4):\n"
        "    for open_ in (SpoolWriter.open, SpoolReader.open):\n"
        "        try: open_(d).close()\n"
        "        except CorruptFileError: raise SystemExit('taken for corruption')\n"
        "        except StorageFaultError as error: print(error)\n"
        "    os.close(held.pop())\n"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), root],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Too many open files" in done.stdout


def test_tables_are_strict_and_refuse_what_is_no_reading(writer: SpoolWriter) -> None:
    good = list(new_reading(1))
    for column, wrong in ((0, b"short"), (3, ""), (4, ""), (5, ""), (1, "now"), (8, None)):
        bad = [*good[:column], wrong, *good[column + 1 :]]
        with pytest.raises(StorageFaultError):
            writer.append([tuple(bad)], [], {"spooled": 1})  # type: ignore[list-item]
    assert (writer.last_seq(), writer.counter("spooled")) == (0, 0)


def test_a_failed_batch_leaves_neither_rows_nor_counts(writer: SpoolWriter) -> None:
    bad = (b"short", *new_reading(2)[1:])
    with pytest.raises(StorageFaultError):
        writer.append([new_reading(1), bad], [rejection()], {"received": 3})
    writer.append([new_reading(3)], [], {"received": 1})
    assert writer.counter("received") == 1
    assert look(writer.path, "SELECT count(*) FROM rejected_row") == [(0,)]
    assert look(writer.path, "SELECT count(*) FROM reading_row") == [(1,)]


def test_counters_add_up_over_batches(writer: SpoolWriter) -> None:
    for _ in range(3):
        writer.append(
            [new_reading(1)],
            [rejection(), rejection(reason="too_deep")],
            {"received": 4, "spooled": 1, "rejected": 2, "duplicates": 1},
        )
    names = ("received", "spooled", "rejected", "duplicates")
    counts = {name: writer.counter(name) for name in names}
    assert look(writer.path, "SELECT value FROM counters WHERE name='received'") == [(12,)]
    assert counts["received"] == 12
    assert counts["received"] == counts["spooled"] + counts["rejected"] + counts["duplicates"]
    summary = look(writer.path, "SELECT reason, count FROM rejected_summary ORDER BY reason")
    assert summary == [("not_json", 3), ("too_deep", 3)]


def test_the_ring_keeps_the_newest_rows_and_counts_what_it_drops(
    writer: SpoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool.insertion, "REJECTED_KEPT_ROWS", 10)
    for n in range(7):
        writer.append([], [rejection(b"%d" % (4 * n + i)) for i in range(4)], {"rejected": 4})
    kept = [int(str(p)) for (p,) in look(writer.path, "SELECT payload FROM rejected ORDER BY id")]
    assert kept == list(range(18, 28))
    assert writer.counter("rejected_dropped") == 18
    assert writer.counter("rejected") == 28
    assert look(writer.path, "SELECT count FROM rejected_total") == [(28,)]


def test_the_ring_is_bounded_in_bytes_and_its_sum_stays_true(writer: SpoolWriter) -> None:
    writer.rejected_max_bytes = 2000
    for n in range(30):
        writer.append([], [rejection(bytes(17 * n % 300))] * 3, {})
        ((rows, size),) = look(
            writer.path,
            "SELECT count(*), sum(length(payload) + length(topic) + length(detail) + 100) "
            "FROM rejected_row",
        )
        assert int(str(size)) <= 2000
        assert writer.counter("rejected_kept_bytes") == size
        assert writer.counter("rejected_dropped") == 3 * (n + 1) - int(str(rows))


def test_one_rejected_message_above_the_rings_limit_is_still_kept(writer: SpoolWriter) -> None:
    writer.rejected_max_bytes = 10
    writer.append([], [rejection(b"a"), rejection(b"b" * 50)], {})
    assert look(writer.path, "SELECT payload_bytes FROM rejected") == [(50,)]


def test_the_ring_counts_topics_and_details_too(writer: SpoolWriter) -> None:
    writer.rejected_max_bytes = 100_000
    topic, detail = "ü" * 1000, "d" * 1000
    rows = [(n, "topic_shape", detail, topic, b"", 0, 1, 0) for n in range(100)]
    writer.append([], rows, {})
    ((kept,),) = look(writer.path, "SELECT count(*) FROM rejected_row")
    assert kept == 100_000 // (2000 + 1000 + 100)
    assert writer.counter("rejected_dropped") == 100 - int(str(kept))
    assert writer.counter("rejected_kept_bytes") == 3100 * int(str(kept))


def test_one_rejected_message_takes_a_quarter_of_the_ring_at_most(writer: SpoolWriter) -> None:
    writer.rejected_max_bytes = 32 * 1024
    writer.append([], [rejection(bytes(65_536))], {})
    ((stored, whole),) = look(
        writer.path, "SELECT length(payload), payload_bytes FROM rejected_row"
    )
    assert (stored, whole) == (8 * 1024, 65_536)


def test_what_falls_out_of_the_ring_at_once_is_counted_and_never_written(
    writer: SpoolWriter,
) -> None:
    writer.rejected_max_bytes = 100_000
    writer.checkpoint()
    writer.append([], [rejection(bytes(20_000)) for _ in range(100)], {"rejected": 100})
    assert writer.wal_bytes() < 200_000
    assert look(writer.path, "SELECT count(*) FROM rejected_row") == [(4,)]
    assert look(writer.path, "SELECT count FROM rejected_total") == [(100,)]
    assert writer.counter("rejected_dropped") == 96


def test_the_ring_can_be_trimmed_to_nothing_and_begins_again(writer: SpoolWriter) -> None:
    writer.append([], [rejection(b"%d" % n) for n in range(10)], {})
    assert writer.trim_rejected(0) == 10
    assert writer.counter("rejected_kept_bytes") == 0
    assert writer.counter("rejected_dropped") == 10
    assert writer.trim_rejected(0) == 0
    writer.append([], [rejection(b"next")], {})
    assert look(writer.path, "SELECT payload FROM rejected") == [("next",)]
    assert writer.counter("rejected_kept_bytes") > 0


def progress(seq: int, epoch: str, sink: str = "pubsub", *, enabled: bool = True) -> SinkProgress:
    return SinkProgress(sink, enabled, epoch, seq, state="delivering", as_of_us=1_000_000)


def test_another_environment_is_refused_while_a_sink_has_a_backlog(writer: SpoolWriter) -> None:
    claim_environment(writer, "DEV", [])
    writer.append([new_reading(n) for n in range(3)], [], {})
    with pytest.raises(WrongEnvironmentError, match="1 for pubsub"):
        claim_environment(writer, "PRD", [progress(2, writer.epoch)])
    with pytest.raises(WrongEnvironmentError, match="3 for pubsub"):
        claim_environment(writer, "PRD", [SinkProgress("pubsub", enabled=True)])
    assert writer.meta("app_env") == "DEV"
    claim_environment(writer, "PRD", [progress(3, writer.epoch)])
    assert writer.meta("app_env") == "PRD"


def test_the_tail_of_event_ids_is_the_newest_in_the_order_spooled(writer: SpoolWriter) -> None:
    rows = [new_reading(n) for n in range(10)]
    writer.append(rows, [], {})
    assert writer.tail_event_ids(3) == [row[0] for row in rows[7:]]
    assert writer.tail_event_ids(0) == []
    assert len(writer.tail_event_ids(100)) == 10


@pytest.mark.parametrize("count", [1, 49, 50, 51, 149, 150])
def test_a_batch_of_any_size_is_numbered_in_the_order_given(
    writer: SpoolWriter, count: int
) -> None:
    rows = [new_reading(n, payload=b"\xff\0" * n, received_us=n) for n in range(count)]
    writer.append([new_reading(999)], [], {})
    writer.append(rows, [], {})
    reader = SpoolReader.open(writer.path.parent)
    stored = reader.read_after(1, 1_000, 1_000_000)
    reader.close()
    assert stored == [(2 + n, *row) for n, row in enumerate(rows)]
    kinds = "SELECT DISTINCT typeof(event_id), typeof(payload) FROM reading_row"
    with closing(sqlite3.connect(writer.path)) as conn:
        assert conn.execute(kinds).fetchall() == [("blob", "blob")]


def test_the_log_is_worked_off_when_that_is_due_and_in_no_commit(writer: SpoolWriter) -> None:
    writer.checkpoint()
    at_first = writer.path.stat().st_size
    for number in range(200):
        writer.append([new_reading(number, payload=b"x" * 400)], [], {"received": 1})
        writer.checkpoint_if_due()
    assert writer.path.stat().st_size == at_first, "not due"
    for number in range(200, 400):
        writer.append([new_reading(number, payload=b"x" * 400)], [], {"received": 1})
    assert writer.path.stat().st_size == at_first, "no commit does it"
    writer.checkpoint_if_due()
    assert writer.path.stat().st_size > at_first


def test_the_log_stays_bounded_where_payloads_are_large(writer: SpoolWriter) -> None:
    for number in range(400):
        writer.append([new_reading(number, payload=b"x" * 65_536)], [], {})
    assert writer.wal_bytes() < 1.6 * 1_000 * 4_120


@pytest.mark.parametrize("payload_bytes", [150, 1_000])
def test_the_log_stays_bounded_while_readings_leave(
    writer: SpoolWriter, payload_bytes: int
) -> None:
    rows = [new_reading(number, payload=b"x" * payload_bytes) for number in range(500)]
    for _ in range(40):
        writer.append(rows, [], {})
        writer.checkpoint_if_due()
    for seq in range(300, 20_000, 300):
        writer.delete_through(seq, "pruned")
        writer.append(rows[:20], [], {})
        writer.checkpoint_if_due()
    assert writer.wal_bytes() < 1.6 * 1_000 * 4_120


def test_readings_that_leave_make_the_log_longer(writer: SpoolWriter) -> None:
    for _ in range(32):
        writer.append([new_reading(number) for number in range(500)], [], {})
    writer.checkpoint()
    said: list[str] = []
    writer._conn.set_trace_callback(said.append)  # noqa: SLF001 - the log itself tells nobody
    for seq in range(800, 16_001, 800):
        writer.delete_through(seq, "pruned")
    writer.checkpoint_if_due()
    assert any("wal_checkpoint(PASSIVE)" in statement for statement in said)


def test_a_long_log_is_known_when_the_spool_is_opened_again(writer: SpoolWriter) -> None:
    for number in range(250):
        writer.append([new_reading(number, payload=b"x" * 16_384)], [], {})
    reader = SpoolReader.open(writer.path.parent)  # or the closing works the log off
    writer.close()
    again = SpoolWriter.open(writer.path.parent)
    at_first = again.path.stat().st_size
    again.checkpoint_if_due()
    assert again.path.stat().st_size > at_first
    again.close()
    reader.close()


def test_deleting_by_age_stops_at_the_first_that_is_younger(writer: SpoolWriter) -> None:
    ages = [10, 20, 99, 30, 40]
    writer.append([new_reading(n, received_us=age) for n, age in enumerate(ages)], [], {})
    assert writer.delete_through(5, "pruned", older_than_us=50) == 2
    assert (writer.first_seq(), writer.counter("pruned")) == (3, 2)


def test_free_pages_go_back_to_the_file_system(writer: SpoolWriter) -> None:
    writer.append([new_reading(n, payload=bytes(2000)) for n in range(500)], [], {})
    writer.checkpoint()
    before = writer.path.stat().st_size
    writer.delete_through(500, "pruned")
    assert writer.free_bytes() > before // 2
    writer.return_space(10**9)
    writer.checkpoint()
    assert writer.path.stat().st_size < before // 2
    assert writer.free_bytes() == 0
