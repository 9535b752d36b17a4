"""The drain loop: from the cursor onwards, deliver, acknowledge, for ever.

Read a batch and have it delivered (:mod:`forwarder.batch_delivery`) before anything later is read;
but where some sites fail, the others are delivered ahead of them (:mod:`forwarder.bypass`).
"""

import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from forwarder.backoff import pause_for_rate_s
from forwarder.batch import check
from forwarder.batch_delivery import LOOP, BatchDelivery
from forwarder.bypass import Bypass
from forwarder.gaplog import log_gaps
from forwarder.hands import Hands
from forwarder.idlecheck import IdleCheck
from forwarder.loghold import LOOK_S, LogHold
from forwarder.readahead import ReadAhead
from forwarder.sink import JournalledSink, Sink
from lifecycle import StopRequest, Watchdog, fields
from spool import (
    LAG_MAX_ROWS,
    LAG_MAX_S,
    SPOOL_DAMAGED,
    CorruptFileError,
    DiskFullError,
    FileLockedError,
    FileMissingError,
    Gap,
    Reading,
    Settlement,
    SinkState,
    SpoolError,
    SpoolReader,
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
        log_hold: Watches the write-ahead log of the sink's file; None for none.
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
        log_hold: LogHold | None = None,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._spool_path = spool_path(directory)
        self._sink = sink
        self._state = state
        self._max_rate = max_rate
        self._stop = stop
        self._watchdog = watchdog
        self._log_hold = log_hold
        self._clock = clock
        self._reader: SpoolReader | None = None
        self._resume_through = 0
        self._ahead = ReadAhead(sink)
        self._deaf = ""
        self._batches = batches = BatchDelivery(
            sink=sink,
            state=state,
            app_env=app_env,
            stop=stop,
            watchdog=watchdog,
            log_hold=log_hold,
            forget_ahead=self._ahead.forget,
            jitter=jitter,
            clock=clock,
        )
        self._letters = batches.letters
        journalled = isinstance(sink, JournalledSink)
        state.let_cursor_lag(
            # With the next batch's commit, which takes place anyway.
            max(LAG_MAX_S, 2 * sink.gather_s) if journalled else LAG_MAX_S,
            sys.maxsize if journalled else LAG_MAX_ROWS,
            clock,
        )
        self._idle_check = IdleCheck(
            sink,
            batches.set_status,
            lambda: batches.set_status("delivering", batches.notice()),
            clock,
        )
        self._bypass = Bypass(
            sink,
            state,
            Hands(
                settle=batches.settle_durably,
                set_status=batches.set_status_with_notice,
                log_dead=batches.letters.report,
                backoff_s=batches.wait_s,
                check_rows=batches.check_environment,
                pause=self._pause_for_rate,
                batch_rows=lambda: self._batch_rows,
                beat=partial(watchdog.beat, LOOP),
                clock=clock,
            ),
        )

    @property
    def _position(self) -> int:
        return self._batches.position

    @_position.setter
    def _position(self, seq: int) -> None:
        self._batches.position = seq

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
        except Exception as error:
            # The file says why it stands still, also to who does not read logs.
            damaged = isinstance(error, CorruptFileError) and error.path == self._spool_path
            with contextlib.suppress(SpoolError):
                self._batches.set_status(SPOOL_DAMAGED if damaged else "stopped", str(error))
            with contextlib.suppress(SpoolError):
                self._state.beat.end("failed", str(error) or type(error).__name__)
            raise
        else:
            self._batches.flush_notices(at_end=True)
            self._batches.set_status("stopped", self._stop.reason)
            with contextlib.suppress(DiskFullError):
                self._state.beat.end("stopped", self._stop.reason)
            if self._log_hold is not None:
                self._log_hold.close()
        finally:
            if self._reader is not None:
                self._reader.close()

    def _loop(self) -> None:
        self._batches.set_status("delivering", self._batches.notice())
        last_row_at = float("-inf")
        checked_at = float("-inf")
        while not self._stop.requested:
            self._watchdog.beat(LOOP)
            self._batches.flush_notices()
            now = self._clock()
            if now - checked_at >= SPOOL_CHECK_S:
                checked_at = now
                self._check_spool()
            reader = self._reader
            if reader is None:
                self._idle_check.look()
                self._batches.wait(SPOOL_CHECK_S)
                continue
            self._hold_for_log()
            bypassed = self._bypass.active
            if bypassed:
                self._idle_check.delivered()
                if not self._room_for_dead_letters(reader):
                    continue
                wait_s = min(self._bypass.turn(reader), POLL_ANNOUNCED_S)
                self._position = self._bypass.cursor
                if self._bypass.active:
                    if not wait_s and self._log_hold is not None:
                        self._batches.wait(self._log_hold.pause_s(self._clock() - now, more=False))
                    self._batches.wait(wait_s, reader if reader.listening else None)
                    continue
            if (reader.changed() or bypassed) and self._drain_available(reader):
                last_row_at = self._clock()
                # Rows that come close together go together; where the service took long,
                # those behind have waited long enough.
                self._batches.wait(max(0.0, now + self._sink.gather_s - last_row_at))
            elif reader.listening:
                self._idle_check.look()
                self._batches.wait(POLL_ANNOUNCED_S, reader)
            else:
                self._idle_check.look()
                busy = self._clock() - last_row_at < BUSY_FOR_S
                self._batches.wait(POLL_BUSY_S if busy else POLL_IDLE_S)

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
        except (FileMissingError, FileLockedError) as error:
            self._batches.notices.log(
                logging.INFO, "waiting for the spool", f"waiting for the spool: {error}"
            )
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
            log_gaps(self._batches.notices, self._sink.name, [gap])
            self._batches.settle_durably(Settlement(reader.epoch, first, gaps=[gap]))
            self._position = first

    def _drain_available(self, reader: SpoolReader) -> bool:
        """Deliver all that is there; return whether there was anything."""
        any_rows = False
        while not self._bypass.active and self._room_for_dead_letters(reader):
            if self._hold_for_log():
                break
            batch = self._ahead.take(self._position) or check(self._read(reader, self._position))
            rows = batch.rows
            if not rows:
                # Rows may have been dropped unseen to the very last one.
                self._position_check(reader)
                return any_rows
            # After the read: an environment is claimed before its first row is written.
            self._batches.check_environment(reader, rows)
            any_rows = True
            self._idle_check.delivered()
            begun = self._clock()
            if len(rows) == self._batch_rows or batch.shortened:  # then there is probably more
                self._ahead.plan(rows[-1][0], partial(self._read, reader))
            failed = self._batches.deliver(reader, batch)
            if failed is not None:
                self._bypass.begin(reader.epoch, self._position, *failed)
            self._pause_for_rate(len(rows), begun)
            if self._log_hold is not None:
                full = len(rows) >= self._batch_rows or batch.shortened
                pause_s = self._log_hold.pause_s(self._clock() - begun, more=full)
                if pause_s:
                    self._batches.wait(pause_s)
        self._ahead.forget()
        return any_rows

    def _pause_for_rate(self, rows: int, begun_s: float) -> None:
        if self._max_rate:
            self._batches.wait(pause_for_rate_s(rows, self._max_rate, self._clock() - begun_s))

    def _room_for_dead_letters(self, reader: SpoolReader) -> bool:
        """Wait until a batch may begin; return False where ``reader`` is to be used no more."""
        held = False
        # What a journalled sink was sending when it was interrupted had begun within the budget.
        # It is finished: in a few days its stream would be forgotten.
        while self._position >= self._resume_through and (full := self._letters.full()):
            held = True
            if self._batches.wait_after(full, 1, 0):
                return False
            self._check_spool()
            if self._reader is not reader:
                return False
        if held:
            self._batches.set_status("delivering", self._batches.notice())
        return not self._stop.requested

    def _hold_for_log(self) -> bool:
        """While the log of the sink's file is at its bound, deliver nothing; return if stopped."""
        held = False
        while self._log_hold is not None and self._log_hold.look():
            held = True
            self._batches.set_status("on hold", self._log_hold.detail)
            self._watchdog.beat(LOOP)
            if self._stop.wait(LOOK_S):
                return True
        if held:
            self._batches.set_status("delivering", self._batches.notice())
        return False

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
            log_gaps(self._batches.notices, self._sink.name, [gap])
            self._batches.settle_durably(Settlement(reader.epoch, last, gaps=[gap]))
            self._position = last
