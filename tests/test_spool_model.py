"""The spool against a list: whatever is done in whatever order, both hold the same."""

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import spool.insertion
from lifecycle import SINKS
from spool import (
    DeadLetter,
    Gap,
    Retention,
    Settlement,
    SinkFile,
    SinkProgress,
    SinkState,
    SpoolReader,
    SpoolWriter,
)
from tests.test_spool_writer import look, new_reading, rejection


class SpoolMachine(RuleBasedStateMachine):
    """Collector and two forwarders on one directory, in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.holder = tempfile.TemporaryDirectory()
        self.directory = Path(self.holder.name)
        self.writer = SpoolWriter.open(self.directory)
        self.reader = SpoolReader.open(self.directory)
        self.states = {sink: SinkState.open(self.directory, sink) for sink in SINKS}
        self.files = {sink: SinkFile(self.directory, sink, enabled=True) for sink in SINKS}
        self.kept_rows = spool.insertion.REJECTED_KEPT_ROWS
        # The model.
        self.rows: list[tuple[int, bytes]] = []
        self.given = 0
        self.cursor = dict.fromkeys(SINKS, 0)
        self.passed = {
            sink: dict.fromkeys(("delivered", "dead_lettered", "dropped"), 0) for sink in SINKS
        }
        self.rejected: list[int] = []
        self.rejected_given = 0
        self.pruned = self.dropped = 0

    def teardown(self) -> None:
        spool.insertion.REJECTED_KEPT_ROWS = self.kept_rows
        self.writer.close()
        self.reader.close()
        for state in self.states.values():
            state.close()
        for file in self.files.values():
            file.close()
        self.holder.cleanup()

    def progress(self) -> list[SinkProgress]:
        return [file.read() for file in self.files.values()]

    @rule(count=st.integers(1, 8), rejected=st.integers(0, 3))
    def append(self, count: int, rejected: int) -> None:
        new = [new_reading(self.given + i) for i in range(count)]
        bad = [rejection(b"%d" % (self.rejected_given + i)) for i in range(rejected)]
        counts = {"received": count + rejected, "spooled": count, "rejected": rejected}
        self.writer.append(new, bad, counts)
        self.rows += [(self.given + i + 1, row[0]) for i, row in enumerate(new)]
        self.given += count
        self.rejected += range(self.rejected_given, self.rejected_given + rejected)
        self.rejected_given += rejected
        if rejected:
            self.rejected = self.rejected[-spool.insertion.REJECTED_KEPT_ROWS :]

    @rule(sink=st.sampled_from(SINKS), rows=st.integers(1, 6), size=st.sampled_from([1, 10**6]))
    def read(self, sink: str, rows: int, size: int) -> None:
        got = self.reader.read_after(self.cursor[sink], rows, size)
        expected = [row for row in self.rows if row[0] > self.cursor[sink]]
        assert [(row[0], row[1]) for row in got] == expected[: 1 if size == 1 else rows]

    @precondition(lambda self: self.rows)
    @rule(sink=st.sampled_from(SINKS), rows=st.integers(1, 6), dead=st.sets(st.integers(0, 5)))
    def settle(self, sink: str, rows: int, dead: set[int]) -> None:
        before = self.cursor[sink]
        got = self.reader.read_after(before, rows, 10**6)
        if not got:
            return
        gone = got[0][0] - before - 1
        gaps = [Gap(before + 1, got[0][0] - 1, "dropped")] if gone else []
        letters = [DeadLetter(row, "invalid", "d") for i, row in enumerate(got) if i in dead]
        delivered = len(got) - len(letters)
        settlement = Settlement(self.reader.epoch, got[-1][0], delivered, letters, gaps)
        self.states[sink].settle(settlement)
        self.cursor[sink] = got[-1][0]
        passed = self.passed[sink]
        passed["delivered"] += delivered
        passed["dead_lettered"] += len(letters)
        passed["dropped"] += gone

    @rule(now=st.sampled_from([0, 2 * 10**15]), pressure=st.booleans())
    def prune(self, now: int, pressure: bool) -> None:  # noqa: FBT001 - drawn by hypothesis
        old = pressure or now > 0
        gone = Retention(0).prune_step(self.writer, self.progress(), now, pressure=pressure)
        slowest = min(self.cursor.values())
        expected = len([1 for seq, _ in self.rows if seq <= slowest]) if old else 0
        assert gone == expected
        self.rows = self.rows[gone:]
        self.pruned += gone

    @rule()
    def drop(self) -> None:
        slowest = min(self.cursor.values())
        if any(seq <= slowest for seq, _ in self.rows):
            return  # the collector prunes first
        gone = Retention(0).drop_step(self.writer, self.progress())
        assert gone == min(1, len(self.rows))
        self.rows = self.rows[gone:]
        self.dropped += gone

    @rule()
    def reopen_writer(self) -> None:
        self.writer.close()
        self.writer = SpoolWriter.open(self.directory)
        assert not self.writer.created

    @rule()
    def reopen_reader(self) -> None:
        self.reader.close()
        self.reader = SpoolReader.open(self.directory)

    @rule(sink=st.sampled_from(SINKS))
    def reopen_state(self, sink: str) -> None:
        self.states[sink].close()
        self.states[sink] = SinkState.open(self.directory, sink)

    @rule(rows=st.integers(1, 12))
    def change_the_rings_limit(self, rows: int) -> None:
        spool.insertion.REJECTED_KEPT_ROWS = rows

    @rule()
    def return_space(self) -> None:
        self.writer.return_space(1 << 20)
        self.writer.checkpoint()

    @invariant()
    def rows_are_the_models(self) -> None:
        assert [(row[0], row[1]) for row in self.reader.read_after(0, 10**6, 10**9)] == self.rows
        assert self.reader.epoch == self.writer.epoch
        assert self.writer.last_seq() == self.reader.last_seq() == self.given
        assert self.writer.first_seq() == (self.rows[0][0] if self.rows else self.given + 1)
        assert self.writer.tail_event_ids(3) == [identity for _, identity in self.rows[-3:]]

    @invariant()
    def counters_add_up(self) -> None:
        counter = self.writer.counter
        assert counter("received") == counter("spooled") + counter("rejected")
        assert counter("spooled") == len(self.rows) + self.pruned + self.dropped
        assert (counter("pruned"), counter("dropped")) == (self.pruned, self.dropped)
        for sink, state in self.states.items():
            counts = state.counters()
            assert {name: counts.get(name, 0) for name in self.passed[sink]} == self.passed[sink]
            assert sum(counts.values()) == self.cursor[sink]
            assert state.position(self.writer.epoch) == self.cursor[sink]

    @invariant()
    def the_ring_is_the_models(self) -> None:
        kept = look(self.writer.path, "SELECT payload FROM rejected ORDER BY id")
        assert [int(str(payload)) for (payload,) in kept] == self.rejected
        assert self.writer.counter("rejected_dropped") == self.rejected_given - len(self.rejected)

    @invariant()
    def the_backlog_is_the_models(self) -> None:
        self.writer.write_progress(self.progress())
        rows = look(self.writer.path, "SELECT sink, pending FROM backlog")
        expected = {
            sink: len([1 for seq, _ in self.rows if seq > self.cursor[sink]]) for sink in SINKS
        }
        assert {str(sink): pending for sink, pending in rows} == expected


TestSpoolModel = SpoolMachine.TestCase
TestSpoolModel.settings = settings(max_examples=30, stateful_step_count=30)
