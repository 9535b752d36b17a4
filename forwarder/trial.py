"""Finds the rows for which the write API refuses a request without naming them.

The search cannot be made on the stream that holds the table's rows: what is found healthy would
have to be appended there, and what is behind it would have no place. It is made on a stream of
type PENDING, whose rows the service looks at in the same way, and which is never committed: its
rows are in no table. https://cloud.google.com/bigquery/docs/write-api#pending_type

Where no row of the request is taken, a row made here is tried: if the service takes that one, the
refused rows are at fault themselves, and if not, it refuses all rows and none is given up.
"""

import time
from collections.abc import Sequence

from forwarder.appendcalls import AppendCalls
from forwarder.appends import Append, Meaning, Refusal, refusal_of, refusal_of_status
from forwarder.faults import FaultError
from forwarder.sink import Fault, FaultKind
from forwarder.writeapi import CallError
from spool import Cut, DeadLetter, Reading

_NAMES = "sluice-trial"


class Trial:
    """One search.

    Args:
        calls: Sends the appends; knows the table's columns.
        give_back_at: On time.monotonic(): when to be content with what was found.
    """

    def __init__(self, calls: AppendCalls, give_back_at: float) -> None:
        self._calls = calls
        self._give_back_at = give_back_at
        self._stream = ""
        self._found: list[DeadLetter] = []
        self._words = ""
        self._any_taken = self._unfinished = False

    def guilty(self, rows: Sequence[Reading], refusal: Refusal) -> list[DeadLetter]:
        """Return the rows that are at fault themselves, as dead letters.

        Args:
            rows: Of the request that was refused.
            refusal: Why.

        Returns:
            None of them, if the service takes all these rows on another stream.

        Raises:
            FaultError: The service refuses every row, or cannot be asked now.
        """
        try:
            self._stream = self._calls.create_stream(trial=True)
        except FaultError as error:
            if error.fault.kind is FaultKind.TRANSIENT:
                raise
            # Not even asked: the refusal itself is what to report.
            original = CallError(refusal.code, refusal.details)
            raise FaultError(self._calls.fault("append", original)) from error
        self._search(list(rows))
        if self._unfinished and not self._found:
            raise FaultError(Fault(FaultKind.TRANSIENT, f"append: not finished yet: {self._words}"))
        if self._found and self._calls.refusals.of_all:
            raise self._calls.refuses_all(self._words)
        self._calls.refusals.buried()
        return self._found

    def _search(self, rows: list[Reading]) -> None:
        if self._calls.refusals.enough or time.monotonic() >= self._give_back_at:
            self._unfinished = True
            return
        words = self._refused(rows)
        if not words:
            self._any_taken = True
            self._calls.refusals.accepted()
        elif len(rows) > 1:
            half = len(rows) // 2
            self._search(rows[:half])
            self._search(rows[half:])
        else:
            self._words = words
            if not self._any_taken:
                self._try_own_row()
            self._calls.refusals.refused()
            self._found.append(DeadLetter(rows[0], "invalid", words))

    def _try_own_row(self) -> None:
        """Tell a row at fault from a service that refuses all, before any row was taken."""
        if self._refused([_own_row()]):
            if self._calls.refusals.holds:
                raise self._calls.refuses_all(self._words)
        else:
            self._calls.refusals.accepted()
        self._any_taken = True  # or it makes no difference

    def _refused(self, rows: list[Reading]) -> str:
        """Return why the service refuses rows; empty if it takes them.

        Raises:
            FaultError: It cannot be asked now.
        """
        append = Append(Cut(0, rows[0][0], rows[-1][0], len(rows)), rows)
        try:
            ((_, answer),) = self._calls.send(self._stream, [append], with_offsets=False)
            refusal = refusal_of(answer, None)
            if refusal is None:
                return ""
            self._calls.drain()  # it may not know the rows' type: see there
        except CallError as error:
            refusal = refusal_of_status(error.code, error.details, error.kind)
        if refusal.meaning is Meaning.ROWS:
            return refusal.rows[0][1] or refusal.details or refusal.code
        if refusal.meaning is Meaning.SCHEMA:
            return refusal.details or refusal.code
        raise FaultError(self._calls.fault("append", CallError(refusal.code, refusal.details)))


def _own_row() -> Reading:
    now_us = time.time_ns() // 1000
    return (
        0,
        bytes(16),
        now_us,
        now_us,
        _NAMES,
        _NAMES,
        _NAMES,
        0.0,
        _NAMES,
        b"{}",
        0,
    )
