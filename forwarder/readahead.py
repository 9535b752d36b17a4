"""The next batch is made ready while the service still works on this one.

A sink that takes part calls back whenever only answers are missing. So the disk is read, and
what was read is checked and sorted, in time that nobody else needs, in the same thread, and the
sink's contract stays as it is: it is still handed one batch after the other.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from forwarder.batch import Checked, check
from forwarder.sink import Sink
from spool import Reading, SpoolError


@runtime_checkable
class WaitingSink(Sink, Protocol):
    """A sink that tells when it only waits."""

    meanwhile: Callable[[], bool]
    """Called in a delivery while only answers are missing: does a piece of the next batch's work,
    of some milliseconds, and returns whether to call again."""

    def prepare(self, rows: list[Reading]) -> list[Reading]:
        """Get ready to deliver ``rows`` after the batch that is on its way.

        Args:
            rows: In the order of seq; none to let go of what was prepared.

        Returns:
            Those of them, from the first, that are better handed in together; the others follow
            in the batch after. What was prepared is used if this very list is delivered.
        """


class ReadAhead:
    """Keeps one batch that was read before its turn.

    Args:
        sink: Whose waiting is used, if it tells of it.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink if isinstance(sink, WaitingSink) else None
        self._after_seq = 0
        self._rows: list[Reading] = []
        self._checked: Checked | None = None

    def plan(self, after_seq: int, read: Callable[[int], list[Reading]]) -> None:
        """Have the rows after ``after_seq`` read by ``read`` during the next delivery."""
        if self._sink is not None:
            pieces = self._pieces(self._sink, after_seq, read)
            # Once is enough, however often the batch has to be tried: the pieces come to an end.
            self._sink.meanwhile = lambda: next(pieces, False)

    def _pieces(
        self, sink: WaitingSink, after_seq: int, read: Callable[[int], list[Reading]]
    ) -> Iterator[bool]:
        try:
            self._after_seq, self._rows = after_seq, read(after_seq)
        except SpoolError:
            return  # it is met again, and told, when their turn has come
        yield True
        self._checked = check(self._rows)
        yield True
        self._checked.shorten(sink.prepare(self._checked.good))

    def take(self, after_seq: int) -> Checked | None:
        """Return the rows after ``after_seq``; None if there are none that have been read."""
        rows, checked = self._rows, self._checked
        self._plan_nothing()
        if not rows or after_seq != self._after_seq:
            return None
        return checked or check(rows)

    def forget(self) -> None:
        """Plan nothing, and drop what was read: the spool may change before it is needed."""
        self._plan_nothing()
        if self._sink is not None:
            self._sink.prepare([])

    def _plan_nothing(self) -> None:
        self._rows, self._checked = [], None
        if self._sink is not None:
            self._sink.meanwhile = _nothing


def _nothing() -> bool:
    """Do nothing while the sink waits."""
    return False
