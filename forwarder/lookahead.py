"""What came behind a held batch, read within bounds, to be tried as well.

A service that refuses every row of a batch may be wrong, or these rows are: a row behind them that
is accepted tells (:mod:`forwarder.refusals`). So a held batch grows.
"""

from collections.abc import Callable, Sequence

from spool import Reading

TIMES = 4
"""How many usual batches a held one may hold: so much memory can a poison publisher take."""

PROBE_WAIT_S = 1.0
"""How long the first hold of this kind waits before rows that came meanwhile are tried; then twice
as long each time, up to what every hold waits."""


class Lookahead:
    """Reads what came behind a held batch.

    Args:
        max_rows: Of a usual batch.
        max_bytes: Of payloads and topics in a usual batch.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self._max_rows = TIMES * max_rows
        self._max_bytes = TIMES * max_bytes

    def read(
        self, held: Sequence[Reading], read: Callable[[int, int, int], list[Reading]]
    ) -> list[Reading]:
        """Return rows behind ``held``; none if there are none, or no room for more.

        Args:
            held: What is in memory already, in the order of seq.
            read: Returns the rows after a seq, at most so many, and of so many bytes.
        """
        rows = self._max_rows - len(held)
        size = self._max_bytes - sum(len(row[8]) + len(row[9]) for row in held)
        return read(held[-1][0], rows, size) if rows > 0 and size > 0 else []


def probe_wait_s(tries: int, hold_s: float) -> float:
    """Return how long a hold that looks for an accepted row waits.

    Args:
        tries: 1 after the first delivery that brought nothing.
        hold_s: How long every other hold waits.
    """
    return min(hold_s, PROBE_WAIT_S * 2.0 ** min(max(tries, 1) - 1, 16))
