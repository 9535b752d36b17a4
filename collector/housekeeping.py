"""What the collector does between batches: progress, pruning, limits, ballast, salvage."""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping

from collector.clockwatch import ClockWatch
from collector.diskhealth import DiskHealth
from lifecycle import RateLimitedLog, fields, log_notice
from spool import (
    BEAT_S,
    SALVAGE_STEP_BYTES,
    SPOOL_DAMAGED,
    Ballast,
    BrokerLink,
    Budget,
    Condition,
    Conditions,
    DiskFullError,
    Level,
    LogWatch,
    Pruner,
    Retention,
    Salvage,
    SinkFile,
    SinkProgress,
    SpoolWriter,
)

log = logging.getLogger("collector")

PROGRESS_INTERVAL_S = 1.0
UNCHANGED_PROGRESS_INTERVAL_S = BEAT_S
"""So that as_of stays fresh on a quiet system without a write each second. A sign of life goes
along."""

UNDECLARED_INTERVAL_S = 3600.0
"""Between two warnings of the same sink file."""

LEVEL_INTERVAL_S = 1.0
BALLAST_INTERVAL_S = 60.0
RETURN_SPACE_STEP_BYTES = 1024 * 1024
RETURN_SPACE_BUSY_STEP_BYTES = 128 * 1024
RETURN_SPACE_BUSY_INTERVAL_S = 0.05
"""While readings come, so that they hardly notice."""

RETURN_SPACE_ABOVE_BYTES = 64 * 1024 * 1024
"""Free pages below this are kept for reuse; a file that was once large shrinks to it."""

STANDS_STILL = "no message is acknowledged, the broker keeps what it can"
"""What a write-ahead log at its bound means."""

_LEVEL_TEXT = {
    Level.WARN: "the spool is filling up: over 80 % of SPOOL_MAX_BYTES",
    Level.PRESSURE: "the spool is nearly full: delivered readings are pruned early",
    Level.FULL: "the spool is full",
}


class Housekeeping:
    """Keeps one spool within its limits, between the batches.

    Args:
        sinks: The files of all sinks, the disabled ones too; iterated over at each look.
        retention: What may be pruned.
        budget: SPOOL_MAX_BYTES.
        ballast: Given up on a full disk.
        salvage: A damaged spool to read from, if there is one.
        log_watch: Of the spool's write-ahead log; one by the budget where it is not given.
        conditions: What the spool's view ``health`` shows; other threads put theirs as well.
        link: What the network thread says of the connection to the broker.
        clock_watch: Looks whether the wall clock was moved.
        clock: Seconds, monotonic.
        now_us: Microseconds since 1970 UTC.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        *,
        sinks: Iterable[SinkFile],
        retention: Retention,
        budget: Budget,
        ballast: Ballast,
        salvage: Salvage | None = None,
        log_watch: LogWatch | None = None,
        conditions: Conditions | None = None,
        link: BrokerLink | None = None,
        clock_watch: ClockWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._sinks = sinks
        self._retention = retention
        self._pruner = Pruner(retention, clock)
        self._budget = budget
        self._ballast = ballast
        self.salvage = salvage
        self.log = log_watch or LogWatch(budget.max_bytes, stands_still=STANDS_STILL, clock=clock)
        """The spool's write-ahead log."""
        self.conditions = conditions or Conditions(clock)
        """What the spool's view ``health`` shows."""
        self._link = link
        self._clock_watch = clock_watch
        self._disk = DiskHealth(self.conditions, ballast, STANDS_STILL, clock)
        self._clock = clock
        self._notices = RateLimitedLog(log, clock)
        self._now_us = now_us
        self._progress: list[SinkProgress] = [sink.read() for sink in sinks]
        self._stored: list[SinkProgress] = []
        self._read_at = float("-inf")
        self._stored_at = float("-inf")
        self._level_at = float("-inf")
        self._ballast_at = float("-inf")
        self._returned_at = float("-inf")
        self._told = Level.GOOD
        self._undeclared_told_at: dict[str, float] = {}
        self.more = salvage is not None
        """Whether there is work left that should not wait for the next message."""

    def level(self, writer: SpoolWriter, incoming_bytes: int = 0) -> Level:
        """Return how full the spool would be with ``incoming_bytes`` more."""
        return self._budget.level(writer, incoming_bytes)

    def turn(self, writer: SpoolWriter) -> None:
        """Do a little of whatever is due."""
        now = self._clock()
        if self._clock_watch is not None and self._clock_watch.look(
            lambda: writer.received_us(writer.last_seq())
        ):
            self._stored_at = float("-inf")  # by the new time the last sign of life is too old
        if now - self._read_at >= PROGRESS_INTERVAL_S:
            self._read_progress(now)
            for sink in self._progress:
                # Only its owner may set a damaged spool aside, and the owner seldom reads.
                if sink.enabled and sink.state == SPOOL_DAMAGED:
                    writer.check_readable(sink.position_in(writer.epoch))
        if progress := self.progress_if_due():
            writer.write_progress(progress)
        writer.beat.turn()  # where no snapshot took one along in time
        self.conditions.clear("spool_full")  # turns are made between batches that were stored
        self._disk.look(writer.path.parent)
        level = self._level_without_garbage(writer)
        if now - self._level_at >= LEVEL_INTERVAL_S:
            self._level_at = now
            self._tell_level(level, writer)
        pruned, returned = 0, False
        if not self.log.full:  # else it would grow by what is deleted
            pruned = self._pruner.turn(
                writer, self._progress, self._now_us(), pressure=level >= Level.PRESSURE
            )
            returned = not pruned and not self._pruner.along and self._return_space(writer, now)
        salvages = self.salvage is not None and not self.log.full
        self.more = bool(pruned) or returned or salvages
        if now - self._ballast_at >= BALLAST_INTERVAL_S and level < Level.FULL:
            self._ballast_at = now
            self._ballast.take()
        self._store_health(writer)

    def _store_health(self, writer: SpoolWriter) -> None:
        if self._link is not None:
            self._link.store(writer)
        self.conditions.store(writer)
        self._notices.flush()

    def look_at_log(self, writer: SpoolWriter) -> None:
        """Work the write-ahead log off if it is long, and tell where a reader pins it.

        Raises:
            StorageFaultError: A checkpoint failed.
        """
        notice = self.log.look(writer)
        self.log.report_to(self.conditions)
        if notice is not None:
            log_notice(log, notice)

    def while_log_full(self, writer: SpoolWriter) -> None:
        """Do what has to be done although nothing should be written."""
        now = self._clock()
        if now - self._read_at >= PROGRESS_INTERVAL_S:
            self._read_progress(now)
        if progress := self.progress_if_due():
            writer.write_progress(progress)
        self._store_health(writer)

    def report_disk_full(self, writer: SpoolWriter) -> None:
        """Have ``health`` say that there is no room, as far as there is room for that.

        The ballast was given up for it. Where even that does not help, no sign of life can be
        written either, which shows as well.
        """
        self._disk.full(writer.path.parent)
        with contextlib.suppress(DiskFullError):
            self._store_health(writer)
            if progress := self.progress_if_due():
                writer.write_progress(progress)

    def _level_without_garbage(self, writer: SpoolWriter) -> Level:
        """Return the level; where space is short, rejected messages go first."""
        level = self.level(writer)
        if level >= Level.PRESSURE and writer.trim_rejected(self._budget.rejected_bytes(level)):
            level = self.level(writer)
        return level

    def limit_rejected(self, writer: SpoolWriter, level: Level) -> None:
        """Say how much the rejected messages of the next batch may take."""
        writer.rejected_max_bytes = self._budget.rejected_bytes(level)

    @property
    def group_bytes(self) -> int:
        """How much one transaction may bring."""
        return self._budget.group_bytes

    def snapshot(self, writer: SpoolWriter) -> None:
        """Store the sinks' positions now."""
        self._read_progress(self._clock())
        writer.write_progress(self._progress)

    def end(self, writer: SpoolWriter, why: str) -> None:
        """Store the sinks' positions, and that the collector ends in order: the last thing."""
        self._notices.flush(at_end=True)
        self.snapshot(writer)
        if self._link is not None:
            self._link.down("the collector was stopped")
            self._link.store(writer)
        writer.set_conditions(())  # who does not run sees nothing
        writer.beat.end("stopped", why)

    def progress_if_due(self) -> list[SinkProgress]:
        """Return the progress that the next transaction should store; empty if none is due."""
        if not self._progress_due(self._clock()):
            return []
        self._stored = self._progress
        self._stored_at = self._clock()
        return self._progress

    def _read_progress(self, now: float) -> None:
        self._progress = [sink.read() for sink in self._sinks]
        self._read_at = now
        undeclared = {p.sink: p for p in self._progress if not p.declared}
        self._undeclared_told_at = {
            sink: at for sink, at in self._undeclared_told_at.items() if sink in undeclared
        }
        self._report_undeclared(undeclared)
        for sink, p in undeclared.items():
            if now - self._undeclared_told_at.get(sink, float("-inf")) >= UNDECLARED_INTERVAL_S:
                self._undeclared_told_at[sink] = now
                log.warning(
                    "undeclared sink file holds pruning",
                    extra=fields(sink=sink, cursor_seq=p.seq, epoch=p.epoch, remedy=p.detail),
                )

    def _report_undeclared(self, undeclared: Mapping[str, SinkProgress]) -> None:
        if not undeclared:
            self.conditions.clear("undeclared_sink")
            return
        self.conditions.put(
            Condition(
                "undeclared_sink",
                "WARNING",
                f"nothing is pruned behind the cursor of {', '.join(sorted(undeclared))}",
                " ".join(p.detail for _, p in sorted(undeclared.items())),
            )
        )

    def _progress_due(self, now: float) -> bool:
        if now - self._stored_at >= UNCHANGED_PROGRESS_INTERVAL_S:
            return True
        if now - self._stored_at < PROGRESS_INTERVAL_S or self.log.full:
            return False
        return len(self._stored) != len(self._progress) or any(
            not new.same_as(old) for new, old in zip(self._progress, self._stored, strict=True)
        )

    def _return_space(self, writer: SpoolWriter, now: float) -> bool:
        """Give free pages back, where there are many; return whether to go on at once."""
        # A pinned log would grow by more than the file becomes smaller.
        if self.log.pinned or writer.free_bytes() <= RETURN_SPACE_ABOVE_BYTES:
            return False
        if not self._pruner.busy:
            writer.return_space(RETURN_SPACE_STEP_BYTES)
            return True
        if now - self._returned_at >= RETURN_SPACE_BUSY_INTERVAL_S:
            self._returned_at = now
            writer.return_space(RETURN_SPACE_BUSY_STEP_BYTES)
        return False

    def make_room(
        self, writer: SpoolWriter, *, drop_oldest: bool, stands_still: bool = True
    ) -> bool:
        """Free space for what does not fit; return whether anything was freed.

        Args:
            writer: Of the spool.
            drop_oldest: Whether undelivered readings may go.
            stands_still: Whether messages wait for it: only then the spool counts as full.
        """
        if writer.trim_rejected(0):
            return True
        self._read_progress(self._clock())
        if self._retention.prune_step(writer, self._progress, self._now_us(), pressure=True):
            return True
        if not drop_oldest:
            if stands_still:
                self._report_full(writer)
            if progress := self.progress_if_due():
                writer.write_progress(progress)
            return False
        dropped = self._retention.drop_step(writer, self._progress)
        if dropped:
            self._notices.log(
                logging.ERROR,
                "readings were dropped undelivered",
                "SPOOL_FULL_POLICY=drop-oldest: readings were dropped undelivered",
                count=dropped,
                rows=dropped,
                total=writer.counter("dropped"),
            )
        return bool(dropped)

    def _report_full(self, writer: SpoolWriter) -> None:
        """Have ``health`` say that nothing is acknowledged; the next turn takes it back."""
        self.conditions.put(
            Condition(
                "spool_full",
                "CRITICAL",
                f"the spool has reached SPOOL_MAX_BYTES, {self._budget.max_bytes} bytes: "
                f"{STANDS_STILL}",
                "which sink does not deliver? Look at the view backlog, and at the disk: df -h "
                f"{writer.path.parent}; or raise SPOOL_MAX_BYTES and restart the collector",
            )
        )
        # On a full disk there may be no room for it; the log says it all the same.
        with contextlib.suppress(DiskFullError):
            self.conditions.store(writer)

    def may_salvage(self, writer: SpoolWriter) -> bool:
        """Return whether there is room for the next step of the salvage; if not, make some.

        What is still in the damaged file is safe there, so the last tenth is left for readings
        that are not.
        """
        if self.log.full:
            return False
        if self.level(writer, SALVAGE_STEP_BYTES) < Level.PRESSURE:
            return True
        self.more = self.make_room(writer, drop_oldest=False, stands_still=False)
        return False

    def release_ballast(self) -> None:
        """Give the ballast's space to the spool."""
        self._ballast_at = self._clock()
        if self._ballast.release():
            log.warning("gave up the ballast file, so that pruning can begin")

    def end_salvage(self) -> None:
        """Report that everything readable of the damaged spool has been copied."""
        if self.salvage is not None:
            log.critical(
                "what could be read of the damaged spool is in the new one; the old file stays "
                "for whoever wants to look",
                extra=fields(
                    file=str(self.salvage.path),
                    salvaged_rows=self.salvage.readable,
                    damaged_rows=self.salvage.unreadable,
                ),
            )
            self.salvage = None

    def _tell_level(self, level: Level, writer: SpoolWriter) -> None:
        if level == self._told:
            return
        used = fields(used_bytes=writer.used_bytes(), max_bytes=self._budget.max_bytes)
        if level > self._told:
            log.warning(_LEVEL_TEXT[level], extra=used)
        elif level is Level.GOOD:
            log.info("the spool has room again", extra=used)
        self._told = level


def warn_of_small_disk(writer: SpoolWriter, max_bytes: int) -> None:
    """Warn if the disk cannot hold what SPOOL_MAX_BYTES allows."""
    free = shutil.disk_usage(writer.path.parent).free
    needed = max_bytes - writer.used_bytes()
    if free < needed:
        log.warning(
            "SPOOL_MAX_BYTES is larger than the disk has room for: the disk will be full first",
            extra=fields(free_bytes=free, needed_bytes=needed, directory=str(writer.path.parent)),
        )
