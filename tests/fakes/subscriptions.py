"""A subscription of the Pub/Sub fake: what waits, what is out, what comes again.

With ordering, a key that has messages out is not served further until they are
acknowledged, and an expired message comes again together with all later ones of
its key, in order: that is what the service promises its subscribers.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Delivery:
    """One message on its way to one subscription."""

    number: int  # position in the topic's log; later messages have greater numbers
    ordering_key: str
    message: object  # the raw PubsubMessage, with id and publish time
    attempt: int = 0
    deadline: float = 0.0


@dataclass(slots=True)
class Subscription:
    """Only the store calls this, under its lock."""

    name: str
    topic: str
    ordered: bool
    ack_deadline_s: int
    waiting: deque[Delivery] = field(default_factory=deque)
    out: dict[str, Delivery] = field(default_factory=dict)

    def offer(self, deliveries: Iterable[Delivery]) -> None:
        """Queue messages that were just published."""
        self.waiting.extend(deliveries)

    def pull(self, limit: int, now: float) -> list[tuple[str, Delivery]]:
        """Hand out up to `limit` messages, each with the id that acknowledges it."""
        self._take_back_expired(now)
        busy = {d.ordering_key for d in self.out.values()} - {""} if self.ordered else set()
        passed_over: list[Delivery] = []
        handed: list[tuple[str, Delivery]] = []
        while self.waiting and len(handed) < limit:
            delivery = self.waiting.popleft()
            if delivery.ordering_key in busy:
                passed_over.append(delivery)
                continue
            delivery.attempt += 1
            delivery.deadline = now + self.ack_deadline_s
            # The attempt is part of the id: an id from before an expiry is void.
            ack_id = f"{self.name}:{delivery.number}:{delivery.attempt}"
            self.out[ack_id] = delivery
            handed.append((ack_id, delivery))
        self.waiting.extendleft(reversed(passed_over))
        return handed

    def acknowledge(self, ack_ids: Iterable[str]) -> None:
        """Forget messages; ids that are void are passed over, as the service does."""
        for ack_id in ack_ids:
            self.out.pop(ack_id, None)

    def set_deadline(self, ack_ids: Iterable[str], deadline: float) -> None:
        """Move the deadline of messages that are out; a past one means a refusal (nack)."""
        for ack_id in ack_ids:
            if ack_id in self.out:
                self.out[ack_id].deadline = deadline

    def _take_back_expired(self, now: float) -> None:
        expired = {ack_id for ack_id, d in self.out.items() if d.deadline <= now}
        if not expired:
            return
        if self.ordered:
            keys = {self.out[ack_id].ordering_key for ack_id in expired} - {""}
            for key in keys:
                first = min(self.out[a].number for a in expired if self.out[a].ordering_key == key)
                expired |= {
                    a for a, d in self.out.items() if d.ordering_key == key and d.number >= first
                }
        back = sorted((self.out.pop(ack_id) for ack_id in expired), key=lambda d: d.number)
        self.waiting.extendleft(reversed(back))
