"""Whether a sink could deliver, found out while there is nothing to deliver.

A key that is missing, or a network that is down, is met by the first reading only; until then the
sink's line would say that it delivers. The check runs in a thread of its own, at most one at a
time: whatever it takes, no reading waits for it.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

from forwarder.backoff import HOLD_RETRY_S
from forwarder.sink import CheckingSink, Fault, FaultKind, Sink
from lifecycle import fields

log = logging.getLogger("forwarder")

CHECK_EACH_S = 600.0
"""How often, while nothing is wrong and no reading comes: a delivery counts as a check."""


class IdleCheck:
    """Checks one sink from time to time, and says what is wrong.

    Args:
        sink: Which; one that has no check is taken for well.
        say: Sets the sink's state and its detail.
        well: Called when what was wrong is so no more.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        sink: Sink,
        say: Callable[[str, str], None],
        well: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink if isinstance(sink, CheckingSink) else None
        self._say = say
        self._well = well
        self._clock = clock
        self._due_at = float("-inf")
        self._outcomes: queue.SimpleQueue[tuple[int, Fault | Exception | None]] = (
            queue.SimpleQueue()
        )
        self._running = False
        self._number = 0
        """Of the checks whose outcome counts: those begun before the last delivery do not."""
        self._told: FaultKind | None = None

    def delivered(self) -> None:
        """Note that rows were handed to the sink: its state is what became of them."""
        self._number += 1
        self._told = None
        self._due_at = self._clock() + CHECK_EACH_S

    def look(self) -> None:
        """Take the outcome of a check that has ended, or begin one that is due.

        Raises:
            Exception: What the sink's check raises, which is a bug.
        """
        if self._sink is None:
            return
        if self._running:
            try:
                number, outcome = self._outcomes.get_nowait()
            except queue.Empty:
                return
            self._running = False
            if isinstance(outcome, Exception):
                raise outcome
            if number == self._number:
                self._tell(outcome)
        elif self._clock() >= self._due_at:
            threading.Thread(
                target=self._check, args=(self._sink, self._number), name="check", daemon=True
            ).start()
            self._running = True

    def _check(self, sink: CheckingSink, number: int) -> None:
        try:
            self._outcomes.put((number, sink.check()))
        except Exception as error:  # noqa: BLE001 - raised again where the process can end
            self._outcomes.put((number, error))

    def _tell(self, fault: Fault | None) -> None:
        name = "" if self._sink is None else self._sink.name
        if fault is None:
            self._due_at = self._clock() + CHECK_EACH_S
            if self._told is not None:
                self._told = None
                log.info("readings could be delivered again", extra=fields(sink=name))
                self._well()
            return
        self._due_at = self._clock() + HOLD_RETRY_S
        hold = fault.kind is FaultKind.HOLD
        self._say("on hold" if hold else "retrying", str(fault))
        # The words of a network differ from try to try; the state tells them, the log once.
        if self._told is not fault.kind:
            self._told = fault.kind
            log.log(
                logging.ERROR if hold else logging.WARNING,
                "%s: %s",
                "on hold: operator action required" if hold else "readings could not be delivered",
                fault,
                extra=fields(sink=name, rows=0, retry_in_s=HOLD_RETRY_S),
            )
