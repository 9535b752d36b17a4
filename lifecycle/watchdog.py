"""A process that is up but stuck ends itself, with its stacks in the log.

faulthandler's timer is a C thread: it fires even where a thread holds the interpreter lock
for ever, prints every stack to standard error and ends the process; supervisord starts it
again, and the broker sends again what was not acknowledged.
"""

import faulthandler
import sys
import time
from collections.abc import Callable, Iterable

REARM_INTERVAL_S = 5.0
"""Arming starts a thread, so it is not done at each turn of a loop."""


class Watchdog:
    """Ends the process when one of its loops has not turned for ``timeout_s``.

    Args:
        loops: The names of the loops that must all keep turning.
        timeout_s: How long one may stand still; above the longest lawful wait.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        loops: Iterable[str],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loops = frozenset(loops)
        self._timeout_s = timeout_s
        self._clock = clock
        self._seen: set[str] = set()
        self._armed_at = float("-inf")

    def beat(self, loop: str) -> None:
        """Say that ``loop`` has turned."""
        self._seen.add(loop)
        now = self._clock()
        if self._seen >= self._loops and now - self._armed_at >= REARM_INTERVAL_S:
            self._seen.clear()
            self._armed_at = now
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.stderr)

    def allow(self, timeout_s: float) -> None:
        """Let what begins now take ``timeout_s`` longer than usual, until every loop has turned."""
        # Counted from when every loop had turned: another loop that hangs is not excused.
        now = self._clock()
        since = self._armed_at if self._armed_at > float("-inf") else now
        left_s = max(0.001, since + self._timeout_s + timeout_s - now)
        faulthandler.dump_traceback_later(left_s, exit=True, file=sys.stderr)

    def stop(self) -> None:
        """Disarm."""
        faulthandler.cancel_dump_traceback_later()
