"""The BigQuery sink with ``BIGQUERY_WRITE_METHOD=storage``: each reading exactly once.

Readings are appended to a stream that this process made and alone appends to, each request at an
offset. What a request holds is durable in the append journal before it is sent. After a lost
answer the same rows go to the same offset again: the service takes them, or says that it has them
(ALREADY_EXISTS). The cursor moves on the service's word alone.

After a crash, where the same rows cannot be sent again, where some are refused or the stream takes
no more, it is finalized: then the service says how many rows it has, which tells to the row what
has arrived, and a new stream is begun (:mod:`forwarder.appendstream`). Only if the service does not
know the stream any more, or names a length that the journal cannot explain, can rows be there
twice; they are counted as ``possibly_repeated``.

https://cloud.google.com/bigquery/docs/write-api#exactly-once
"""

import logging
import time
from collections import deque
from collections.abc import Sequence

from forwarder.appendcalls import AppendCalls
from forwarder.appends import (
    Append,
    Meaning,
    Refusal,
    UnrepeatableError,
    leave_out,
    refusal_of,
    refusal_of_status,
    without_too_large,
)
from forwarder.appendstream import AppendStream
from forwarder.faults import Blame, FaultError, blame_grpc
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.trial import Trial
from forwarder.writeapi import CallError
from lifecycle import Settings, bigquery_gather_s
from spool import AppendJournal, DeadLetter, DiskFullError, Reading, SinkState

log = logging.getLogger("forwarder.bigquery")

BATCH_MAX_ROWS = 10_000
BATCH_MAX_BYTES = 4 * 1024 * 1024
GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""

NEW_STREAMS_MAX = 2
"""In one delivery, without any progress; then the drain loop's backoff comes first."""

OUTDATED_END_S = 10.0
"""How long the service may name an end of the stream that lies before what it has confirmed."""


class StorageSink:
    """Appends readings to one table, each exactly once.

    Args:
        settings: Project, dataset, table, emulators, instance id, whether to create the table.
        state: The sink's own file, which holds the append journal.
        calls: To the service; those of the settings if there are none.
        journal: In the file; the usual one if there is none.
    """

    name = "bigquery"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES

    def __init__(
        self,
        settings: Settings,
        state: SinkState,
        *,
        calls: AppendCalls | None = None,
        journal: AppendJournal | None = None,
    ) -> None:
        self.gather_s = bigquery_gather_s(settings.commit_delay_ms)
        self._calls = calls or AppendCalls(settings, state)
        self._stream = AppendStream(self._calls, journal or AppendJournal(state))
        self._behind_since: float | None = None
        self._stream_refusal: Refusal | None = None
        """Why the last stream was given up."""
        self._give_back_at = float("inf")

    def resume(self, epoch: str) -> int:
        """Take up the journal; see :class:`forwarder.sink.JournalledSink`."""
        return self._stream.resume(epoch)

    def check(self) -> Fault | None:
        """Look whether rows could be delivered; see :class:`forwarder.sink.CheckingSink`."""
        return self._calls.check()

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
        self._give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        try:
            if self._calls.begin(rows[0][0] - 1):
                self._stream.leave_dead_table()
            self._deliver(delivery)
        except FaultError as error:
            delivery.fault = error.fault
            if error.fault.kind is FaultKind.HOLD:
                # By the next try the key file may be another one.
                self._calls.close()
        except DiskFullError as error:
            # Whether the journal was written is unknown: read it again before anything is sent.
            self._stream.forget()
            delivery.fault = Fault(
                FaultKind.TRANSIENT, f"cannot note what would be sent, so nothing is: {error}"
            )
        return delivery

    def _deliver(self, delivery: Delivery) -> None:
        """Deliver ``delivery.retry`` as far as it goes; what is left there is not delivered.

        Raises:
            FaultError: Why something is left, unless it only has to wait for a settlement.
        """
        stream = self._stream
        self._calls.prepare()
        self._bury(delivery)
        handed_in = len(delivery.retry) + len(delivery.dead)
        begun, left = 0, -1
        while delivery.retry:
            self._calls.prepare()
            if self._calls.recreated():
                stream.leave_dead_table()
            if stream.is_earlier:
                _drop_through(delivery, stream.leave_earlier(delivery.retry))
            if stream.left:
                if len(delivery.retry) + len(delivery.dead) < handed_in:
                    # First the cursor passes what is confirmed: a new stream's cuts take the
                    # place of those that say so.
                    return
                begun = begun + 1 if len(delivery.retry) == left else 1
                left = len(delivery.retry)
                if begun > NEW_STREAMS_MAX:
                    raise FaultError(self._refuses_streams())
                stream.begin()
                self._behind_since = None
            try:
                appends = stream.plan(delivery.retry)
            except UnrepeatableError as error:
                _drop_through(delivery, stream.finalize(delivery.retry, str(error)))
            else:
                self._append(deque(appends), delivery)
            if delivery.retry and time.monotonic() >= self._give_back_at:
                raise FaultError(Fault(FaultKind.TRANSIENT, "append: not finished yet"))

    def _refuses_streams(self) -> Fault:
        """Return the fault to report for a service that refuses even new streams."""
        self._calls.columns_changed()  # says what is wrong with the table, if it is
        refusal = self._stream_refusal
        if refusal is None:
            return Fault(FaultKind.TRANSIENT, "append: no new stream can be used")
        passes = refusal.kind or refusal.code == "NOT_FOUND"
        if not passes and blame_grpc(refusal.code) is not Blame.NOBODY:
            return self._calls.fault("append", CallError(refusal.code, refusal.details))
        return Fault(
            FaultKind.TRANSIENT,
            "append: new streams are refused as soon as they are made: "
            f"{refusal.code}: {refusal.details}",
        )

    def _bury(self, delivery: Delivery) -> None:
        """Take out what can never be appended, and what was refused before a crash."""
        stream = self._stream
        first = delivery.retry[0][0]
        delivery.retry, delivery.dead = without_too_large(delivery.retry)
        if left_out := stream.journal.left_out:
            known = [row for row in delivery.retry if row[0] in left_out]
            delivery.dead += [DeadLetter(row, *left_out[row[0]]) for row in known]
            delivery.retry = [row for row in delivery.retry if row[0] not in left_out]
        # What is journalled already is repeated as it was, whatever the date has become.
        delivery.retry, dead = self._calls.out_of_range(delivery.retry, stream.reaches)
        delivery.dead += dead
        stream.leave_out_with_next(first, {d.row[0]: (d.reason, d.detail) for d in dead})

    def _append(self, todo: deque[Append], delivery: Delivery) -> None:
        """Append ``todo``; what is not confirmed stays in ``delivery.retry``, to be planned again.

        Raises:
            FaultError: It cannot be appended now.
        """
        done: list[Append] = []
        try:
            refusal = self._send(todo, done)
        finally:
            self._keep(todo, delivery)
        if refusal is None:
            return
        if refusal.meaning is Meaning.ROWS:
            self._blame_named(todo, refusal, delivery)
        elif refusal.meaning is Meaning.SCHEMA:
            self._blame_unnamed(todo[0], refusal, delivery)
        elif refusal.meaning is Meaning.FAULT:
            error = CallError(refusal.code, refusal.details)
            raise FaultError(self._calls.fault("append", error))
        elif refusal.expected in {append.cut.offset for append in done}:
            # What the service had confirmed a moment ago, and has not, is still at hand.
            log.error("the service asks for confirmed rows again: %s", refusal.details)
            self._stream.answers_lost(done)
            again = [append for append in done if append.cut.offset >= refusal.expected]
            self._keep([*again, *todo], delivery)
        else:
            if refusal.code == "OUT_OF_RANGE" and self._may_be_outdated():
                raise FaultError(Fault(FaultKind.TRANSIENT, f"append: {refusal.details}"))
            self._give_up(refusal, delivery)

    def _keep(self, appends: Sequence[Append], delivery: Delivery) -> None:
        """Let ``appends`` be what is still to be done."""
        delivery.retry = [row for append in appends for row in append.rows]
        self._stream.keep(append.cut for append in appends)

    def _may_be_outdated(self) -> bool:
        """Return whether the end of the stream that the service names may be an old one.

        Right after a reconnection it can take the service some seconds to know the real one
        (googleapis/java-bigquerystorage, testStreamReconnect).
        """
        now = time.monotonic()
        if self._behind_since is None:
            self._behind_since = now
        return now - self._behind_since < OUTDATED_END_S

    def _send(self, todo: deque[Append], done: list[Append]) -> Refusal | None:
        """Send what is in ``todo``; move what is confirmed to ``done``; return what stops it."""
        calls = self._calls
        ends = {append.cut.end for append in todo}
        try:
            for append, answer in calls.send(self._stream.name, list(todo)):
                repeated = self._stream.may_have_been_sent(append.cut)
                refusal = refusal_of(answer, append.cut, ends if repeated else ())
                if refusal is not None:
                    if refusal.meaning is Meaning.FAULT:
                        self._stream.answers_lost([append, *calls.unanswered])
                    self._drain()
                    return refusal
                done.append(todo.popleft())
                calls.refusals.accepted()
                self._behind_since = None
        except CallError as error:
            refusal = refusal_of_status(error.code, error.details, error.kind)
            # The service's own status comes behind all answers that it gave: a stream that is
            # not there has taken nothing of what is unanswered.
            gone = refusal.meaning is Meaning.STREAM and (refusal.kind or error.code == "NOT_FOUND")
            if error.connected and not gone:
                self._stream.answers_lost(calls.unanswered)
            return refusal
        return None

    def _drain(self) -> None:
        """After a refusal: take the answers to what is still on its way.

        The appends behind the refused one are refused as well: their offsets are too high now. A
        service may as well end the call; what it said before that holds all the same.
        """
        try:
            self._calls.drain()
        except CallError:
            self._stream.answers_lost(self._calls.unanswered)

    def _blame_named(self, todo: deque[Append], refusal: Refusal, delivery: Delivery) -> None:
        """Make dead letters of the rows that a refusal names; it is the first append's."""
        if self._calls.columns_changed():
            return  # not the rows: the table is another one now
        self._calls.blame_rows(todo[0], refusal, list(todo)[1:])
        letters = leave_out(todo[0], refusal)
        if not letters:
            raise FaultError(
                Fault(FaultKind.TRANSIENT, f"append: an error without a row: {refusal.details}")
            )
        self._leave_out(letters, delivery)

    def _blame_unnamed(self, append: Append, refusal: Refusal, delivery: Delivery) -> None:
        """Find the rows for which a request was refused as a whole, if it is the rows."""
        if self._calls.adapt(refusal):
            return  # the table is another one now
        letters = Trial(self._calls, self._give_back_at).guilty(append.rows, refusal)
        if letters:
            self._leave_out(letters, delivery)
        else:
            # Another stream takes these rows: it is this stream that is refused.
            self._give_up(refusal, delivery)

    def _leave_out(self, letters: Sequence[DeadLetter], delivery: Delivery) -> None:
        """Take the guilty rows out; the others go to a new stream.

        On this one they would have to move up, to offsets that were assigned to other rows: a
        late request of a broken connection, or a copy of the journal, would put those there.
        """
        reasons = {letter.row[0]: (letter.reason, letter.detail) for letter in letters}
        self._stream.leave_out(reasons)
        delivery.dead += letters
        delivery.retry = [row for row in delivery.retry if row[0] not in reasons]
        through = self._stream.finalize(delivery.retry, "rows are refused, and left out")
        _drop_through(delivery, through)

    def _give_up(self, refusal: Refusal, delivery: Delivery) -> None:
        """Give up the stream because it is refused itself."""
        self._stream_refusal = refusal
        self._calls.stream_refused()
        why = f"{refusal.code}: {refusal.details}"
        _drop_through(delivery, self._stream.finalize(delivery.retry, why))


def _drop_through(delivery: Delivery, seq: int) -> None:
    """Take the rows through ``seq``, which are in the table, out of what is to be done."""
    if seq:
        delivery.retry = [row for row in delivery.retry if row[0] > seq]
