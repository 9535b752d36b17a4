"""The drain loop: from the cursor onwards, deliver, acknowledge, for ever.

Read a batch, hand it to the sink, and move the cursor over the contiguous prefix of rows that
are delivered, dead, or found missing. What the sink wants tried again is tried again, the same
rows in the same order, before anything later is read.
"""

import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from forwarder.backoff import HOLD_RETRY_S, backoff_s, pause_for_rate_s
from forwarder.batch import Batch, Checked, check, find_gaps
from forwarder.bypass import Bypass, Hands
from forwarder.dead_letters import DeadLetterWatch
from forwarder.gaplog import log_gaps
from forwarder.readahead import ReadAhead
from forwarder.sink import Delivery, Fault, FaultKind, JournalledSink, Sink
from lifecycle import StopRequest, Watchdog, fields, printable
from spool import (
    SPOOL_DAMAGED,
    AheadStep,
    CorruptFileError,
    DeadLetter,
    DiskFullError,
    FileMissingError,
    Gap,
    Reading,
    Settlement,
    SinkState,
    SpoolError,
    SpoolReader,
    presentable,
    refuse_backlog,
    spool_path,
)

log = logging.getLogger("forwarder")

POLL_BUSY_S = 0.005
POLL_IDLE_S = 0.018
"""New rows are noticed within 20 ms; sooner while there is traffic, or where they are announced."""

BUSY_FOR_S = 1.0
"""How long after the last row the traffic counts as going on."""

POLL_ANNOUNCED_S = 0.5
"""How often to look although new rows are announced: an announcement is only a hint."""

SPOOL_CHECK_S = 1.0
"""How often to look whether the spool was replaced by a new one, or has appeared."""

DISK_FULL_RETRY_S = 5.0

LOOP = "drain"


class Drain:
    """Drains one spool into one sink.

    Args:
        directory: SPOOL_DIR.
        sink: Where to.
        state: The sink's own file.
        app_env: Readings of another environment are refused.
        max_rate: MAX_DRAIN_RATE, rows per second; 0 for no limit.
        stop: When to end.
        watchdog: Told at each turn.
        jitter: Returns a number from 0 to 1.
        clock: Seconds, monotonic.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        *,
        directory: Path,
        sink: Sink,
        state: SinkState,
        app_env: str,
        max_rate: int,
        stop: StopRequest,
        watchdog: Watchdog,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._spool_path = spool_path(directory)
        self._sink = sink
        self._state = state
        self._app_env = app_env
        self._max_rate = max_rate
        self._stop = stop
        self._watchdog = watchdog
        self._jitter = jitter
        self._clock = clock
        self._reader: SpoolReader | None = None
        self._position = 0
        self._resume_through = 0
        self._status = ("", "")
        self._ahead = ReadAhead(sink)
        self._letters = DeadLetterWatch(sink.name, state, clock)
        self._deaf = ""
        self._bypass = Bypass(
            sink,
            state,
            Hands(
                settle=self._settle_durably,
                set_status=lambda s, d: self._set_status(s, d or self._letters.notice()),
                log_dead=self._letters.report,
                backoff_s=self._wait_s,
                check_rows=self._check_environment,
                pause=self._pause_for_rate,
                batch_rows=lambda: self._batch_rows,
                beat=partial(watchdog.beat, LOOP),
                clock=clock,
            ),
        )

    @property
    def _batch_rows(self) -> int:
        """How many rows to read at once."""
        return min(self._sink.max_rows, self._max_rate or sys.maxsize)

    def run(self) -> None:
        """Drain until asked to stop; the batch in hand is settled as far as it got.

        Raises:
            SpoolError: The spool or the sink's file cannot be used.
        """
        try:
            self._loop()
        except SpoolError as error:
            # The file says why it stands still, also to who does not read logs.
            damaged = isinstance(error, CorruptFileError) and error.path == self._spool_path
            with contextlib.suppress(SpoolError):
                self._set_status(SPOOL_DAMAGED if damaged else "stopped", str(error))
            raise
        self._set_status("stopped", self._stop.reason)
        if self._reader is not None:
            self._reader.close()

    def _loop(self) -> None:
        self._set_status("delivering", self._letters.notice())
        last_row_at = float("-inf")
        checked_at = float("-inf")
        while not self._stop.requested:
            self._watchdog.beat(LOOP)
            self._letters.flush()
            now = self._clock()
            if now - checked_at >= SPOOL_CHECK_S:
                checked_at = now
                self._check_spool()
            reader = self._reader
            if reader is None:
                self._stop.wait(SPOOL_CHECK_S)
                continue
            bypassed = self._bypass.active
            if bypassed:
                if not self._room_for_dead_letters(reader):
                    continue
                wait_s = min(self._bypass.turn(reader), POLL_ANNOUNCED_S)
                self._position = self._bypass.cursor
                if self._bypass.active:
                    self._stop.wait(wait_s, reader if reader.listening else None)
                    continue
            if (reader.changed() or bypassed) and self._drain_available(reader):
                last_row_at = self._clock()
                # Rows that come close together go together; where the service took long,
                # those behind have waited long enough.
                self._stop.wait(max(0.0, now + self._sink.gather_s - last_row_at))
            elif reader.listening:
                self._stop.wait(POLL_ANNOUNCED_S, reader)
            else:
                busy = self._clock() - last_row_at < BUSY_FOR_S
                self._stop.wait(POLL_BUSY_S if busy else POLL_IDLE_S)

    def _check_spool(self) -> None:
        """Open the spool once it is there, and again when another took its place."""
        if self._reader is not None:
            if not self._reader.replaced():
                self._listen(self._reader)
                return
            self._reader.close()
            self._reader = None
        try:
            reader = SpoolReader.open(self._directory)
        except FileMissingError as error:
            log.info("waiting for the spool: %s", error)
            return
        self._reader = reader
        self._listen(reader)
        known = self._state.known_epoch()
        if known and known != reader.epoch:
            log.warning(
                "the spool is a new one; starting at its beginning",
                extra=fields(epoch=reader.epoch, previous_epoch=known),
            )
        self._position = self._state.position(reader.epoch)
        reader.check_position(self._position)
        self._skip_other_environment(reader)
        self._bypass.resume(reader, self._position)
        self._position = self._bypass.cursor
        if isinstance(self._sink, JournalledSink):
            self._resume_through = self._sink.resume(reader.epoch)
        log.info("draining", extra=fields(epoch=reader.epoch, after_seq=self._position))

    def _listen(self, reader: SpoolReader) -> None:
        """Have new rows announced; where that cannot be, say so once, and look often."""
        deaf = reader.listen()
        if deaf != self._deaf:
            self._deaf = deaf
            if deaf:
                log.warning("new rows are not announced, so they are looked for: %s", deaf)
            else:
                log.info("new rows are announced again")

    def _skip_other_environment(self, reader: SpoolReader) -> None:
        """Pass over what is kept of another APP_ENV.

        It was delivered there, or its environment could not have been changed; a cursor that
        was lost since must not bring it here.
        """
        first = reader.environment_from()
        if self._position < first:
            gap = Gap(self._position + 1, first, "taken and delivered under another APP_ENV")
            log_gaps(self._sink.name, [gap])
            self._settle_durably(Settlement(reader.epoch, first, gaps=[gap]))
            self._position = first

    def _drain_available(self, reader: SpoolReader) -> bool:
        """Deliver all that is there; return whether there was anything."""
        any_rows = False
        while not self._bypass.active and self._room_for_dead_letters(reader):
            batch = self._ahead.take(self._position) or check(self._read(reader, self._position))
            rows = batch.rows
            if not rows:
                # Rows may have been dropped unseen to the very last one.
                self._position_check(reader)
                return any_rows
            # After the read: an environment is claimed before its first row is written.
            self._check_environment(reader, rows)
            any_rows = True
            begun = self._clock()
            if len(rows) == self._batch_rows or batch.shortened:  # then there is probably more
                self._ahead.plan(rows[-1][0], partial(self._read, reader))
            self._deliver(reader, batch)
            self._pause_for_rate(len(rows), begun)
        self._ahead.forget()
        return any_rows

    def _pause_for_rate(self, rows: int, begun_s: float) -> None:
        if self._max_rate:
            self._stop.wait(pause_for_rate_s(rows, self._max_rate, self._clock() - begun_s))

    def _room_for_dead_letters(self, reader: SpoolReader) -> bool:
        """Wait until a batch may begin; return False where ``reader`` is to be used no more."""
        held = False
        # What a journalled sink was sending when it was interrupted had begun within the budget.
        # It is finished: in a few days its stream would be forgotten.
        while self._position >= self._resume_through and (full := self._letters.full()):
            held = True
            if self._wait_after(full, 1, 0):
                return False
            self._check_spool()
            if self._reader is not reader:
                return False
        if held:
            self._set_status("delivering", self._letters.notice())
        return not self._stop.requested

    def _read(self, reader: SpoolReader, after_seq: int) -> list[Reading]:
        """Read the next batch; all that the sink was sending when it was interrupted."""
        interrupted = self._resume_through - after_seq
        if interrupted > 0:
            return reader.read_after(after_seq, interrupted, sys.maxsize)
        return reader.read_after(after_seq, self._batch_rows, self._sink.max_bytes)

    def _position_check(self, reader: SpoolReader) -> None:
        last = reader.last_seq()
        if self._position > last:
            reader.check_position(self._position)
        if self._position < last and not reader.read_after(self._position, 1, 1):
            gap = Gap(self._position + 1, last, "left the spool before this sink saw them")
            log_gaps(self._sink.name, [gap])
            self._settle_durably(Settlement(reader.epoch, last, gaps=[gap]))
            self._position = last

    def _check_environment(self, reader: SpoolReader, rows: Sequence[Reading]) -> None:
        spooled_under = reader.app_env()
        if spooled_under != self._app_env:
            refuse_backlog(
                spooled_under, self._app_env, {self._sink.name: len(rows)}, str(reader.path)
            )

    def _deliver(self, reader: SpoolReader, checked: Checked) -> None:
        """Deliver one batch, for as long as it takes, or until asked to stop."""
        rows, todo = checked.rows, checked.good
        gaps = find_gaps(self._position, rows, reader.dropped_through())
        batch = Batch(rows, gaps, settled_seq=self._position)
        log_gaps(self._sink.name, batch.gaps)
        detail = "the row's checksum is wrong: its bits changed"
        batch.dead += [
            DeadLetter(presentable(row), "corrupt_row", detail) for row in checked.damaged
        ]
        self._letters.report(batch.dead)
        failures = 0
        while True:
            delivery = self._sink.deliver(todo) if todo else Delivery()
            self._watchdog.beat(LOOP)
            # A service's words are read in terminals, and may be anybody's (a captive portal's).
            dead = [replace(d, detail=printable(d.detail)) for d in delivery.dead]
            batch.dead += dead
            self._letters.report(dead)
            progressed = len(delivery.retry) < len(todo)
            todo = delivery.retry
            self._settle(reader, batch, todo[0][0] if todo else rows[-1][0] + 1)
            if not todo:
                if failures:
                    log.info("delivering again", extra=fields(sink=self._sink.name))
                self._set_status("delivering", self._letters.notice())
                return
            if delivery.faults:
                # Some sites failed: the others do not wait for them.
                self._bypass.begin(reader.epoch, self._position, batch, delivery)
                return
            if progressed and delivery.fault is None:
                continue  # what is confirmed had to be settled first
            failures = 1 if progressed else failures + 1
            if self._wait_after(delivery.fault, failures, len(todo)):
                return

    def _settle(self, reader: SpoolReader, batch: Batch, before_seq: int) -> None:
        if before_seq - 1 > batch.settled_seq:
            self._settle_durably(batch.settle_before(before_seq, reader.epoch))
            self._position = batch.settled_seq

    def _settle_durably(self, settlement: Settlement, ahead: AheadStep | None = None) -> None:
        """Move the cursor; on a full disk wait for room rather than deliver all again."""
        moves = settlement.seq != self._position
        while True:
            try:
                self._state.settle(settlement, ahead)
            except DiskFullError as error:
                log.critical("cannot note what was delivered, waiting for room: %s", error)
                self._watchdog.beat(LOOP)
                if self._stop.wait(DISK_FULL_RETRY_S):
                    raise
                if moves and self._state.position(settlement.epoch) == settlement.seq:
                    return  # the commit that failed did take place
            else:
                return

    def _wait_after(self, fault: Fault | None, failures: int, waiting: int) -> bool:
        """Say what is wrong and wait; return whether to stop."""
        if fault is None:
            raise RuntimeError(f"sink {self._sink.name} wants a retry and gives no reason")
        hold = fault.kind is FaultKind.HOLD
        wait_s = self._wait_s(fault, failures)
        self._set_status("on hold" if hold else "retrying", str(fault))
        log.log(
            logging.ERROR if hold else logging.WARNING,
            "%s: %s",
            "delivery is on hold until somebody mends this" if hold else "delivery failed",
            fault,
            extra=fields(
                sink=self._sink.name,
                failures=failures,
                retry_in_s=round(wait_s, 2),
                rows=waiting,
                after_seq=self._position,
            ),
        )
        deadline = self._clock() + wait_s
        while not self._stop.requested and (left_s := deadline - self._clock()) > 0:
            self._watchdog.beat(LOOP)
            self._stop.wait(left_s)
        return self._stop.requested

    def _wait_s(self, fault: Fault, failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        if fault.kind is FaultKind.HOLD:
            return HOLD_RETRY_S
        return backoff_s(failures, self._jitter())

    def _set_status(self, state: str, detail: str) -> None:
        detail = printable(detail)
        if (state, detail) != self._status:
            self._state.set_status(state, detail)
            self._status = (state, detail)
