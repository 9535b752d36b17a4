"""How long a message may wait for company before it is committed.

Each commit is one sync and three pages of the write-ahead log, for one reading or for a thousand.
Sensors send one by one, so at a usual rate, committing each at once, the disk would take a hundred
times what the readings weigh, and flash memory wears out by that. So a commit does not begin sooner
than :data:`GATHER_S` after the last one began, unless many wait already. A reading that comes alone
is committed at once.

A broker that allows few messages in flight sends nothing while we wait: then waiting brings
nothing, and is given up for a while.

While a reader pins the write-ahead log (:mod:`spool.logwatch`), each commit stays in it, so commits
are stretched: at most one each :data:`STRETCHED_S`, and at once where nothing more comes.
"""

import time
from collections.abc import Callable

GATHER_S = 0.005
ENOUGH_MESSAGES = 16
"""So many are worth a commit. Below the 20 in flight that brokers usually allow."""

IN_VAIN_MAX = 8
"""So many waits in a row that brought nothing, and the next ones are left out."""

LEFT_OUT = 256

STRETCHED_S = 0.5
"""From one commit's begin to the next's while they are stretched: at 100 readings a second, 50
readings share the three pages that each commit takes besides them."""

SILENCE_S = 0.1
"""A stretched wait in which so long nothing came ends: the broker waits for acknowledgements."""

SILENT_FOR = 32
"""So many waits after such a one end with as many messages as it had: that is the window."""


class Gathering:
    """Decides before each commit how long to wait.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_at = float("-inf")
        self._in_vain = 0
        self._left_out = 0
        self._window = 0
        self._windows = 0
        self.stretched = False
        """Whether commits are to be few. Set by the thread that takes."""

    def stretched_wait(self, max_messages: int) -> tuple[float, int]:
        """Return how long a stretched commit may wait, and with how many messages it begins.

        Args:
            max_messages: With so many in any case.
        """
        left_s = max(0.0, self._begun_at + STRETCHED_S - self._clock())
        if self._windows:
            self._windows -= 1
            return left_s, min(self._window, max_messages)
        return left_s, max_messages

    def silent(self, messages: int) -> None:
        """Take note that nothing came for SILENCE_S while ``messages`` waited."""
        self._window, self._windows = messages, SILENT_FOR

    def wait_s(self) -> float:
        """Return how long to wait for more; 0 for not at all."""
        if self._left_out:
            self._left_out -= 1
            return 0.0
        return max(0.0, self._begun_at + GATHER_S - self._clock())

    def waited(self, *, in_vain: bool) -> None:
        """Take note of a wait: whether nothing came meanwhile."""
        self._in_vain = self._in_vain + 1 if in_vain else 0
        if self._in_vain == IN_VAIN_MAX:
            self._in_vain = 0
            self._left_out = LEFT_OUT

    def begins(self) -> None:
        """Take note that a commit begins now."""
        self._begun_at = self._clock()
