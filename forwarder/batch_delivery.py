"""One batch at a time: deliver it, settle it, and wait where it cannot be delivered now.

What the sink wants tried again is tried again, the same rows in the same order. The cursor moves
over the contiguous prefix of rows that are delivered, dead, or found missing.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from forwarder.backoff import HOLD_RETRY_S, backoff_s
from forwarder.batch import Batch, Checked, check, corrupt, find_gaps
from forwarder.dead_letters import DeadLetterWatch
from forwarder.gaplog import log_gaps
from forwarder.loghold import LogHold
from forwarder.lookahead import Lookahead, probe_wait_s
from forwarder.sink import Delivery, Fault, FaultKind, NoticingSink, Sink
from lifecycle import RateLimitedLog, StopRequest, Watchdog, fields, printable
from spool import (
    AheadStep,
    DiskFullError,
    Reading,
    Settlement,
    SinkState,
    SpoolReader,
    refuse_backlog,
)

log = logging.getLogger("forwarder")

DISK_FULL_RETRY_S = 5.0

LOOP = "drain"

Failed: TypeAlias = tuple[Batch, Delivery]


class BatchDelivery:
    """Delivers batches to one sink and moves its cursor.

    Args:
        sink: Where to.
        state: The sink's own file.
        app_env: Readings of another environment are refused.
        stop: When to end.
        watchdog: Told at each try.
        log_hold: Watches the write-ahead log of the sink's file, if given.
        forget_ahead: Called when a batch has grown by rows that were perhaps read ahead.
        jitter: Returns a number from 0 to 1.
        clock: Seconds, monotonic.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        *,
        sink: Sink,
        state: SinkState,
        app_env: str,
        stop: StopRequest,
        watchdog: Watchdog,
        log_hold: LogHold | None,
        forget_ahead: Callable[[], None],
        jitter: Callable[[], float],
        clock: Callable[[], float],
    ) -> None:
        self._sink = sink
        self._state = state
        self._app_env = app_env
        self._stop = stop
        self._watchdog = watchdog
        self._log_hold = log_hold
        self._forget_ahead = forget_ahead
        self._jitter = jitter
        self._clock = clock
        self._status = ("", "")
        self._noticing = sink if isinstance(sink, NoticingSink) else None
        self._lookahead = Lookahead(sink.max_rows, sink.max_bytes)
        self.letters = DeadLetterWatch(sink.name, state, clock)
        self.notices = RateLimitedLog(log, clock)
        """What each batch may give reason to say."""
        self.position = 0
        """The last seq that is settled."""

    def check_environment(self, reader: SpoolReader, rows: Sequence[Reading]) -> None:
        """Refuse readings that were taken under another APP_ENV.

        Raises:
            WrongEnvironmentError: They were.
        """
        spooled_under = reader.app_env()
        if spooled_under != self._app_env:
            refuse_backlog(
                spooled_under, self._app_env, {self._sink.name: len(rows)}, str(reader.path)
            )

    def deliver(self, reader: SpoolReader, checked: Checked) -> Failed | None:
        """Deliver one batch, for as long as it takes, or until asked to stop.

        Returns:
            What was delivered in part, where some sites failed: the others do not wait for them.
        """
        batch = Batch([], [], settled_seq=self.position)
        todo = self._take_in(reader, batch, checked)
        failures = probes = 0
        while True:
            delivery = self._try(todo, batch)
            progressed = len(delivery.retry) < len(todo)
            todo = delivery.retry
            self._settle(reader, batch, todo[0][0] if todo else batch.rows[-1][0] + 1)
            if not todo:
                if failures:
                    log.info("delivering again", extra=fields(sink=self._sink.name))
                self.set_status("delivering", self.notice())
                return None
            if delivery.faults:
                return batch, delivery
            if progressed and delivery.fault is None:
                continue  # what is confirmed had to be settled first
            failures = 1 if progressed else failures + 1
            probe = delivery.fault is not None and delivery.fault.probe
            probes = (1 if progressed else probes + 1) if probe else 0
            # What came since may show at once that it is these rows, and no hold is due.
            if probes == 1 and not self._stop.requested:
                more = self._look_ahead(reader, batch)
                todo += more
                if more:
                    continue
            if self.wait_after(delivery.fault, failures, len(todo)):
                return None
            if probe:
                todo += self._look_ahead(reader, batch)

    def _try(self, todo: list[Reading], batch: Batch) -> Delivery:
        """Hand ``todo`` to the sink, and note in ``batch`` what is dead."""
        if self._log_hold is not None:
            self._log_hold.look()  # tries may go on for days
        delivery = self._sink.deliver(todo) if todo else Delivery()
        self._watchdog.beat(LOOP)
        # A service's words are read in terminals, and may be anybody's (a captive portal's).
        dead = [replace(d, detail=printable(d.detail)) for d in delivery.dead]
        batch.dead += dead
        self.letters.report(dead)
        return delivery

    def _take_in(self, reader: SpoolReader, batch: Batch, checked: Checked) -> list[Reading]:
        """Add rows to the batch; return those to be delivered."""
        after_seq = batch.rows[-1][0] if batch.rows else self.position
        gaps = find_gaps(after_seq, checked.rows, reader.dropped_through())
        log_gaps(self.notices, self._sink.name, gaps)
        dead = [corrupt(row) for row in checked.damaged]
        self.letters.report(dead)
        batch.add(checked.rows, gaps, dead)
        return checked.good

    def _look_ahead(self, reader: SpoolReader, batch: Batch) -> list[Reading]:
        """Let a held batch grow by what came since; return the rows to be delivered as well."""
        full = self.letters.full()
        rows = [] if full else self._lookahead.read(batch.unsettled(), reader.read_after)
        if not rows:
            return []
        self.check_environment(reader, rows)
        self._forget_ahead()  # that batch has become a part of this one
        return self._take_in(reader, batch, check(rows))

    def _settle(self, reader: SpoolReader, batch: Batch, before_seq: int) -> None:
        if before_seq - 1 > batch.settled_seq:
            self.settle_durably(batch.settle_before(before_seq, reader.epoch))
            self.position = batch.settled_seq

    def settle_durably(self, settlement: Settlement, ahead: AheadStep | None = None) -> None:
        """Move the cursor; on a full disk wait for room rather than deliver all again."""
        moves = settlement.seq != self.position

        def settle() -> None:
            # A commit that failed may have taken place.
            if not (moves and self._state.position(settlement.epoch) == settlement.seq):
                self._state.settle(settlement, ahead)

        self._note_durably(settle)

    def _note_durably(self, note: Callable[[], None]) -> None:
        while True:
            try:
                note()
            except DiskFullError as error:
                log.critical("cannot note what was delivered, waiting for room: %s", error)
                self._watchdog.beat(LOOP)
                if self._stop.wait(DISK_FULL_RETRY_S):
                    raise
            else:
                return

    def wait(self, timeout_s: float, also: SpoolReader | None = None) -> bool:
        """Wait, and have what was delivered noted in time; return whether to stop.

        Args:
            timeout_s: How long at most.
            also: New rows that it announces end the wait; then it also ends when something is to be
                noted, for the caller comes round again.
        """
        due_s = self._state.lag_due_in_s
        if due_s is not None and due_s <= timeout_s:
            if also is None or not due_s:
                self._note_durably(self._state.catch_up)
            else:
                timeout_s = due_s
        return self._stop.wait(timeout_s, also)

    def wait_after(self, fault: Fault | None, failures: int, waiting: int) -> bool:
        """Say what is wrong and wait; return whether to stop."""
        if fault is None:
            raise RuntimeError(f"sink {self._sink.name} wants a retry and gives no reason")
        self._note_durably(self._state.catch_up)
        hold = fault.kind is FaultKind.HOLD
        wait_s = self.wait_s(fault, failures)
        self.set_status("on hold" if hold else "retrying", str(fault))
        log.log(
            logging.ERROR if hold else logging.WARNING,
            "%s: %s",
            "on hold: operator action required" if hold else "delivery failed",
            fault,
            extra=fields(
                sink=self._sink.name,
                failures=failures,
                retry_in_s=round(wait_s, 2),
                rows=waiting,
                after_seq=self.position,
            ),
        )
        deadline = self._clock() + wait_s
        while not self._stop.requested and (left_s := deadline - self._clock()) > 0:
            self._watchdog.beat(LOOP)
            self._stop.wait(left_s)
        return self._stop.requested

    def flush_notices(self, *, at_end: bool = False) -> None:
        """Log how many there were of what is told once a minute; at the end, in any case."""
        self.letters.flush(at_end=at_end)
        self.notices.flush(at_end=at_end)

    def notice(self) -> str:
        """Return what an operator has to know although it delivers."""
        notices = (self.letters.notice(), self._noticing.notice if self._noticing else "")
        return "; ".join(filter(None, notices))

    def wait_s(self, fault: Fault, failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        if fault.probe:
            return probe_wait_s(failures, HOLD_RETRY_S)
        if fault.kind is FaultKind.HOLD:
            return HOLD_RETRY_S
        return backoff_s(failures, self._jitter())

    def set_status_with_notice(self, state: str, detail: str) -> None:
        """Say what the forwarder is doing, and what an operator has to know besides."""
        self.set_status(state, "; ".join(filter(None, (detail, self.notice()))))

    def set_status(self, state: str, detail: str) -> None:
        """Say in the sink's file what the forwarder is doing, if that has changed."""
        detail = printable(detail)
        if (state, detail) != self._status:
            self._note_durably(self._state.catch_up)  # waits for room on a full disk
            self._state.set_status(state, detail)
            self._status = (state, detail)
