"""The BigQuery sink with ``BIGQUERY_WRITE_METHOD=storage``: each reading exactly once.

Readings are appended to a stream that this forwarder made and alone appends to, each request
at an offset. What a request holds is durable in the append journal before it is sent. After a
crash, or a lost answer, the same rows go to the same offset again: the service takes them, or
says that it has them (ALREADY_EXISTS). The cursor moves on the service's word alone.

Where the same rows cannot be sent again, or the stream takes no more, it is finalized: then the
service says how many rows it has, which tells to the row what has arrived, and a new stream is
begun. Only if it does not know the stream any more can rows whose answer was lost be there
twice: at most those of one batch, counted as ``possibly_repeated``.

https://cloud.google.com/bigquery/docs/write-api#exactly-once
"""

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence

from forwarder.appendcalls import AppendCalls
from forwarder.appends import (
    Append,
    Meaning,
    Refusal,
    UnrepeatableError,
    cut_rows,
    leave_out,
    moved,
    refusal_of,
    refusal_of_status,
    repeat_cuts,
    without_too_large,
)
from forwarder.faults import FaultError
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.table import GATHER_S
from forwarder.writeapi import CallError
from lifecycle import Settings, fields
from spool import AppendJournal, Cut, DeadLetter, DiskFullError, Journal, Reading, SinkState

log = logging.getLogger("forwarder.bigquery")

BATCH_MAX_ROWS = 10_000
BATCH_MAX_BYTES = 4 * 1024 * 1024
GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""

NEW_STREAMS_MAX = 2
"""In one delivery; then the drain loop's backoff comes first."""

OUTDATED_END_S = 10.0
"""How long the service may name an end of the stream that lies before what it has confirmed."""

_NEVER_SENT = -1


class StorageSink:
    """Appends readings to one table, each exactly once.

    Args:
        settings: Project, dataset, table, emulators, instance id, whether to create the table.
        state: The sink's own file, which holds the append journal.
    """

    name = "bigquery"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES
    gather_s = GATHER_S

    def __init__(self, settings: Settings, state: SinkState) -> None:
        self._calls = AppendCalls(settings, state)
        self._journal = AppendJournal(state)
        self._epoch = ""
        self._known: Journal | None = None
        self._sent_through = _NEVER_SENT
        """Of this stream, the highest offset of an append whose answer was lost. At or below
        it ALREADY_EXISTS means our own rows; above it, rows that nobody here knows of."""
        self._finalized = False
        self._possibly_repeated = 0
        self._behind_since: float | None = None
        self._out_of_range: dict[int, tuple[str, str]] = {}
        """By seq: reason and detail of rows that are not sent, until the journal has them."""

    def resume(self, epoch: str) -> int:
        """Take up the journal; see :class:`forwarder.sink.JournalledSink`."""
        self._epoch = epoch
        self._out_of_range = {}
        journal = self._load()
        return journal.cuts[-1].last_seq if journal.cuts else 0

    def _load(self) -> Journal:
        journal = self._known = self._journal.load()
        # Nobody knows which of them the last process had sent.
        self._sent_through = journal.cuts[-1].offset if journal.cuts else _NEVER_SENT
        self._finalized = False
        self._possibly_repeated = 0
        if journal.cuts and journal.epoch != self._epoch:
            log.warning(
                "the spool is another one than the append journal's: a new stream is begun",
                extra=fields(stream=journal.stream),
            )
            self._possibly_repeated = sum(cut.rows for cut in journal.cuts)
            # The same numbers are other readings here.
            journal.cuts.clear()
            journal.left_out.clear()
            self._finalized = True
        return journal

    @property
    def notice(self) -> str:
        """What an operator has to know while it delivers."""
        return self._calls.notice

    def close(self) -> None:
        """Close the connections."""
        self._calls.close()

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Append ``rows``; see :class:`forwarder.sink.Sink`."""
        delivery = Delivery(retry=list(rows))
        try:
            if self._calls.begin(rows[0][0] - 1):
                self._leave_dead_table(self._known or self._load())
            self._deliver(delivery)
        except FaultError as error:
            delivery.fault = error.fault
            if error.fault.kind is FaultKind.HOLD:
                # By the next try the key file may be another one.
                self._calls.close()
        except DiskFullError as error:
            # Whether the journal was written is unknown: read it again before anything is sent.
            self._known = None
            delivery.fault = Fault(
                FaultKind.TRANSIENT, f"cannot note what would be sent, so nothing is: {error}"
            )
        return delivery

    def _deliver(self, delivery: Delivery) -> None:
        """Deliver ``delivery.retry`` as far as it goes; what is left there is not delivered.

        Raises:
            FaultError: Why something is left, unless it only has to wait for a settlement.
        """
        journal = self._known or self._load()
        self._calls.prepare()
        self._bury(delivery, journal)
        at_first = len(delivery.retry)
        begun = 0
        give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        while delivery.retry:
            self._calls.prepare()
            if self._calls.recreated():
                self._leave_dead_table(journal)
            if not self._finalized and not journal.stream.startswith(f"{self._calls.table}/"):
                self._leave_table(journal, delivery)
            if self._finalized:
                if len(delivery.retry) < at_first:
                    # First the cursor passes what is confirmed: a new stream's cuts take the
                    # place of those that say so.
                    return
                if begun == NEW_STREAMS_MAX:
                    problem = "append: new streams are refused as soon as they are made"
                    raise FaultError(Fault(FaultKind.TRANSIENT, problem))
                begun += 1
                self._begin_stream(journal)
            try:
                appends = self._plan(journal, delivery.retry)
            except UnrepeatableError as error:
                self._finalize(journal, delivery, str(error))
            else:
                self._append(journal, deque(appends), delivery)
            if delivery.retry and time.monotonic() >= give_back_at:
                raise FaultError(Fault(FaultKind.TRANSIENT, "append: not finished yet"))

    def _leave_dead_table(self, journal: Journal) -> None:
        """Give up the stream of a table that was dropped: what it has is gone with it.

        If it is the new table's already, what is on its way can be there twice.
        """
        if self._finalized or not journal.stream:
            return
        log.warning("the stream of a dead table is given up", extra=fields(stream=journal.stream))
        sent = [cut.rows for cut in journal.cuts if cut.offset <= self._sent_through]
        self._possibly_repeated = sum(sent)
        journal.cuts.clear()
        self._finalized = True

    def _leave_table(self, journal: Journal, delivery: Delivery) -> None:
        """Give up the stream of the table that the settings named before, if there is one."""
        if not journal.cuts:
            self._finalized = True  # nothing was on its way
            return
        try:
            self._finalize(journal, delivery, "it is another table's")
        except FaultError as error:
            if error.fault.kind is not FaultKind.HOLD:
                raise
            # We need no rights there any more: what was on its way goes to the new table.
            log.warning("the other table's stream cannot be asked: %s", error.fault)
            self._possibly_repeated = sum(cut.rows for cut in journal.cuts)
            self._finalized = True

    def _bury(self, delivery: Delivery, journal: Journal) -> None:
        """Take out what can never be appended, and what was refused before a crash."""
        first = delivery.retry[0][0]
        delivery.retry, delivery.dead = without_too_large(delivery.retry)
        if journal.left_out:
            known = [row for row in delivery.retry if row[0] in journal.left_out]
            delivery.dead += [DeadLetter(row, *journal.left_out[row[0]]) for row in known]
            delivery.retry = [row for row in delivery.retry if row[0] not in journal.left_out]
        # What is journalled already is repeated as it was, whatever the date has become.
        through = journal.cuts[-1].last_seq if journal.cuts else 0
        delivery.retry, dead = self._calls.out_of_range(delivery.retry, through)
        delivery.dead += dead
        self._out_of_range = {seq: why for seq, why in self._out_of_range.items() if seq > first}
        self._out_of_range |= {d.row[0]: (d.reason, d.detail) for d in dead}

    def _plan(self, journal: Journal, rows: Sequence[Reading]) -> list[Append]:
        """Return the journal's appends again, and behind them new ones, which are journalled."""
        appends, behind = repeat_cuts(rows, journal.cuts)
        fresh = cut_rows(behind, journal.next_offset)
        if fresh:
            cuts = [append.cut for append in fresh]
            if self._out_of_range:
                # Those lie between the cuts' rows. The cuts can be repeated only without them,
                # and tomorrow's date might not tell.
                self._journal.recut(self._epoch, journal.next_offset, cuts, self._out_of_range)
                self._out_of_range = {}
            else:
                self._journal.add(self._epoch, cuts)
            journal.cuts += [append.cut for append in fresh]
            journal.next_offset = fresh[-1].cut.end
        return appends + fresh

    def _append(self, journal: Journal, todo: deque[Append], delivery: Delivery) -> None:
        """Append ``todo``; what is not confirmed stays in ``delivery.retry``, to be planned again.

        Raises:
            FaultError: It cannot be appended now.
        """
        done: list[Append] = []
        try:
            refusal = self._send(journal.stream, todo, done)
        finally:
            _keep(todo, journal, delivery)
        if refusal is None:
            return
        if refusal.meaning is Meaning.ROWS:
            self._leave_out(journal, todo, refusal, delivery)
        elif refusal.meaning is Meaning.SCHEMA:
            self._calls.adapt(refusal)
        elif refusal.meaning is Meaning.FAULT:
            error = CallError(refusal.code, refusal.details)
            raise FaultError(self._calls.fault("append", error))
        elif refusal.expected in {append.cut.offset for append in done}:
            # What the service had confirmed a moment ago, and has not, is still at hand.
            log.error("the service asks for confirmed rows again: %s", refusal.details)
            again = [append for append in done if append.cut.offset >= refusal.expected]
            _keep([*again, *todo], journal, delivery)
            self._sent_through = max(self._sent_through, done[-1].cut.offset)
        else:
            if refusal.code == "OUT_OF_RANGE" and self._may_be_outdated():
                raise FaultError(Fault(FaultKind.TRANSIENT, f"append: {refusal.details}"))
            self._finalize(journal, delivery, f"{refusal.code}: {refusal.details}")

    def _may_be_outdated(self) -> bool:
        """Return whether the end of the stream that the service names may be an old one.

        Right after a reconnection it can take the service some seconds to know the real one
        (googleapis/java-bigquerystorage, testStreamReconnect).
        """
        now = time.monotonic()
        if self._behind_since is None:
            self._behind_since = now
        return now - self._behind_since < OUTDATED_END_S

    def _send(self, stream: str, todo: deque[Append], done: list[Append]) -> Refusal | None:
        """Send what is in ``todo``; move what is confirmed to ``done``; return what stops it."""
        calls = self._calls
        try:
            for append, answer in calls.send(stream, list(todo)):
                repeated = append.cut.offset <= self._sent_through
                refusal = refusal_of(answer, append.cut, repeated=repeated)
                if refusal is not None:
                    if refusal.meaning is Meaning.FAULT:
                        self._answers_lost([append, *calls.unanswered])
                    # The later ones are refused as well: their offsets are too high now.
                    calls.drain()
                    return refusal
                done.append(todo.popleft())
                calls.refusals.accepted()
                self._behind_since = None
        except CallError as error:
            refusal = refusal_of_status(error.code, error.details, error.kind)
            # The service's own status comes behind all answers that it gave: a stream that is
            # not there has taken nothing of what is unanswered.
            if refusal.meaning is not Meaning.STREAM:
                self._answers_lost(calls.unanswered)
            return refusal
        return None

    def _answers_lost(self, appends: Iterable[Append]) -> None:
        """Note that nobody knows what became of these: they may be there already."""
        offsets = [append.cut.offset for append in appends]
        self._sent_through = max(self._sent_through, *offsets) if offsets else self._sent_through

    def _leave_out(
        self, journal: Journal, todo: deque[Append], refusal: Refusal, delivery: Delivery
    ) -> None:
        """Make dead letters of the refused rows, and move the others up."""
        if self._calls.columns_changed():
            return  # not the rows: the table is another one now
        offset = todo[0].cut.offset
        if self._sent_through > offset:
            # One of the later appends may still be on its way from a broken connection, and
            # could find its offset free once these have moved.
            self._finalize(journal, delivery, "rows are refused after answers were lost")
            return
        self._calls.blame_rows(todo[0], refusal, list(todo)[1:])
        letters = leave_out(todo[0], refusal)
        if not letters:
            raise FaultError(
                Fault(FaultKind.TRANSIENT, f"append: an error without a row: {refusal.details}")
            )
        placed = moved(todo, offset)
        reasons = {letter.row[0]: (letter.reason, letter.detail) for letter in letters}
        self._journal.recut(self._epoch, offset, [append.cut for append in placed], reasons)
        journal.next_offset = placed[-1].cut.end if placed else offset
        delivery.dead += letters
        _keep(placed, journal, delivery)

    def _finalize(self, journal: Journal, delivery: Delivery, why: str) -> None:
        """End the stream, learn what it has, and take that out of ``delivery.retry``.

        Raises:
            FaultError: The service cannot be asked now.
        """
        there: int | None = 0
        self._calls.stream_refused()
        if journal.stream:
            log.warning("a write stream is given up: %s", why, extra=fields(stream=journal.stream))
            there = self._calls.finalize_stream(journal.stream)
        self._finalized = True
        confirmed = self._confirmed(journal.cuts, delivery.retry, there or 0)
        left = journal.cuts[len(confirmed) :]
        expected = left[0].offset if left else journal.next_offset
        if there is None:
            self._possibly_repeated = sum(c.rows for c in left if c.offset <= self._sent_through)
        elif there != expected:
            self._possibly_repeated = max(0, there - expected)
            log.error(
                "the stream has another number of rows than the appends that were confirmed",
                extra=fields(stream=journal.stream, rows=there, expected=expected),
            )
        journal.cuts = left
        if confirmed:
            through = confirmed[-1].last_seq
            delivery.retry = [row for row in delivery.retry if row[0] > through]

    def _confirmed(self, cuts: Sequence[Cut], rows: Sequence[Reading], there: int) -> list[Cut]:
        """Return the cuts that are in a stream of ``there`` rows."""
        confirmed = []
        for cut in cuts:
            # What was never sent is not what is there (a bigquery.db from an older copy).
            if cut.end > there or cut.offset > self._sent_through:
                break
            # Of more rows than there were (one failed its checksum, and reads well now) nobody
            # can tell which are there.
            if sum(1 for row in rows if cut.first_seq <= row[0] <= cut.last_seq) > cut.rows:
                break
            confirmed.append(cut)
        return confirmed

    def _begin_stream(self, journal: Journal) -> None:
        """Make a stream, and note it, in the place of one that is finalized or never was."""
        name = self._calls.create_stream()
        self._journal.begin_stream(name, self._possibly_repeated)
        log.info("a new write stream", extra=fields(stream=name))
        if self._possibly_repeated:
            log.error(
                "rows whose answer was lost are sent again to a new stream, because nobody can "
                "tell whether the old one has them: they may be in the table twice",
                extra=fields(rows=self._possibly_repeated, previous_stream=journal.stream),
            )
        journal.stream, journal.next_offset = name, 0
        journal.cuts.clear()
        self._behind_since = None
        self._sent_through = _NEVER_SENT
        self._finalized = False
        self._possibly_repeated = 0


def _keep(appends: Iterable[Append], journal: Journal, delivery: Delivery) -> None:
    """Let ``appends`` be what is still to be done."""
    left = list(appends)
    delivery.retry = [row for append in left for row in append.rows]
    journal.cuts = [append.cut for append in left]
