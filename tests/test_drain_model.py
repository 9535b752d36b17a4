"""The drain loop against a service that misbehaves as it likes, with crashes at any step.

A crash comes at any row, and before or after any transaction of the sink's file; it takes what the
cursor lags behind.
"""

import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forwarder.sink import Delivery
from spool import Reading, SinkState
from tests.test_drain import SITES, Bench, RandomSink
from tests.test_spool_writer import look

ROWS_MAX = 900
"""Below what RandomSink has made up its mind about."""

LAG_ROWS = 8
"""Small, so that this bound is met as well: a full batch may wait to be noted, two may not."""


class CrashError(BaseException):
    """The process is gone; nothing of what it still had in mind happens."""


class MortalState(SinkState):
    """Has the process killed before or after one of its transactions."""

    steps_left: ClassVar[int | None] = None

    @classmethod
    def step(cls) -> None:
        """Stand before or behind a transaction."""
        if cls.steps_left is not None:
            cls.steps_left -= 1
            if cls.steps_left < 0:
                cls.steps_left = None
                raise CrashError

    @contextmanager
    def transaction(self, operation: str) -> Iterator[sqlite3.Connection]:
        """Crash before it, or after its commit."""
        self.step()
        with super().transaction(operation) as conn:
            yield conn
        self.step()


class MoodySink(RandomSink):
    """Is as well as it is told to be, and has the process killed after some rows."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, 0.4)
        self.crash_after: int | None = None

    def feel(self, trouble: float) -> None:
        """Be well (0), away (2), or anything between."""
        self._trouble = trouble

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Deliver, and crash before the answer is heard if it is time."""
        if self.crash_after is not None and self.crash_after < len(rows):
            rows = rows[: self.crash_after]
            if rows:
                super().deliver(rows)
            raise CrashError
        if self.crash_after is not None:
            self.crash_after -= len(rows)
        return super().deliver(rows)


class DrainMachine(RuleBasedStateMachine):
    """A collector that appends, prunes and drops; a forwarder that lives until it crashes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("forwarder.drain.LAG_MAX_ROWS", LAG_ROWS)
        self.holder = tempfile.TemporaryDirectory()
        self.bench = Bench(Path(self.holder.name))
        self.open_again()
        self.crashes = 0
        self.sink = self.make_sink()
        self.position = 0
        self.gone = 0
        """Up to there the rows have left the spool."""

    def make_sink(self) -> MoodySink:
        """Return the service."""
        return MoodySink(0)

    def open_again(self) -> None:
        """Take up the sink's file, as the next process does."""
        self.bench.state.close()
        self.bench.state = MortalState.open(self.bench.directory, "pubsub")

    def teardown(self) -> None:
        self.patch.undo()
        self.sink.feel(0)
        self.drain(waits=10_000, crash_after=None)
        assert self.bench.drained()
        self.the_books_are_right()
        self.bench.close()
        self.holder.cleanup()

    @precondition(lambda self: self.bench.writer.last_seq() < ROWS_MAX)
    @rule(rows=st.integers(1, 20))
    def append(self, rows: int) -> None:
        self.bench.append(rows)

    @rule(trouble=st.sampled_from([0.0, 0.1, 0.5, 0.9, 2.0]))
    def the_service_changes_its_mood(self, trouble: float) -> None:
        self.sink.feel(trouble)

    @rule(waits=st.integers(1, 6), crash_after=st.none() | st.integers(0, 12))
    def drain(self, waits: int, crash_after: int | None) -> None:
        """Run one forwarder for a while; it stops in order, or crashes."""
        bench = self.bench
        self.sink.crash_after = crash_after
        try:
            bench.drain(self.sink, lambda: bench.drained() or len(bench.stop.waits) >= waits)
        except CrashError:
            self.crashes += 1
            self.what_a_crash_repeats_is_bounded()
            self.open_again()
        self.sink.crash_after = MortalState.steps_left = None

    def what_a_crash_repeats_is_bounded(self) -> None:
        """Hold a crash to it: the batch in hand, and what the cursor may lag behind."""
        rows = look(self.bench.state.path, "SELECT seq FROM cursor")
        noted = int(str(rows[0][0])) if rows else 0
        unnoted = {row[0] for row in self.sink.acknowledged if row[0] > noted}
        assert len(unnoted) <= self.sink.max_rows + LAG_ROWS - 1

    @precondition(lambda self: self.bench.writer.last_seq() < ROWS_MAX)
    @rule(crash_after=st.integers(8, 40))
    def drain_well_and_crash(self, crash_after: int) -> None:
        """Run while the service is well, until the process is killed."""
        self.sink.feel(0)
        self.bench.append(40)
        self.drain(40, crash_after)

    @rule(waits=st.integers(1, 6), steps=st.integers(0, 12))
    def drain_and_crash_at_a_transaction(self, waits: int, steps: int) -> None:
        """Run one forwarder until it has stood so often before or behind a transaction."""
        MortalState.steps_left = steps
        self.drain(waits, None)

    @rule()
    def prune(self) -> None:
        if self.position > self.gone:
            self.bench.writer.delete_through(self.position, "pruned")
            self.gone = self.position

    @precondition(lambda self: self.gone < self.bench.writer.last_seq())
    @rule(rows=st.integers(1, 5))
    def drop(self, rows: int) -> None:
        through = min(max(self.gone, self.position) + rows, self.bench.writer.last_seq())
        self.bench.writer.delete_through(through, "dropped")
        self.gone = through

    @invariant()
    def the_cursor_passes_what_is_settled_and_nothing_else(self) -> None:
        state = self.bench.state
        position = state.position(self.bench.writer.epoch)
        assert position >= self.position, "it went back"
        self.position = position
        lost = {
            seq
            for first, last in look(state.path, "SELECT first_seq, last_seq FROM gap")
            for seq in range(int(str(first)), int(str(last)) + 1)
        }
        there = {row[0] for row in self.sink.acknowledged} | set(self.sink.dead)
        assert there | lost >= set(range(1, position + 1))
        assert max(lost, default=0) <= min(position, self.gone)

    @invariant()
    def the_books_are_right(self) -> None:
        assert sum(self.bench.counters()) == self.bench.state.position(self.bench.writer.epoch)
        # A dead letter behind the cursor is there, and counted when the cursor passes it.
        query = "SELECT seq FROM dead_letter WHERE seq <= (SELECT seq FROM cursor)"
        kept = [int(str(seq)) for (seq,) in look(self.bench.state.path, query)]
        assert len(kept) == len(set(kept)) == self.bench.counters()[1]
        assert set(kept) <= set(self.sink.dead)

    @invariant()
    def what_comes_first_comes_in_order(self) -> None:
        for site in SITES:
            firsts = list(dict.fromkeys(r[0] for r in self.sink.acknowledged if r[4] == site))
            assert firsts == sorted(firsts)


TestDrainModel = DrainMachine.TestCase
TestDrainModel.settings = settings(max_examples=25, stateful_step_count=20)
