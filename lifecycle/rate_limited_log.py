"""Log lines of which a flood of bad messages makes only one a minute and kind."""

import logging
import time
from collections.abc import Callable

from lifecycle.logs import unlimited

INTERVAL_S = 60.0
KEYS_MAX = 50
"""How many kinds are told apart at a time."""


class RateLimitedLog:
    """Logs the first of each kind at once, then how many more there were, once a minute."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = logger
        self._clock = clock
        self._last: dict[str, float] = {}
        self._more: dict[str, int] = {}
        self._level: dict[str, int] = {}

    def warn(self, key: str, message: str, *, count: int = 1, **values: object) -> None:
        """Log a WARNING; see :meth:`log`."""
        self.log(logging.WARNING, key, message, count=count, **values)

    def log(self, level: int, key: str, message: str, *, count: int = 1, **values: object) -> None:
        """Log ``message``, unless a line with this key was logged within the interval.

        Args:
            level: Of the line, and of the one that tells how many more there were.
            key: What counts as the same.
            message: The line.
            count: For how many things it stands.
            values: Its fields.
        """
        now = self._clock()
        if key not in self._last and len(self._last) >= KEYS_MAX:
            key = "other"
        last = self._last.get(key)
        if last is not None and now - last < INTERVAL_S:
            self._more[key] = self._more.get(key, 0) + count
            self._level[key] = level
            return
        self._last[key] = now
        more = self._more.pop(key, 0)
        if more:
            values["more_since_last_line"] = more
        self._log.log(level, message, extra=unlimited(**values))

    def flush(self, *, at_end: bool = False) -> None:
        """Tell of what was held back for longer than the interval; at the end, of all."""
        now = self._clock()
        for key, count in list(self._more.items()):
            if at_end or now - self._last[key] >= INTERVAL_S:
                self._last[key] = now
                del self._more[key]
                self._log.log(
                    self._level[key],
                    "the same again: %s",
                    key,
                    extra=unlimited(more_since_last_line=count),
                )
