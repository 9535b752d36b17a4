"""Finds two requests in flight at once for one ordering key.

The service takes them, in an order of its own: the publisher has given up the
order of the key. So the fake records it and does not refuse.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

# A caller that gives up (its deadline, a cancel) may send again at once, and the
# server, on a busy machine, can see the new request this much before it sees the
# end of the old one. An overlap that ends with an answer counts however short it is.
GIVE_UP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Violation:
    """A second request of the key began while the caller still waited for the first."""

    topic: str
    ordering_key: str
    began_at: float  # time.monotonic() of the second request


@dataclass(slots=True)
class Call:
    """One publish request, from its arrival to its answer."""

    topic: str
    ordering_key: str
    rivals: list[float] = field(default_factory=list)
    gone_at: float | None = None  # when its caller left, or was answered


class InFlight:
    """Knows every publish request under way that has an ordering key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: defaultdict[tuple[str, str], list[Call]] = defaultdict(list)
        self.violations: list[Violation] = []
        self.most_at_once = 0
        self._at_once = 0

    def begin(self, topic: str, ordering_key: str, context: grpc.ServicerContext) -> Call:
        """Register a request on its arrival."""
        call = Call(topic, ordering_key)

        def mark_gone() -> None:
            call.gone_at = self._clock()

        context.add_callback(mark_gone)
        if not ordering_key:
            return call
        now = self._clock()
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            calls = self._calls[topic, ordering_key]
            for other in calls:
                if other.gone_at is None:
                    other.rivals.append(now)
            calls.append(call)
        return call

    def end(self, call: Call) -> None:
        """Judge a request just before its answer leaves.

        Only now is it known whether its caller still waits. If it left before or
        around the time its rival came, the rival was a proper retry.
        """
        if not call.ordering_key:
            return
        with self._lock:
            self._at_once -= 1
            calls = self._calls[call.topic, call.ordering_key]
            calls.remove(call)
            if not calls:
                del self._calls[call.topic, call.ordering_key]
            for began_at in call.rivals:
                if call.gone_at is None or call.gone_at > began_at + GIVE_UP_GRACE_S:
                    self.violations.append(Violation(call.topic, call.ordering_key, began_at))
