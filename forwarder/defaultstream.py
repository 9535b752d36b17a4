"""The BigQuery sink with ``BIGQUERY_WRITE_METHOD=storage_default``: at least once.

The table's default stream has no offsets: an append whose answer was lost is sent again, and its
rows may be there twice. It needs no journal and no stream of its own; otherwise it is
:mod:`forwarder.storage`.

https://cloud.google.com/bigquery/docs/write-api#default_stream
"""

import time
from collections.abc import Sequence

from forwarder.appendcalls import AppendCalls
from forwarder.appends import (
    Append,
    Meaning,
    Refusal,
    cut_rows,
    leave_out,
    refusal_of,
    refusal_of_status,
    without_too_large,
)
from forwarder.faults import FaultError
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.storage import BATCH_MAX_BYTES, BATCH_MAX_ROWS, GIVE_BACK_AFTER_S
from forwarder.trial import Trial
from forwarder.writeapi import CallError
from lifecycle import Settings, bigquery_gather_s
from spool import Reading, SinkState


class DefaultStreamSink:
    """Appends readings to a table's default stream.

    Args:
        settings: Project, dataset, table, emulators, instance id, whether to create the table.
        state: The sink's own file, which remembers the table.
    """

    name = "bigquery"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES

    def __init__(self, settings: Settings, state: SinkState | None = None) -> None:
        self.gather_s = bigquery_gather_s(settings.commit_delay_ms)
        self._calls = AppendCalls(settings, state)
        self._stream = f"{self._calls.table}/streams/_default"
        self._guilty: set[int] = set()
        """By offset: appends that were refused before a later one was taken."""

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
        delivery = Delivery()
        delivery.retry, delivery.dead = without_too_large(rows)
        self._calls.begin(rows[0][0] - 1)
        give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        try:
            while delivery.retry:
                self._calls.prepare()
                delivery.retry, dead = self._calls.out_of_range(delivery.retry)
                delivery.dead += dead
                self._append(delivery, give_back_at)
                if delivery.retry and time.monotonic() >= give_back_at:
                    raise FaultError(Fault(FaultKind.TRANSIENT, "append: not finished yet"))
        except FaultError as error:
            delivery.fault = error.fault
            if error.fault.kind is FaultKind.HOLD:
                # By the next try the key file may be another one.
                self._calls.close()
        return delivery

    def _append(self, delivery: Delivery, give_back_at: float) -> None:
        """Append what is in ``delivery.retry``; what is not confirmed stays there.

        Raises:
            FaultError: It cannot be appended now.
        """
        todo = {append.cut.offset: append for append in cut_rows(delivery.retry, 0)}
        try:
            for append, refusal in self._send(todo):
                others = [other for other in todo.values() if other is not append]
                self._after(append, refusal, others, delivery, give_back_at)
        finally:
            delivery.retry = [row for append in todo.values() for row in append.rows]

    def _send(self, todo: dict[int, Append]) -> list[tuple[Append, Refusal]]:
        """Send what is in ``todo``; take out what is confirmed; return what was refused."""
        refused: list[tuple[Append, Refusal]] = []
        self._guilty.clear()
        try:
            # Each append stands for itself: one that is refused does not concern the others.
            for append, answer in self._calls.send(
                self._stream, list(todo.values()), with_offsets=False
            ):
                refusal = refusal_of(answer, None)
                if refusal is None:
                    del todo[append.cut.offset]
                    self._calls.refusals.accepted()
                    # The service was well after it had refused those before.
                    self._guilty.update(earlier.cut.offset for earlier, _ in refused)
                else:
                    refused.append((append, refusal))
            if refused:
                self._calls.drain()
        except CallError as error:
            # A service may end the call after a refusal: then that is the reason.
            if not refused:
                refusal = refusal_of_status(error.code, error.details, error.kind)
                refused.append((self._calls.unanswered[0], refusal))
        return refused

    def _after(
        self,
        append: Append,
        refusal: Refusal,
        others: Sequence[Append],
        delivery: Delivery,
        give_back_at: float,
    ) -> None:
        """Do what a refusal asks for, before another try; raise if that is not to be now."""
        if refusal.meaning is Meaning.ROWS:
            if self._calls.columns_changed():
                return  # not the rows: the table is another one now
            if append.cut.offset not in self._guilty:
                self._calls.blame_rows(append, refusal, others)
            letters = leave_out(append, refusal)
            if not letters:
                problem = f"append: an error without a row: {refusal.details}"
                raise FaultError(Fault(FaultKind.TRANSIENT, problem))
            delivery.dead += letters
        elif refusal.meaning is Meaning.SCHEMA:
            if self._calls.adapt(refusal):
                return  # the table is another one now
            letters = Trial(self._calls, give_back_at).guilty(append.rows, refusal)
            if not letters:
                # Another stream takes these rows: what is wrong here is not theirs.
                error = CallError(refusal.code, refusal.details)
                raise FaultError(self._calls.fault("append", error))
            delivery.dead += letters
            gone = {letter.row[0] for letter in letters}
            append.rows = [row for row in append.rows if row[0] not in gone]
        else:
            if refusal.meaning is Meaning.STREAM:
                self._calls.columns_changed()  # says what is wrong with the table, if it is
            error = CallError(refusal.code, refusal.details)
            raise FaultError(self._calls.fault("append", error))
