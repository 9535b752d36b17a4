"""The write-ahead log of a sink's own file: what a forwarder does while a reader pins it.

Each batch is settled in that file, some pages each time, and a reader that is left open keeps them
all (:mod:`spool.logwatch`). So batches are made larger for as long as that lasts, and at the log's
bound the delivery holds: what cannot be settled must not be sent.
"""

import contextlib
import logging

from lifecycle import Watchdog, log_notice
from spool import (
    Conditions,
    CorruptFileError,
    DiskFullError,
    LogWatch,
    SinkState,
    SpoolError,
)

log = logging.getLogger("forwarder")

STRETCHED_S = 0.5
"""From one batch to the next while the log is pinned, unless batches are full: so that it grows by
the batch and not by the reading."""

LOOK_S = 0.5
"""How often to look, while the delivery holds, whether the reader has ended."""

STANDS_STILL = "nothing is delivered to this sink, the spool keeps it"


class LogHold:
    """Watches the log of a sink's file for the drain loop.

    Args:
        state: The sink's own file.
        max_bytes: SPOOL_MAX_BYTES, which bounds this log too.
        watchdog: Told before a long log is worked off.
    """

    def __init__(self, state: SinkState, max_bytes: int, watchdog: Watchdog) -> None:
        self._state = state
        self._watch = LogWatch(
            max_bytes,
            stands_still=STANDS_STILL,
            before_try=watchdog.allow,
        )
        self._failed = ""
        self.conditions = Conditions()
        """What the file's view ``health`` shows."""

    def look(self) -> bool:
        """Look at the log if that is due; return whether the delivery has to hold.

        Raises:
            StorageFaultError: The conditions cannot be written; CorruptFileError also where the
                checkpoint meets damage.
        """
        try:
            notice = self._watch.look(self._state)
        except CorruptFileError:
            raise
        except SpoolError as error:
            # Until one succeeds everything stays in the log, from where it is read as well.
            if self._failed != str(error):
                self._failed = str(error)
                log.warning("WAL checkpoint failed; will retry: %s", error)
            notice = None
        if notice is not None:
            log_notice(log, notice)
        self._watch.report_to(self.conditions)
        try:
            self.conditions.store(self._state)
        except DiskFullError as error:
            log.warning("a condition could not be stored, the disk is full: %s", error)
        return self._watch.full

    def close(self) -> None:
        """Take the conditions back: who does not run sees nothing."""
        # They stay where the file cannot be written, and the next start takes them back.
        with contextlib.suppress(SpoolError):
            self._state.set_conditions(())

    @property
    def detail(self) -> str:
        """What holds the delivery, for the status."""
        condition = self._watch.condition
        return f"{condition.detail}. {condition.remedy}" if condition else ""

    def pause_s(self, took_s: float, *, more: bool) -> float:
        """Return how long to wait for a larger batch.

        Args:
            took_s: Since the last batch was begun.
            more: Whether there is a full batch anyway.
        """
        if more or not self._watch.pinned:
            return 0.0
        return max(0.0, STRETCHED_S - took_s)
