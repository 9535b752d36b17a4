"""What the view ``health`` says of a full disk, and until when."""

import time
from collections.abc import Callable
from pathlib import Path

from spool import Ballast, Condition, Conditions

NAME = "disk_full"

FULL_FOR_S = 10.0
"""So long after the last commit that found no room the disk counts as full."""

LOOK_S = 1.0


class DiskHealth:
    """Says that the disk is full, that it is nearly full, and when it is neither.

    Args:
        conditions: Where it is said.
        ballast: Fits again where there is plenty of room.
        stands_still: What a full disk means.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        conditions: Conditions,
        ballast: Ballast,
        stands_still: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._conditions = conditions
        self._ballast = ballast
        self._stands_still = stands_still
        self._clock = clock
        self._full_at: float | None = None
        self._looked_at = float("-inf")

    def full(self, directory: Path) -> None:
        """Say that a commit found no room on the disk of ``directory``."""
        self._full_at = self._clock()
        detail = f"the disk of {directory} is full: {self._stands_still}"
        self._conditions.put(Condition(NAME, "CRITICAL", detail, _remedy(directory)))

    def look(self, directory: Path) -> None:
        """Look whether there is room again, if that is due."""
        now = self._clock()
        if self._full_at is None or now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        if self._ballast.fits:
            self._full_at = None
            self._conditions.clear(NAME)
        elif now - self._full_at >= FULL_FOR_S:
            detail = (
                f"the disk of {directory} is nearly full: the ballast was given up, and readings "
                "are taken in the room that it left"
            )
            self._conditions.put(Condition(NAME, "WARNING", detail, _remedy(directory)))


def _remedy(directory: Path) -> str:
    return f"df -h {directory}; df -i {directory}; make room: it goes on by itself"
