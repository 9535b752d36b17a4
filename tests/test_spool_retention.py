"""Nothing leaves the spool that a sink still needs, and the limits hold all the same."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spool import (
    Ballast,
    Budget,
    Level,
    Retention,
    Settlement,
    SinkFile,
    SinkProgress,
    SinkState,
    SpoolWriter,
    sink_path,
)
from spool.retention import DROP_SHARE, PRUNE_STEP_ROWS
from tests.test_spool_writer import look, new_reading, progress

MIB = 1024 * 1024
HOUR_US = 3_600_000_000


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SpoolWriter]:
    opened = SpoolWriter.open(tmp_path)
    yield opened
    opened.close()


def fill(writer: SpoolWriter, rows: int, received_us: int = 0) -> None:
    writer.append([new_reading(n, received_us=received_us) for n in range(rows)], [], {})


def prune_all(
    writer: SpoolWriter, sinks: list[SinkProgress], now_us: int = HOUR_US, *, keep_us: int = 0
) -> int:
    total = 0
    while step := Retention(keep_us).prune_step(writer, sinks, now_us, pressure=False):
        assert step <= PRUNE_STEP_ROWS
        total += step
    return total


def test_pruning_stops_at_the_slowest_enabled_sink(writer: SpoolWriter) -> None:
    fill(writer, 3000)
    sinks = [
        progress(2500, writer.epoch),
        progress(1700, writer.epoch, "bigquery"),
        progress(3, writer.epoch, "disabled", enabled=False),
    ]
    assert prune_all(writer, sinks) == 1700
    assert (writer.first_seq(), writer.counter("pruned")) == (1701, 1700)


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "another epoch", "no cursor"])
def test_nothing_is_pruned_on_account_of_a_sink_that_cannot_be_read(
    tmp_path: Path, writer: SpoolWriter, kind: str
) -> None:
    fill(writer, 10)
    path = sink_path(tmp_path, "bigquery")
    if kind == "empty":
        path.touch()
    elif kind == "garbage":
        path.write_bytes(b"garbage" * 1000)
    elif kind != "missing":
        state = SinkState.open(tmp_path, "bigquery")
        if kind == "another epoch":
            state.settle(Settlement("another", 10, 10))
    sinks = [progress(10, writer.epoch), SinkFile(tmp_path, "bigquery", enabled=True).read()]
    assert prune_all(writer, sinks) == 0
    assert Retention(0).prune_step(writer, sinks, HOUR_US, pressure=True) == 0


def test_delivered_rows_stay_for_the_retention_unless_space_is_short(writer: SpoolWriter) -> None:
    fill(writer, 10, received_us=HOUR_US)
    sinks = [progress(8, writer.epoch)]
    assert prune_all(writer, sinks, 2 * HOUR_US, keep_us=HOUR_US) == 0
    assert prune_all(writer, sinks, 2 * HOUR_US + 1, keep_us=HOUR_US) == 8
    fill(writer, 10, received_us=HOUR_US)
    sinks = [progress(15, writer.epoch)]
    assert Retention(HOUR_US).prune_step(writer, sinks, 0, pressure=True) == 7


def test_with_no_sink_enabled_only_the_retention_counts(writer: SpoolWriter) -> None:
    fill(writer, 10, received_us=5)
    sinks = [progress(0, writer.epoch, enabled=False)]
    assert prune_all(writer, sinks, HOUR_US, keep_us=HOUR_US) == 0
    assert prune_all(writer, sinks, HOUR_US + 6, keep_us=HOUR_US) == 10


def test_a_cursor_beyond_the_end_prunes_no_more_than_there_is(writer: SpoolWriter) -> None:
    fill(writer, 10)
    assert prune_all(writer, [progress(99, writer.epoch)]) == 10
    fill(writer, 1)
    assert writer.first_seq() == writer.last_seq() == 11


def test_dropping_takes_the_oldest_in_small_steps_and_remembers_how_far(
    writer: SpoolWriter,
) -> None:
    fill(writer, 1000)
    sinks = [progress(0, writer.epoch)]
    retention = Retention(0)
    assert retention.drop_step(writer, sinks) == 1000 // DROP_SHARE
    assert writer.first_seq() == 21
    assert writer.meta("dropped_through_seq") == "20"
    while retention.drop_step(writer, sinks):
        continue
    assert (writer.counter("dropped"), writer.last_seq()) == (1000, 1000)
    assert writer.meta("dropped_through_seq") == "1000"
    assert look(writer.path, "SELECT count(*) FROM reading_row") == [(0,)]


def test_dropping_from_an_empty_spool_does_nothing(writer: SpoolWriter) -> None:
    assert Retention(0).drop_step(writer, []) == 0
    assert writer.meta("dropped_through_seq") == ""


@settings(max_examples=40)
@given(
    rows=st.integers(0, 60),
    cursors=st.lists(st.tuples(st.integers(0, 70), st.booleans(), st.booleans()), max_size=3),
    ages=st.lists(st.integers(0, 20), min_size=60, max_size=60),
    now_and_pressure=st.tuples(st.integers(0, 30), st.booleans()),
)
def test_no_step_ever_passes_a_sink_or_leaves_a_hole(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    cursors: list[tuple[int, bool, bool]],
    ages: list[int],
    now_and_pressure: tuple[int, bool],
) -> None:
    now, pressure = now_and_pressure
    writer = SpoolWriter.open(tmp_path_factory.mktemp("spool"))
    writer.append([new_reading(n, received_us=ages[n]) for n in range(rows)], [], {})
    sinks = [
        progress(seq, writer.epoch if ours else "another", f"s{i}", enabled=enabled)
        for i, (seq, ours, enabled) in enumerate(cursors)
    ]
    while Retention(5).prune_step(writer, sinks, now, pressure=pressure):
        continue
    left = [int(str(seq)) for (seq,) in look(writer.path, "SELECT seq FROM reading_row")]
    assert left == list(range(rows - len(left) + 1, rows + 1))
    gone = range(1, rows - len(left) + 1)
    needed = [p.position_in(writer.epoch) for p in sinks if p.enabled]
    assert all(seq <= position for position in needed for seq in gone)
    assert pressure or all(ages[seq - 1] < now - 5 for seq in gone)
    assert writer.counter("pruned") == len(gone)
    writer.close()


def test_the_levels_come_at_80_90_and_100_percent(writer: SpoolWriter) -> None:
    fill(writer, 2000)
    used = writer.used_bytes()

    def level(share: float, incoming: int = 0) -> Level:
        return Budget(int(used / share)).level(writer, incoming)

    assert level(0.79) is Level.GOOD
    assert level(0.81) is Level.WARN
    assert level(0.91) is Level.PRESSURE
    assert level(1.01) is Level.FULL
    assert level(0.91, incoming=used) is Level.FULL
    assert level(0.50, incoming=100 * used) is Level.GOOD  # never refused for its size alone


def test_free_pages_do_not_count_as_used(writer: SpoolWriter) -> None:
    fill(writer, 5000)
    used = writer.used_bytes()
    writer.delete_through(5000, "pruned")
    assert writer.used_bytes() < used / 4


def test_a_log_that_a_reader_holds_open_does_not_count_as_used(
    writer: SpoolWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(writer, 2000)
    budget = Budget(2 * writer.used_bytes())
    monkeypatch.setattr(SpoolWriter, "wal_bytes", lambda _: 10**12)
    assert budget.level(writer) is Level.GOOD


def test_the_ballast_holds_its_space_and_gives_it_back(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path, 64 * MIB)
    assert not ballast.held
    assert not ballast.release()
    assert ballast.take()
    assert ballast.take()
    file = tmp_path / "ballast"
    assert file.stat().st_blocks * 512 >= MIB
    assert ballast.release()
    assert not file.exists()


def test_a_ballast_that_was_half_made_is_completed(tmp_path: Path) -> None:
    (tmp_path / "ballast").write_bytes(b"x")
    ballast = Ballast(tmp_path, 64 * MIB)
    assert not ballast.held
    assert ballast.take()
    assert ballast.held


@pytest.mark.parametrize("call", ["open", "posix_fallocate"])
def test_a_disk_that_has_no_room_for_the_ballast_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert not Ballast(tmp_path, 64 * MIB).take()
    assert not (tmp_path / "ballast").exists()


def test_a_small_limit_has_a_small_ballast(tmp_path: Path) -> None:
    Ballast(tmp_path, 640 * 1024).take()
    assert (tmp_path / "ballast").stat().st_size == 10 * 1024
    Ballast(tmp_path, 10**15).take()
    assert (tmp_path / "ballast").stat().st_size == 16 * MIB
