"""A cursor that lags: what was delivered is noted some moments later, with what came after it.

A commit costs a sync and its pages, whether the cursor moves by one reading or by a thousand. So
a step that only moves the cursor over delivered readings may be kept in memory. It is written with
the next transaction of the file, whatever that is for, so nothing newer is ever durable without
it; and when its time has come or there are many.

What a crash takes away is delivered again, as is the batch that was in hand. A sink whose service
takes rows at numbered places repeats nothing: its journal, written before each batch, still has
what the cursor has not passed, and takes the cursor along.
"""

import time
from collections.abc import Callable

LAG_MAX_S = 1.0
"""How long a delivered reading may go unnoted. At the usual commit each 200 ms it saves four of
five; twice as long would save one more of ten."""

LAG_MAX_ROWS = 1_000
"""And how many. A batch this large is worth a commit of its own, and a crash of the forwarder must
not repeat more of a flood than the batch in hand."""


class CursorLag:
    """Where the cursor of a sink's file is to be moved, of which the file does not know yet.

    It holds no count: what was delivered is the way from the file's cursor to here. So a commit of
    which nobody knows whether it took place can be made again.
    """

    def __init__(self) -> None:
        self._max_s = 0.0
        self._max_rows = 0.0
        self._clock: Callable[[], float] = time.monotonic
        self._since_s = 0.0
        self._begun = False
        self.epoch = ""
        """Of the spool; empty where nothing is to be noted."""
        self.seq = 0

    def allow(self, max_s: float, max_rows: float, clock: Callable[[], float]) -> None:
        """Let the cursor lag from now on; by default it does not.

        Args:
            max_s: By so many seconds at most.
            max_rows: And by fewer than so many rows.
            clock: Seconds, monotonic.
        """
        self._max_s, self._max_rows, self._clock = max_s, max_rows, clock

    def may_wait(self, rows: int) -> bool:
        """Return whether a step that ends ``rows`` behind the file's cursor may be kept.

        Not the first of a process: one that is killed again and again comes on all the same.
        """
        return self._begun and rows < self._max_rows and self.due_in_s() > 0

    def due_in_s(self) -> float:
        """Return in how many seconds the file has to be written: at most ``max_s``."""
        if not self.epoch:
            return self._max_s
        return max(0.0, self._since_s + self._max_s - self._clock())

    def keep(self, epoch: str, seq: int) -> None:
        """Keep a step to ``seq``."""
        if not self.epoch:
            self._since_s = self._clock()
        self.epoch, self.seq = epoch, seq

    def moved(self) -> None:
        """Take note that this process has moved the file's cursor."""
        self._begun = True

    def clear(self) -> None:
        """Keep nothing: the file has it."""
        self.epoch, self.seq = "", 0

    def position(self, epoch: str, noted: int) -> int:
        """Return the cursor in the spool of ``epoch``, of which the file has ``noted``."""
        return max(noted, self.seq) if epoch == self.epoch else noted
