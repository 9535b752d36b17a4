"""Whether it is a row that is at fault, or a service that refuses every row. Talks to nobody.

A dead letter is for a row at fault amid healthy ones. A topic with the wrong schema, or a table
that was changed, refuses each row in the same words, and would make dead letters of a whole
backlog. What tells the two apart is a row that is accepted behind them. So refused rows are counted
from one accepted row to the next, over deliveries; many in a row are a fault of the service as far
as anybody can tell, and are held, none of them given up, while rows behind them are tried
(:mod:`forwarder.probe`). The first that is accepted shows that those before it were at fault
themselves, and delivery goes on.

A row that comes alone, refused, is still a dead letter: it must not stand in the way for ever.
And where many are at fault themselves, ``REFUSED_POLICY=dead-letter`` lets an operator go on.
"""

from forwarder.sink import Fault, FaultKind

REFUSED_ALONE_MAX = 20
"""So many rows in a row may be at fault themselves where none was accepted meanwhile: the dead
letters that a wrong schema makes at most, if its readings come one by one."""

REFUSED_AMID_MAX = 200
"""And so many after a row that was accepted in the same delivery: a burst of bad readings is
longer than a few, and their schema was right a moment ago."""

SEARCHED_MAX = 1_280
"""So many rows, one by one, a delivery that was held before searches for one that is accepted."""


class RefusalRun:
    """Counts refused rows from one accepted row to the next; one for each sink.

    Args:
        hold: Whether many in a row are a fault of the service, as REFUSED_POLICY says.
    """

    def __init__(self, *, hold: bool = True) -> None:
        self._hold = hold
        self._earlier = 0
        """Those that became dead letters since the last row that was accepted."""
        self._now = 0
        self._depth = 0
        self._amid = self._in_doubt = False

    def begin(self) -> None:
        """A delivery begins; what the last one held is not counted, it comes again."""
        if self.of_all:
            # Held: each time search twice as far for a row that is accepted.
            self._depth = min(SEARCHED_MAX, 2 * max(self._depth, self._limit))
        else:
            self._depth = 0
            self.buried()
        if self._amid:
            # The service was well a moment ago: the next run is a new one.
            self._earlier = 0
        self._now = 0
        self._amid = self._in_doubt = False

    def search_deep(self) -> None:
        """Search as far as any delivery does: there are rows behind that will tell."""
        self._depth = SEARCHED_MAX

    def accepted(self) -> None:
        """A row was accepted: those before it were at fault themselves."""
        self._earlier = self._now = 0
        self._amid = True

    def refused(self, rows: int = 1, *, in_doubt: bool = False) -> None:
        """As many rows were refused, and none was accepted between them.

        Args:
            rows: How many.
            in_doubt: Whether more rows were sent with them, of which nothing is known.
        """
        self._now += rows
        self._in_doubt |= in_doubt

    def buried(self) -> None:
        """Those that were refused became dead letters, before the end of the delivery."""
        self._earlier += self._now
        self._now = 0

    @property
    def holds(self) -> bool:
        """Whether a service that refuses every row is a reason to hold, as REFUSED_POLICY says."""
        return self._hold

    @property
    def enough(self) -> bool:
        """Whether this delivery has tried so many that more would tell nothing new."""
        return self._hold and self._now > max(self._limit, self._depth)

    @property
    def of_all(self) -> bool:
        """Whether the service refuses every row, as far as was tried: bury none of them."""
        return self._hold and self._earlier + self._now > self._limit

    @property
    def _limit(self) -> int:
        return REFUSED_AMID_MAX if self._amid or self._in_doubt else REFUSED_ALONE_MAX


def refuses_all(what: str, words: str, remedy: str) -> Fault:
    """Return the fault to report for a service that refuses every row.

    Args:
        what: The request, and on what.
        words: The service's, on one of the rows.
        remedy: The command that shows what is wrong.
    """
    return Fault(
        FaultKind.HOLD,
        f"{what}: every row is refused, so none is given up: {words}",
        f"{remedy}; if it is right, and the readings are not, REFUSED_POLICY=dead-letter and a "
        "restart of this forwarder put them aside",
        probe=True,
    )
