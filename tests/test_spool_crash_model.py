"""The spool against a list, with processes that are killed and limits that change."""

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from lifecycle import SINKS
from spool import Budget, Level, SinkFile, SinkState, SpoolReader, SpoolWriter
from tests.test_spool_model import SpoolMachine

MODEL = ("rows", "given", "cursor", "passed", "rejected", "rejected_given", "pruned", "dropped")

SHARES = st.sampled_from([0.6, 0.9, 0.0, 0.3, 1.0])
"""Of what a transaction writes; behind the middle, what was meant as one may be two."""


class CrashingMachine(SpoolMachine):
    """The same two forwarders and collector, which may be gone between any two writes."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def copied(self) -> Path:
        """Return a directory with the files as they are now, as a process of its own sees them.

        Without the index: whoever opens the copy finds the log as after a kill of everybody.
        """
        self.copies += 1
        directory = Path(self.holder.name) / f"copy-{self.copies}"
        directory.mkdir()
        files = [f for f in self.directory.glob("*.db*") if not f.name.endswith("-shm")]
        subprocess.run(["cp", *files, directory], check=True)
        return directory

    def live_on(self, directory: Path) -> None:
        """Go on in ``directory``, with processes that know nothing of the past."""
        self.writer.close()
        self.reader.close()
        for sink in SINKS:
            self.states[sink].close()
            self.files[sink].close()
        self.directory = directory
        self.writer = SpoolWriter.open(directory)
        assert not self.writer.created
        self.reader = SpoolReader.open(directory)
        self.states = {sink: SinkState.open(directory, sink) for sink in SINKS}
        self.files = {sink: SinkFile(directory, sink, enabled=True) for sink in SINKS}

    @rule()
    def crash(self) -> None:
        self.live_on(self.copied())

    def torn(self, name: str, share: float, act: Callable[[], object]) -> None:
        """Crash while ``act`` writes the log of a file; what is not whole did not happen.

        Args:
            name: Which file.
            share: How much of what is new in the log was written; 1 for all of it.
            act: One transaction, and what the model makes of it.
        """
        model: dict[str, Any] = {key: copy.deepcopy(getattr(self, key)) for key in MODEL}
        before = self.copied()
        act()
        after = self.copied()
        assert (before / f"{name}.db").read_bytes() == (after / f"{name}.db").read_bytes()
        log = after / f"{name}.db-wal"
        old, new = (before / log.name).read_bytes(), log.read_bytes()
        changed = [n for n in range(len(new)) if old[n : n + 1] != new[n : n + 1]]
        if changed and share < 1:
            end = changed[0] + int(share * (changed[-1] - changed[0]))
            log.write_bytes(new[:end] + old[end:])
            for key, value in model.items():
                setattr(self, key, value)
        self.live_on(after)

    @rule(count=st.integers(1, 8), rejected=st.integers(0, 3), share=SHARES)
    def crash_in_an_append(self, count: int, rejected: int, share: float) -> None:
        self.torn("spool", share, lambda: self.append(count, rejected))

    @precondition(lambda self: self.rows)
    @rule(
        sink=st.sampled_from(SINKS),
        rows=st.integers(1, 6),
        dead=st.sets(st.integers(0, 5)),
        share=SHARES,
    )
    def crash_in_a_settlement(self, sink: str, rows: int, dead: set[int], share: float) -> None:
        self.torn(sink, share, lambda: self.settle(sink, rows, dead))

    @rule(share=SHARES)
    def crash_in_pruning(self, share: float) -> None:
        self.torn("spool", share, lambda: self.prune(0, pressure=True))

    @rule(share=SHARES)
    def crash_in_dropping(self, share: float) -> None:
        self.torn("spool", share, self.drop)

    @rule(share=st.floats(0.5, 1.5), block=st.booleans())
    def change_the_limit(self, share: float, block: bool) -> None:  # noqa: FBT001 - drawn by hypothesis
        """A limit above or below what is there, and then what its policy allows to go."""
        budget = Budget(max(1, round(share * self.writer.used_bytes())))
        slowest = min(self.cursor.values())
        pending = [row for row in self.rows if row[0] > slowest]
        while budget.level(self.writer) is Level.FULL and self.rows:
            if any(seq <= slowest for seq, _ in self.rows):
                self.prune(0, pressure=True)
            elif block:
                break
            else:
                self.drop()
        if block:
            assert [row for row in self.rows if row[0] > slowest] == pending


TestSpoolCrashes = CrashingMachine.TestCase
TestSpoolCrashes.settings = settings(max_examples=20, stateful_step_count=25)
