"""What was delivered may be noted some moments later: never out of order, never twice, in time."""

import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from forwarder.sink import Delivery
from spool import (
    LAG_MAX_ROWS,
    LAG_MAX_S,
    AheadStep,
    AppendJournal,
    Cut,
    DiskFullError,
    Gap,
    Reading,
    Settlement,
    SinkState,
    StorageFaultError,
    sinkstate,
)
from spool.connection import USUAL_PAGE_BYTES
from spool.locks import OwnerConnection, commit
from tests.harness.wal import commits
from tests.test_drain import TRANSIENT, Bench, RandomSink, ScriptedSink
from tests.test_spool_sinkstate import EPOCH, dead
from tests.test_spool_writer import look


class Clock:
    """Stands still."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> Iterator[SinkState]:
    opened = SinkState.open(tmp_path, "pubsub")
    opened.let_cursor_lag(LAG_MAX_S, LAG_MAX_ROWS, clock)
    opened.settle(Settlement(EPOCH, 10, 10))
    yield opened
    opened.close()


def noted(path: Path) -> tuple[int, int]:
    """Return what the file has: the cursor, and how many it counts as delivered."""
    ((seq,),) = look(path, "SELECT seq FROM cursor")
    ((count,),) = look(path, "SELECT value FROM counter WHERE name = 'delivered'")
    return int(str(seq)), int(str(count))


def test_by_itself_a_file_notes_each_step_at_once(tmp_path: Path) -> None:
    opened = SinkState.open(tmp_path, "bigquery")
    for seq in (5, 7):
        opened.settle(Settlement(EPOCH, seq, 5 if seq == 5 else 2))
        assert noted(opened.path) == (seq, seq)
    opened.close()


def test_the_first_step_in_a_spool_is_noted_at_once(state: SinkState) -> None:
    assert noted(state.path) == (10, 10)
    state.settle(Settlement(EPOCH, 12, 2))
    state.settle(Settlement("another", 3, 3))
    assert noted(state.path) == (3, 15)


def test_the_first_step_of_a_process_is_noted_at_once(state: SinkState, clock: Clock) -> None:
    state.close()
    again = SinkState.open(state.path.parent, "pubsub")
    again.let_cursor_lag(LAG_MAX_S, LAG_MAX_ROWS, clock)
    again.settle(Settlement(EPOCH, 12, 2))
    assert noted(again.path) == (12, 12)
    again.settle(Settlement(EPOCH, 13, 1))
    assert noted(again.path) == (12, 12)
    again.close()


def test_steps_over_delivered_rows_wait_for_their_time_and_are_seen_here_at_once(
    state: SinkState, clock: Clock
) -> None:
    for seq in (11, 14):
        state.settle(Settlement(EPOCH, seq, seq - state.position(EPOCH)))
        clock.now_s += LAG_MAX_S / 4
    assert noted(state.path) == (10, 10)
    assert (state.position(EPOCH), state.position("another")) == (14, 0)
    assert state.lag_due_in_s == LAG_MAX_S / 2
    clock.now_s += LAG_MAX_S / 2
    assert state.lag_due_in_s == 0
    state.settle(Settlement(EPOCH, 15, 1))
    assert noted(state.path) == (15, 15)
    assert state.lag_due_in_s is None


def test_as_many_rows_as_are_worth_a_commit_wait_for_nothing(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 11, 1))
    state.settle(Settlement(EPOCH, 9 + LAG_MAX_ROWS, LAG_MAX_ROWS - 2))
    assert noted(state.path) == (10, 10)
    state.settle(Settlement(EPOCH, 10 + LAG_MAX_ROWS, 1))
    assert noted(state.path) == (10 + LAG_MAX_ROWS, 10 + LAG_MAX_ROWS)


@pytest.mark.parametrize(
    "step",
    [
        lambda s: s.settle(Settlement(EPOCH, 13, 1, dead=[dead(13)])),
        lambda s: s.settle(Settlement(EPOCH, 13, 0, gaps=[Gap(13, 13, "left")])),
        lambda s: s.settle(Settlement(EPOCH, 13, 0, dead_ahead=1)),
        lambda s: s.settle(Settlement(EPOCH, 13, 1), AheadStep(20, {"S1": (14, "why")})),
    ],
)
def test_what_more_there_is_to_note_is_noted_at_once_with_what_waited(
    state: SinkState, step: Callable[[SinkState], None]
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    step(state)
    assert noted(state.path)[0] == 13
    assert noted(state.path)[1] in {12, 13}


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.set_status("retrying", "why"),
        lambda s: s.beat.begin("DEV"),
        lambda s: s.remember({"key": "value"}),
        lambda s: s.counters(),
        lambda s: AppendJournal(s).add(EPOCH, [Cut(0, 13, 14, 2)]),
        lambda s: AppendJournal(s).begin_stream("a stream"),
        lambda s: AppendJournal(s).load(EPOCH),
        lambda s: s.catch_up(),
    ],
)
def test_whatever_is_written_takes_along_what_waited(
    state: SinkState, write: Callable[[SinkState], None]
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    write(state)
    assert noted(state.path) == (12, 12)
    assert state.lag_due_in_s is None


def test_what_waited_is_still_to_be_noted_where_the_file_could_not_be_written(
    state: SinkState,
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    with pytest.raises(StorageFaultError), state.transaction("fail") as conn:
        conn.execute("INSERT INTO no_such_table VALUES (1)")
    assert noted(state.path) == (10, 10)
    assert state.position(EPOCH) == 12
    state.catch_up()
    assert noted(state.path) == (12, 12)


@contextmanager
def a_commit_that_takes_place_and_fails() -> Iterator[None]:
    def commit_and_fail(conn: OwnerConnection) -> None:
        commit(conn)
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinkstate, "commit", commit_and_fail)
        with pytest.raises(StorageFaultError):
            yield


def test_a_commit_that_failed_and_took_place_counts_once(
    state: SinkState,
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    with a_commit_that_takes_place_and_fails():
        state.catch_up()
    assert noted(state.path) == (12, 12)
    state.settle(Settlement(EPOCH, 13, 1))
    state.catch_up()
    assert noted(state.path) == (13, 13)


def test_after_a_later_step_that_took_place_the_cursor_does_not_go_back(
    state: SinkState,
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    with a_commit_that_takes_place_and_fails():
        state.settle(Settlement(EPOCH, 15, 1, gaps=[Gap(13, 14, "left")]))
    assert state.position(EPOCH) == 15
    state.set_status("delivering", "")
    assert noted(state.path) == (15, 13)


def test_after_a_new_epoch_that_took_place_the_cursor_does_not_go_back_to_the_old_one(
    state: SinkState,
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    with a_commit_that_takes_place_and_fails():
        state.settle(Settlement("another", 3, 3))
    state.set_status("delivering", "")
    assert (state.known_epoch(), state.position("another")) == ("another", 3)
    assert noted(state.path) == (3, 15)


def test_whatever_fails_within_a_transaction_takes_it_back(
    state: SinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.settle(Settlement(EPOCH, 12, 2))

    def unreadable(*_: object) -> None:
        raise StorageFaultError("read the cursor on pubsub.db failed")

    with monkeypatch.context() as patch:
        patch.setattr(SinkState, "_noted", unreadable)
        with pytest.raises(StorageFaultError):
            state.set_status("on hold", "")
    state.set_status("stopped", "why")  # no transaction is left open
    assert look(state.path, "SELECT state FROM status") == [("stopped",)]
    assert noted(state.path) == (12, 12)


def test_a_kill_takes_what_waited_and_nothing_else(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 12, 2))
    # No close: as after SIGKILL, another connection finds the file and its log.
    again = SinkState.open(state.path.parent, "pubsub")
    assert again.position(EPOCH) == 10
    assert again.counters() == {"delivered": 10}
    again.close()


def test_a_commit_has_as_few_pages_as_can_be(tmp_path: Path) -> None:
    opened = SinkState.open(tmp_path, "bigquery")
    opened.beat.begin("DEV")
    journal = AppendJournal(opened)
    journal.begin_stream(f"projects/p/datasets/d/tables/t/streams/{'x' * 80}")
    opened.settle(Settlement(EPOCH, 1, 1))
    opened.settle(Settlement(EPOCH, 2, 1))
    assert len(commits(opened.path)[-1]) == 2, "cursor, counter"
    opened.let_cursor_lag(LAG_MAX_S, sys.maxsize, Clock())
    before = len(commits(opened.path))
    for n in range(3):
        journal.add(EPOCH, [Cut(2 * n, 3 + 2 * n, 4 + 2 * n, 2)])
        opened.settle(Settlement(EPOCH, 4 + 2 * n, 2))
    made = commits(opened.path)[before:]
    assert len(made) == 3, "the step goes along with the next batch's journal"
    assert [len(set(pages)) for pages in made[1:]] == [4, 4], "these, and the journal's two"
    assert [len(pages) for pages in made[1:]] == [4, 4], "each of them once"
    opened.close()


def test_a_new_file_has_small_pages_and_an_older_one_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sinkstate, "PAGE_BYTES", USUAL_PAGE_BYTES)
        SinkState.open(tmp_path, "pubsub").close()
    for sink, page_bytes, pages in (("pubsub", 4096, 1000), ("bigquery", 1024, 4000)):
        opened = SinkState.open(tmp_path, sink)
        opened.settle(Settlement(EPOCH, 1, 0, [dead(1)]))
        assert look(opened.path, "PRAGMA page_size") == [(page_bytes,)]
        conn = opened._conn  # noqa: SLF001 - the pragma of this very connection is the claim
        # The same bytes of the log.
        assert conn.execute("PRAGMA wal_autocheckpoint").fetchone() == (pages,)
        opened.checkpoint_in_commits(wanted=False)
        opened.checkpoint_in_commits(wanted=True)
        assert conn.execute("PRAGMA wal_autocheckpoint").fetchone() == (pages,)
        assert look(opened.path, "PRAGMA integrity_check") == [("ok",)]
        opened.close()


class Watching(RandomSink):
    """Delivers everything, and notes before each delivery what the file has."""

    def __init__(self, bench: Bench, gather_s: float = 0.2) -> None:
        super().__init__(0, 0.0)
        self.bench = bench
        self.gather_s = gather_s
        self.delivered: list[tuple[float, int]] = []
        """When, and through which seq."""

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        delivery = super().deliver(rows)
        self.delivered.append((self.bench.stop.now_s, rows[-1][0]))
        return delivery


class JournalledWatching(Watching):
    """Keeps a journal, whose next entry takes the settlement along."""

    def resume(self, _: str) -> int:
        return 0

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        cut = Cut(rows[0][0], rows[0][0], rows[-1][0], len(rows))
        AppendJournal(self.bench.state).add(self.bench.writer.epoch, [cut])
        return super().deliver(rows)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def run_calmly(bench: Bench, sink: Watching, commits_wanted: int, until_s: float) -> list[float]:
    """Have readings come with each wait; return how long delivered ones went unnoted."""
    lags: list[float] = []
    writes = 0

    def until() -> bool:
        nonlocal writes
        if bench.writer.last_seq() < commits_wanted:
            bench.append(1)
        ((seq,),) = look(bench.state.path, "SELECT coalesce(max(seq), 0) FROM cursor")
        unnoted = [at for at, through in sink.delivered if through > int(str(seq))]
        lags.append(bench.stop.now_s - unnoted[0] if unnoted else 0.0)
        return bench.stop.now_s > until_s

    bench.append(1)
    bench.drain(sink, until)
    return lags


def test_at_calm_traffic_a_second_of_it_is_one_commit(bench: Bench) -> None:
    before = len(commits(bench.state.path))
    lags = run_calmly(bench, Watching(bench), 50, 10.5)
    assert 0.5 < max(lags) <= LAG_MAX_S + 1e-6
    # One each second, the first of the spool, and those of the begin and the end.
    assert len(commits(bench.state.path)) - before <= 11 + 1 + 4


def test_when_nothing_more_comes_the_last_step_is_noted_in_time(bench: Bench) -> None:
    seen: list[tuple[float, int]] = []

    def until() -> bool:
        if bench.writer.last_seq() == 1:
            bench.append(1)
        ((seq,),) = look(bench.state.path, "SELECT coalesce(max(seq), 0) FROM cursor")
        seen.append((bench.stop.now_s, int(str(seq))))
        return bench.stop.now_s > 3

    bench.append(1)
    sink = Watching(bench)
    bench.drain(sink, until)
    last_unnoted_at = max(at for at, seq in seen if seq < 2)
    assert last_unnoted_at - sink.delivered[-1][0] == pytest.approx(LAG_MAX_S, abs=0.01)


def test_a_journalled_sinks_step_waits_for_the_next_batch(bench: Bench) -> None:
    before = len(commits(bench.state.path))
    sink = JournalledWatching(bench, gather_s=1.0)
    lags = run_calmly(bench, sink, 50, 20.5)
    assert max(lags) <= 2.0
    batches = len(sink.delivered)
    assert batches > 15
    assert len(commits(bench.state.path)) - before <= batches + 6


def test_it_is_noted_before_a_backoff_begins(bench: Bench) -> None:
    bench.append(10)

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        if call == 2:
            return Delivery(list(rows), fault=TRANSIENT)
        return None if call == 1 else Delivery(list(rows[1:]), fault=TRANSIENT)

    sink = ScriptedSink(answer)
    backoffs: list[tuple[object, ...]] = []

    def until() -> bool:
        if bench.stop.waits[-1] > 0.1:
            backoffs.append(look(bench.state.path, "SELECT seq FROM cursor")[0])
        return len(backoffs) == 3

    bench.drain(sink, until)
    # The second is after progress, under the same state as the first: nothing else is written.
    assert backoffs == [(7,), (8,), (9,)]


def test_on_a_full_disk_it_waits_for_room_and_counts_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(1)
    real = SinkState.catch_up
    refused = 0

    def catch_up(state: SinkState) -> None:
        nonlocal refused
        if state.lag_due_in_s is not None and refused < 3:
            refused += 1
            raise DiskFullError("no room")
        real(state)

    monkeypatch.setattr(SinkState, "catch_up", catch_up)

    def until() -> bool:
        if bench.writer.last_seq() < 5:
            bench.append(1)
        return bench.drained() and bench.stop.now_s > 30

    bench.drain(RandomSink(0, 0.0), until)
    assert refused == 3
    assert bench.counters() == (5, 0, 0)


def test_a_stop_notes_everything(bench: Bench) -> None:
    bench.append(20)
    bench.drain(RandomSink(0, 0.0))
    assert look(bench.state.path, "SELECT seq FROM cursor") == [(20,)]


def test_an_error_that_ends_the_forwarder_notes_everything(bench: Bench) -> None:
    bench.append(20)

    def answer(call: int, rows: Sequence[Reading]) -> Delivery | None:
        if call == 3:
            raise RuntimeError(f"a bug, with {len(rows)} rows")
        return None

    with pytest.raises(RuntimeError, match="a bug"):
        bench.drain(ScriptedSink(answer))
    assert look(bench.state.path, "SELECT seq FROM cursor") == [(14,)]
