"""The last bound of the log: no line of the program's comes without end.

Logs are rotated by size, so a line that a publisher, a broker or a service can cause as often as it
likes pushes everything else out of them. Where that is known, :class:`lifecycle.RateLimitedLog`
tells kinds apart and gives numbers. This here holds for every line, those of libraries too: of each
place in the code BURST_LINES may come at once, then one each REFILL_S, which says how many were
left out before it. Places are as many as the code has, so nothing invented elsewhere takes memory.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

BURST_LINES = 100
"""More than a program says from one place for a reason of its own, at a start that meets all
problems at once."""

REFILL_S = 30.0

SUMMARY_INTERVAL_S = 60.0
"""What was left out is told with the next line of any place after so long, and at the end."""

UNLIMITED = "unlimited"
"""A record with this attribute set has a bound elsewhere, or is a product, and no notice."""


@dataclass(slots=True)
class _Place:
    """What is known of one place in the code."""

    lines: float
    """So many may still come."""
    filled_s: float
    left_out: int = 0
    last: logging.LogRecord | None = None


class BoundedHandler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, but not more of one kind than a log can take.

    Args:
        stream: Where to; standard output where it is not given.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(stream or sys.stdout)
        self._clock = clock
        self._places: dict[tuple[str, int], _Place] = {}
        # A signal's handler may log while this thread is in here.
        self._guard = threading.RLock()
        self._summary_s = clock()

    def handle(self, record: logging.LogRecord) -> bool:
        """Write ``record`` unless too many came from its place; return whether it was written."""
        if getattr(record, UNLIMITED, False):
            return super().handle(record)
        with self._guard:
            summaries = self._summaries()
            passes = self._admit(record)
        for summary in summaries:
            super().handle(summary)
        return super().handle(record) if passes else False

    def close(self) -> None:
        """Tell what was left out, and close."""
        with self._guard:
            summaries = self._summaries(at_end=True)
        for summary in summaries:
            super().handle(summary)
        super().close()

    def _admit(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        place = self._places.setdefault(
            (record.pathname, record.lineno), _Place(BURST_LINES, filled_s=now)
        )
        place.lines = min(BURST_LINES, place.lines + (now - place.filled_s) / REFILL_S)
        place.filled_s = now
        if place.lines < 1.0:
            place.left_out += 1
            place.last = record
            return False
        place.lines -= 1.0
        if place.left_out:
            values: dict[str, object] = getattr(record, "fields", {})
            record.fields = {**values, "lines_left_out": place.left_out}
            place.left_out = 0
        return True

    def _summaries(self, *, at_end: bool = False) -> list[logging.LogRecord]:
        now = self._clock()
        if not at_end and now - self._summary_s < SUMMARY_INTERVAL_S:
            return []
        self._summary_s = now
        return [
            self._summary(place)
            for place in list(self._places.values())
            # While a flood lasts, the lines that pass say it.
            if place.left_out and (at_end or now - place.filled_s >= REFILL_S)
        ]

    @staticmethod
    def _summary(place: _Place) -> logging.LogRecord:
        last = place.last
        summary = logging.makeLogRecord(
            {} if last is None else {**last.__dict__, "exc_info": None, "exc_text": None}
        )
        values: dict[str, object] = getattr(last, "fields", {})
        summary.fields = {**values, "lines_left_out": place.left_out}
        place.left_out = 0
        place.last = None
        return summary
