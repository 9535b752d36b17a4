"""Notices that the wall clock was moved: received_at, retention and signs of life depend on it."""

import logging
import time
from collections.abc import Callable

from lifecycle import fields
from spool import Condition, Conditions

log = logging.getLogger("collector")

STEP_S = 5.0
"""Between two looks NTP slews by less; a jump beyond it is a step (adjtimex(2): 500 ppm)."""

TOLD_FOR_S = 3600.0
"""So long ``health`` tells of a step; longer while the newest reading lies in the future."""

NAME = "clock_stepped"
REMEDY = (
    "timedatectl; received_at of the readings around that moment is wrong, their own timestamp is "
    "the sensor's"
)


class ClockWatch:
    """Compares the wall clock with the one that no program sets.

    Args:
        conditions: Where a step is told.
        newest_us: When the newest reading in the spool was received, µs since 1970 UTC; 0 for none.
        clock: Seconds, monotonic. It stands still while a machine is suspended, so that a resumed
            machine's clock has stepped, too.
        now_us: Microseconds since 1970 UTC.
    """

    def __init__(
        self,
        conditions: Conditions,
        newest_us: int,
        clock: Callable[[], float] = time.monotonic,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._conditions = conditions
        self._clock = clock
        self._now_us = now_us
        self._offset_us = self._offset()
        self._told = False
        self._until = float("-inf")
        if newest_us > now_us() + STEP_S * 1e6:
            self._tell(
                f"at {_text(now_us())} the clock stood {(newest_us - now_us()) / 1e6:.0f} s before "
                "the newest reading in the spool"
            )

    def _offset(self) -> float:
        return self._now_us() - self._clock() * 1e6

    def look(self, newest_us: Callable[[], int]) -> bool:
        """Look at both clocks; return whether the wall clock has stepped since the last look.

        Args:
            newest_us: Returns when the newest reading in the spool was received; only asked while
                a step is told.
        """
        offset = self._offset()
        step_s = (offset - self._offset_us) / 1e6
        self._offset_us = offset
        stepped = abs(step_s) > STEP_S
        if stepped:
            self._until = self._clock() + TOLD_FOR_S
            self._tell(
                f"at {_text(self._now_us())} the clock had stepped by {step_s:+.0f} s "
                "(set, or the machine was suspended)"
            )
        elif self._told and self._until <= self._clock() and newest_us() <= self._now_us():
            self._told = False
            self._conditions.clear(NAME)
        return stepped

    def _tell(self, detail: str) -> None:
        self._told = True
        log.warning("clock stepped: %s", detail, extra=fields(remedy=REMEDY))
        self._conditions.put(Condition(NAME, "WARNING", detail, REMEDY))


def _text(us: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(us / 1e6))
