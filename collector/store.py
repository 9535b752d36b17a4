"""The writer thread: inbox → validation → one transaction → acknowledgements.

Group commit: whatever waits when the last commit ended is the next batch; few wait for more
for COMMIT_DELAY_MS at most (:mod:`collector.gather`).
Between batches it keeps house: the sinks' progress, pruning, the limits, the ballast.
"""

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from collector.dedup import DedupWindow
from collector.group import Group
from collector.housekeeping import Housekeeping
from collector.inbox import Delivered, Inbox, parts
from collector.paho_client import Ack
from collector.validation import Validator
from lifecycle import RateLimitedLog, StopRequest, Watchdog, fields
from spool import (
    ROW_OVERHEAD_BYTES,
    CorruptFileError,
    DiskFullError,
    FileLockedError,
    Level,
    NewReading,
    Rejection,
    Salvage,
    SpoolError,
    SpoolWriter,
    StorageFaultError,
    event_id,
)

log = logging.getLogger("collector")

GROUP_MAX_MESSAGES = 5_000
IDLE_WAIT_S = 0.25
ROOM_CHECK_S = 0.5
"""While the spool is full: how often to look whether there is room again."""

FULL_REMINDER_S = 60.0
LOOP = "writer"

SALVAGE_KEY = "salvage"
"""In meta: how far a damaged spool has been copied; empty once that is done."""


class Store:
    """Makes durable what the inbox holds, then has it acknowledged.

    Args:
        open_writer: Opens the spool; again after a fault.
        inbox: Where messages come from.
        validator: Tells readings from garbage.
        housekeeping: Pruning, limits, progress.
        dedup_window: DEDUP_WINDOW.
        acknowledge: Takes a connection's generation and what of it is durable.
        drop_oldest: SPOOL_FULL_POLICY=drop-oldest.
        stop: Asked for when this thread fails.
        watchdog: Told at each turn.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        *,
        open_writer: Callable[[], SpoolWriter],
        writer: SpoolWriter,
        inbox: Inbox,
        validator: Validator,
        housekeeping: Housekeeping,
        dedup_window: int,
        acknowledge: Callable[[int, list[Ack]], None],
        drop_oldest: bool,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self._open_writer = open_writer
        self._writer = writer
        self._inbox = inbox
        self._validator = validator
        self._house = housekeeping
        self._window_size = dedup_window
        self._acknowledge = acknowledge
        self._drop_oldest = drop_oldest
        self._stop = stop
        self._watchdog = watchdog
        self._notices = RateLimitedLog(log)
        self._house.log.before_try = watchdog.allow
        self._meta: dict[str, str] = {}
        self._window = DedupWindow(dedup_window, writer.tail_event_ids(dedup_window))
        self._thread = threading.Thread(target=self._run, name="writer")
        self.failure: BaseException | None = None
        """Why the thread ended, if not because it was done."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the end of the thread; raise what ended it."""
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def remember(self, key: str, value: str) -> None:
        """Have ``value`` written to the spool's ``meta`` with the next turn. Any thread."""
        self._meta[key] = value

    def _run(self) -> None:
        # A dead thread in a live process would take messages and never acknowledge one.
        try:
            while not self._inbox.finished and self._turn():
                pass
            self._farewell()
        except BaseException as error:  # noqa: BLE001 - kept, and raised again by join()
            if isinstance(error, DiskFullError | FileLockedError) and self._stop.requested:
                log.warning("ends while nothing can be written; the broker keeps all: %s", error)
                return
            self.failure = error
            # First of all: where the file is locked, only a stop ends the wait.
            self._stop.request("the writer thread failed")
            # Not after a fault of the disk: what is in the log then is for the next start to judge.
            if not isinstance(error, StorageFaultError):
                with contextlib.suppress(SpoolError):
                    self._writer.beat.end("failed", str(error) or type(error).__name__)

    def _farewell(self) -> None:
        self._notices.flush(at_end=True)
        try:
            self._house.end(self._writer, self._stop.reason)
            self._writer.checkpoint()
        except SpoolError as error:
            # Everything acknowledged is durable without it; the next start does it.
            log.warning("could not tidy up before the end: %s", error)

    def _turn(self) -> bool:
        """Store and acknowledge what waits; return whether to go on."""
        self._watchdog.beat(LOOP)
        self._look_at_log()
        more = self._house.more
        taken = self._inbox.take(GROUP_MAX_MESSAGES, 0.0 if more else IDLE_WAIT_S, gather=not more)
        for part in parts(taken, self._house.group_bytes):
            group = self._group(part)
            if not self._commit(group):
                # Asked to stop while there was no room: the broker keeps these messages, and
                # so also what came after them. A later, smaller group might fit, and would
                # overtake them.
                return False
            for generation, acks in group.acks:
                self._acknowledge(generation, acks)
        self._checkpoint()
        try:
            # First of all the pruning: on a full disk it makes the room that the others need.
            self._house.turn(self._writer)
            self._store_meta()
            self._salvage()
        except DiskFullError as error:
            self._reopen_after(error)
            self._take_up_salvage()
            # Not again at once: what waits for room looks for it each IDLE_WAIT_S.
            self._house.more = False
        self._notices.flush()
        return True

    def _look_at_log(self) -> None:
        self._checkpointed(lambda: self._house.look_at_log(self._writer))
        # A pinned log keeps every page of every commit.
        self._inbox.stretch(wanted=self._house.log.pinned)

    def _checkpoint(self) -> None:
        if not self._house.log.pinned:
            self._checkpointed(self._writer.checkpoint_if_due)

    def _checkpointed(self, checkpoint: Callable[[], None]) -> None:
        try:
            checkpoint()
        except CorruptFileError:
            raise
        except SpoolError as error:
            # Until one succeeds, everything stays in the log, from where it is read as well.
            self._notices.warn("checkpoint", f"the write-ahead log cannot be worked off: {error}")

    def _store_meta(self) -> None:
        while self._meta:
            key, value = self._meta.popitem()
            try:
                self._writer.set_meta(key, value)
            except DiskFullError:
                self._meta.setdefault(key, value)  # unless there is a newer one by now
                raise

    def _group(self, taken: Sequence[Delivered]) -> Group:
        """Sort the messages into readings, duplicates and rejections."""
        group = Group()
        counts = group.counts
        readings = group.readings
        check, add = self._validator.check, self._window.add
        for generation, received_us, messages, size in taken:
            acks: list[Ack] = []
            no_reading_bytes = 0
            for message in messages:
                topic, payload, qos, retained, mid, _ = message
                identity = event_id(topic, payload)
                reading, rejection, site_differs = check(message, identity, received_us)
                if rejection is not None:
                    group.rejections.append(rejection)
                    no_reading_bytes += len(topic) + len(payload) + ROW_OVERHEAD_BYTES
                    self._tell_rejection(rejection)
                elif reading is not None and add(identity):
                    readings.append(reading)
                    if site_differs:
                        self._tell_mismatch(counts, reading)
                else:
                    counts["duplicates"] += 1
                    no_reading_bytes += len(topic) + len(payload) + ROW_OVERHEAD_BYTES
                if qos:
                    acks.append((qos, mid))
                else:
                    self._tell_qos0(counts)
                if retained:
                    counts["retained"] += 1
            counts["received"] += len(messages)
            group.size += size + ROW_OVERHEAD_BYTES * len(messages) - no_reading_bytes
            if acks:
                group.acks.append((generation, acks))
        counts["spooled"] += len(group.readings)
        counts["rejected"] += len(group.rejections)
        return group

    def _tell_rejection(self, rejection: Rejection) -> None:
        _, reason, detail, topic, _, size, _, _ = rejection
        self._notices.warn(
            f"rejected {reason}",
            f"message rejected: {detail}",
            reason=reason,
            topic=topic[:200],
            payload_bytes=size,
            look="select * from rejected",
        )

    def _tell_mismatch(self, counts: Counter[str], reading: NewReading) -> None:
        counts["site_mismatch"] += 1
        self._notices.warn(
            "site mismatch",
            "the payload's site_code differs from the topic's; the payload's is used",
            topic=reading[7][:200],
            site_code=reading[3],
        )

    def _tell_qos0(self, counts: Counter[str]) -> None:
        counts["qos0"] += 1
        self._notices.warn(
            "qos 0",
            "messages come with QoS 0: they are spooled, but whoever publishes them is promised "
            "nothing; publish with QoS 1",
        )

    def _commit(self, group: Group) -> bool:
        """Make the group durable, waiting for room as the policy says; False if stopped."""
        told_at: float | None = None
        while True:
            self._watchdog.beat(LOOP)
            try:
                if not self._log_has_room():
                    return False
                level = self._house.level(self._writer, group.size)
                if level < Level.FULL:
                    if group.rejections:
                        self._house.limit_rejected(self._writer, level)
                    progress = self._house.progress_if_due()
                    self._writer.append(group.readings, group.rejections, group.counts, progress)
                    if told_at is not None:
                        log.info("there is room again: taking messages")
                    return True
                if self._house.make_room(self._writer, drop_oldest=self._drop_oldest):
                    continue
            except DiskFullError as error:
                self._reopen_after(error)
                self._forget_durable(group)
            if told_at is None or time.monotonic() - told_at >= FULL_REMINDER_S:
                told_at = time.monotonic()
                self._tell_full()
            if self._pause():
                return False

    def _log_has_room(self) -> bool:
        """Wait while a reader keeps the write-ahead log at its bound; False if stopped.

        The log watch tells of it, and when it is over. No reading is dropped for it.
        """
        while self._house.log.full:
            self._watchdog.beat(LOOP)
            self._house.while_log_full(self._writer)
            if self._pause():
                return False
            self._look_at_log()
        return True

    def _pause(self) -> bool:
        """Wait until it is worth looking for room again; return whether to stop instead."""
        if not self._stop.requested:
            time.sleep(ROOM_CHECK_S)
        return self._stop.requested

    def _tell_full(self) -> None:
        log.critical(
            "the spool is full: no message is acknowledged until there is room; the broker keeps "
            "what it can. It goes on by itself once the cloud takes readings again. Look: "
            "sqlite3 -readonly %s 'select * from backlog'; df -h %s",
            self._writer.path,
            self._writer.path.parent,
            extra=fields(used_bytes=self._writer.used_bytes()),
        )

    def _reopen_after(self, error: DiskFullError) -> None:
        """After SQLITE_FULL the last commit is unknown: open again, give up the ballast."""
        self._notices.warn("disk full", f"the disk is full: {error}")
        self._house.release_ballast()
        self._writer.close()
        while True:
            try:
                self._writer = self._open_writer()
            except DiskFullError:
                # Even opening needs room, for what SQLite finds in the write-ahead log.
                self._watchdog.beat(LOOP)
                if self._stop.requested:
                    raise
                time.sleep(ROOM_CHECK_S)
            else:
                break
        # The log must not take the room that the ballast has given: what is in it goes to the
        # database, which may have free pages, and it begins anew.
        with contextlib.suppress(SpoolError):
            self._writer.checkpoint()
        self._house.report_disk_full(self._writer)

    def _forget_durable(self, group: Group) -> None:
        """Take out of ``group`` what the failed commit did store after all."""
        # All of the group, even where DEDUP_WINDOW is smaller or 0.
        stored = set(self._writer.tail_event_ids(len(group.readings)))
        window = DedupWindow(self._window_size, self._writer.tail_event_ids(self._window_size))
        before = len(group.readings)
        group.readings = [row for row in group.readings if row[0] not in stored]
        for row in group.readings:
            window.add(row[0])
        group.counts["spooled"] -= before - len(group.readings)
        group.counts["duplicates"] += before - len(group.readings)
        self._window = window

    def _salvage(self) -> None:
        """Copy the next rows of a damaged spool, if one is being salvaged."""
        salvage = self._house.salvage
        if salvage is None:
            return
        if not self._house.may_salvage(self._writer):
            self._notices.warn(
                "salvage waits",
                "the rest of the damaged spool is not copied until there is room for it in "
                "SPOOL_MAX_BYTES",
            )
            return
        rows = salvage.step()
        if not rows and not salvage.done:
            return  # it still looks for them
        new = [row for row in rows if self._window.add(row[0])]
        # Rows and position in one transaction: a crash in between repeats or skips nothing.
        # A spool that was damaged while it took over another one leaves the rest of that.
        rest = salvage.earlier(SALVAGE_KEY) if salvage.done else ""
        position = {SALVAGE_KEY: salvage.position() or rest}
        self._writer.append(new, (), Counter(salvaged=len(new)), meta=position)
        if salvage.done:
            self._house.end_salvage()
            self._house.salvage = Salvage.resumed(rest) if rest else None

    def _take_up_salvage(self) -> None:
        """After a step that is not durable, go on where the spool says that it stands."""
        salvage = self._house.salvage
        if salvage is None:
            return
        position = self._writer.meta(SALVAGE_KEY)
        if position == salvage.position():
            return
        salvage.close()
        self._house.salvage = Salvage.resumed(position)
        self._window = DedupWindow(
            self._window_size, self._writer.tail_event_ids(self._window_size)
        )
