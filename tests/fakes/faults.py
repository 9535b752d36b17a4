"""The seam through which tests make a fake misbehave.

A `FaultPlan` is a queue of faults. Each request takes the first one that is
meant for its call; a fault with `times=None` stays until `clear()`. What a
fault means is the business of the server that takes it: this module only
decides which request gets which, and lets hung requests go.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hang:
    """Take the request and never answer: until cleared, stopped, or the caller leaves."""


@dataclass(frozen=True, slots=True)
class LoseAnswer:
    """Carry the request out, then lose the answer, so that its outcome is in doubt."""


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait before the request is carried out."""

    delay_s: float


@dataclass(slots=True)
class _Planned:
    fault: object
    left: int | None
    calls: frozenset[str] | None


class FaultPlan:
    """Faults for the requests to come. Every method may be called from any thread."""

    def __init__(self, default_call: str) -> None:
        self._default_call = default_call
        self._changed = threading.Condition()
        self._planned: list[_Planned] = []
        self._era = 0
        self._fired = 0

    @property
    def fired(self) -> int:
        """How many requests have met a fault so far."""
        return self._fired

    def hang(self, times: int | None = 1, calls: set[str] | None = None) -> None:
        """Leave the next `times` requests without an answer; they are not carried out."""
        self.add(Hang(), times, calls)

    def lose_answer(self, times: int | None = 1, calls: set[str] | None = None) -> None:
        """Carry the next `times` requests out, but lose their answers."""
        self.add(LoseAnswer(), times, calls)

    def delay(
        self, delay_s: float, times: int | None = None, calls: set[str] | None = None
    ) -> None:
        """Let the next `times` requests wait for `delay_s` before they are carried out."""
        self.add(Delay(delay_s), times, calls)

    def add(self, fault: object, times: int | None = 1, calls: set[str] | None = None) -> None:
        """Plan one fault.

        Args:
            fault: what the server shall do.
            times: how many requests meet it; None means until `clear()`.
            calls: names of the calls it is for. The default is the call that
                delivers data (Publish, insertAll); `{"*"}` means every call.
        """
        names = frozenset(calls) if calls else frozenset({self._default_call})
        with self._changed:
            self._planned.append(_Planned(fault, times, None if "*" in names else names))

    def clear(self) -> None:
        """Forget every planned fault and let go of the requests that hang."""
        with self._changed:
            self._planned.clear()
        self.release()

    def release(self) -> None:
        """Let go of the requests that hang or wait; what is planned stays planned."""
        with self._changed:
            self._era += 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Have the held requests look again whether their callers are still there."""
        with self._changed:
            self._changed.notify_all()

    def take(self, call: str) -> object | None:
        """Return the fault that the request of this call shall meet, if any."""
        if not self._planned:  # the usual case costs no lock
            return None
        with self._changed:
            for planned in self._planned:
                if planned.calls is None or call in planned.calls:
                    break
            else:
                return None
            if planned.left is not None:
                planned.left -= 1
                if planned.left <= 0:
                    self._planned.remove(planned)
            self._fired += 1
            self._changed.notify_all()
            return planned.fault

    def hold(self, timeout_s: float | None, gave_up: Callable[[], bool]) -> bool:
        """Block a request; return True if nobody let it go before the time was over."""
        with self._changed:
            era = self._era
            return not self._changed.wait_for(
                lambda: self._era != era or gave_up(), timeout=timeout_s
            )

    def wait_fired(self, count: int, timeout_s: float) -> bool:
        """Block until `count` requests have met a fault; return whether they have."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            return self._changed.wait_for(
                lambda: self._fired >= count, timeout=deadline - time.monotonic()
            )
