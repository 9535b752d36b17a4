"""Reading the next batch while the service still works on this one.

A sink that takes part calls back once all that it has to send is on its way and only answers
are missing. So the disk is read in time that nobody else needs, in the same thread, and the
sink's contract stays as it is: it is still handed one batch after the other.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from forwarder.sink import Sink
from spool import Reading, SpoolError


@runtime_checkable
class WaitingSink(Sink, Protocol):
    """A sink that tells when it only waits."""

    meanwhile: Callable[[], object]
    """Called at most once in a delivery, between its last request and its last answer."""


class ReadAhead:
    """Keeps one batch that was read before its turn.

    Args:
        sink: Whose waiting is used, if it tells of it.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink if isinstance(sink, WaitingSink) else None
        self._after_seq = 0
        self._rows: list[Reading] = []

    def plan(self, after_seq: int, read: Callable[[int], list[Reading]]) -> None:
        """Have the rows after ``after_seq`` read by ``read`` during the next delivery."""

        def meanwhile() -> None:
            self.forget()  # once is enough, however often the batch has to be tried
            # Whatever is wrong is met again, and told, when their turn has come.
            with contextlib.suppress(SpoolError):
                self._after_seq, self._rows = after_seq, read(after_seq)

        self.forget()
        if self._sink is not None:
            self._sink.meanwhile = meanwhile

    def take(self, after_seq: int) -> list[Reading]:
        """Return the rows after ``after_seq``; empty if they have not been read."""
        rows = self._rows if after_seq == self._after_seq else []
        self.forget()
        return rows

    def forget(self) -> None:
        """Plan nothing, and drop what was read: the spool may change before it is needed."""
        self._rows = []
        if self._sink is not None:
            self._sink.meanwhile = _nothing


def _nothing() -> None:
    """Do nothing while the sink waits."""
