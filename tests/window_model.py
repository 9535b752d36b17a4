"""A broker with a window, a way to it and a collector's writer thread, on a clock of their own.

Only :class:`collector.gather.Gathering` is real: what is judged is when it lets commits begin.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from collector.gather import Gathering

COMMIT_S = 0.0012
READING_S = 7.5e-6
SEND_S = 5e-6
"""What one commit takes, one reading in it, and the broker for each message that it sends."""


@dataclass
class Plant:
    """One run.

    Args:
        window: How many messages the broker sends without an acknowledgement.
        delay_s: COMMIT_DELAY_MS, in seconds.
        way_s: To the broker and back.
        lax: Says at what times the broker does not keep to its window.
    """

    window: int
    delay_s: float
    way_s: float = 0.0005
    lax: Callable[[float], bool] = lambda _: False
    now_s: float = 0.0
    stored: int = 0
    queued_most: int = 0
    commits_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with nothing sent."""
        self.gathering = Gathering(self.delay_s, clock=lambda: self.now_s)
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()
        self._connection = 1
        self._queued = self._sent = self._inbox = 0
        self._link_free_s = 0.0
        self._state = "idle"
        self._look = 0

    def run(self, sent_s: Iterable[float], until_s: float) -> "Plant":
        """Let readings be sent at the times ``sent_s``; go on from where it stands."""
        times = iter(sent_s)

        def publish() -> None:
            self._queued += 1
            self.queued_most = max(self.queued_most, self._queued)
            self._send()
            self._at(next(times), publish)

        self._at(next(times), publish)
        while self._events[0][0] < until_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        return self

    def other_broker(self, window: int) -> None:
        """Connect to another one; what the collector has stays with it."""
        self._connection += 1
        self.window, self._sent = window, 0
        self._events.clear()
        if self._state == "wait":
            self._decide()

    def commits_per_s(self, since_s: float) -> float:
        """Return how many commits began each second after ``since_s``."""
        return sum(at >= since_s for at in self.commits_s) / (self.now_s - since_s)

    def _at(self, time_s: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._events, (time_s, next(self._numbers), act))

    def _send(self) -> None:
        while self._queued and (self._sent < self.window or self.lax(self.now_s)):
            self._queued -= 1
            self._sent += 1
            self._link_free_s = max(self.now_s, self._link_free_s) + SEND_S
            self._at(self._link_free_s + self.way_s / 2, self._arrive)

    def _arrive(self) -> None:
        self._inbox += 1
        self.gathering.arrived(self._connection, 1)
        waits = self._state == "wait" and self.gathering.interrupts(self._inbox)
        if self._state == "idle" or waits:
            self._decide()

    def _decide(self) -> None:
        if not self._inbox:
            self._state = "idle"
            return
        left_s = self.gathering.left_s(self._inbox)
        self._look += 1
        if left_s > 0:
            self._state = "wait"
            self._at(self.now_s + left_s + 1e-9, partial(self._look_again, self._look))
            return
        self.gathering.begins(self._inbox)
        self.commits_s.append(self.now_s)
        self._state = "commit"
        taken, self._inbox = self._inbox, 0
        self._at(self.now_s + COMMIT_S + taken * READING_S, partial(self._committed, taken))

    def _look_again(self, look: int) -> None:
        if self._state == "wait" and look == self._look:
            self._decide()

    def _committed(self, taken: int) -> None:
        self.stored += taken
        self.gathering.acknowledged(taken)
        self._at(self.now_s + self.way_s / 2, partial(self._acknowledged, taken))
        self._decide()

    def _acknowledged(self, messages: int) -> None:
        self._sent -= messages
        self._send()


def poisson(rate: float, begin_s: float = 0.0) -> Iterator[float]:
    """Yield when sensors send that know nothing of each other."""
    chance = random.Random(7)  # noqa: S311 - no secret
    at_s = begin_s
    while True:
        at_s += chance.expovariate(rate)
        yield at_s


def bursts(size: int, every_s: float, begin_s: float = 0.5) -> Iterator[float]:
    """Yield when sensors send that all look at the same clock."""
    for burst in count():
        for number in range(size):
            yield begin_s + burst * every_s + number * 1e-5
