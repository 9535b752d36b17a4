"""The protocol between the drain loop and a sink. Adding a sink is a module and a line.

A sink is handed rows and says what became of each. It keeps no state that a crash could
lose: what it answered is made durable by the drain loop, and what it did not answer is
handed to it again. It therefore has to bear the same row twice (every service here has a
way: ``event_id``, offsets, insert ids). The one exception keeps a journal in the sink's own
file, which the drain loop's settlement clears (:class:`JournalledSink`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

from spool import DeadLetter, Reading


class FaultKind(Enum):
    """What it takes for a delivery to succeed after all."""

    TRANSIENT = "transient"
    """Time: the network, a quota, the service's own trouble. Try again, backing off."""
    HOLD = "hold"
    """A person: a missing topic, a permission, a schema. Say so; look again each minute."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why rows could not be delivered now; none of them is at fault itself."""

    kind: FaultKind
    problem: str
    """What failed, on what, and why, in the service's words."""
    remedy: str = ""
    """The exact command or statement that mends it."""
    of_access: bool = False
    """Whether it concerns every request alike (credentials, a certificate that is not trusted)."""
    probe: bool = False
    """Whether rows behind these could tell if it is the service or these rows: hand them in too."""

    def __str__(self) -> str:
        """Return both as one text."""
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


@dataclass(slots=True)
class Delivery:
    """What became of a batch.

    Every row of the batch is in exactly one of three states: in ``retry`` (still to be
    delivered), in ``dead`` (at fault itself), or, being in neither, delivered and confirmed
    by the service.
    """

    retry: list[Reading] = field(default_factory=list)
    """In the order of seq. Without a fault only when others of the batch were delivered: then
    these are handed in again at once, after those are settled."""
    dead: list[DeadLetter] = field(default_factory=list)
    fault: Fault | None = None
    faults: dict[str, Fault] = field(default_factory=dict)
    """By site, of a sink whose service may refuse one site and take the others: why that site's
    rows are in ``retry``. A site whose rows are there and which is not here was not tried. Where
    this is not empty, the other sites go on (:mod:`forwarder.bypass`)."""


class Sink(Protocol):
    """A service that readings are delivered to."""

    name: str
    max_rows: int
    """How many rows it likes to be handed at once."""
    max_bytes: int
    """And how many bytes of payload."""
    gather_s: float
    """How long, at the least, from one batch to the next while rows come in one by one. Each
    batch costs a request and a synced commit; readings go together for the price of one."""

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Deliver ``rows``, which are in the order of seq, and report on each.

        Blocks for as long as the service's deadlines allow, never for ever. A sink that
        promises order must not deliver a row of a site after it failed to deliver an
        earlier one of that site; those rows belong into ``retry`` as well. May be called
        with rows that were delivered before (after a crash, or a lost answer).

        Never raises for what the network or the service does: that is a Fault. What it
        raises is a bug.
        """

    def close(self) -> None:
        """Let go of connections. No delivery is under way."""


@runtime_checkable
class JournalledSink(Sink, Protocol):
    """A sink that notes durably what it is about to send, to send the same after a crash."""

    def resume(self, epoch: str) -> int:
        """Take up the spool of ``epoch``, before its first batch.

        Returns:
            The seq through which the first batch has to reach, because rows up to there were
            being sent together; 0 if there were none.
        """


@runtime_checkable
class CheckingSink(Sink, Protocol):
    """A sink that can tell whether it could deliver, while there is nothing to deliver."""

    def check(self) -> Fault | None:
        """Look at what a delivery takes: credentials, a token, a service that is trusted.

        Called in a thread of its own, also while :meth:`deliver` is called, so it uses nothing
        of a delivery's. It may take as long as the libraries do, writes nothing to the service,
        and costs it a request or two.

        Returns:
            The fault that a delivery would report; None if none is seen.

        Never raises for what the network or the service does.
        """


@runtime_checkable
class NoticingSink(Sink, Protocol):
    """A sink that has something to tell although it delivers."""

    @property
    def notice(self) -> str:
        """What an operator has to know; empty if there is nothing. Shown in the status."""
