"""Whether the write API takes any row of a table: asked without a trace in the table.

Refused rows are at fault themselves if a row behind them is accepted (:mod:`forwarder.refusals`).
In a stream of offsets nothing can be appended behind them before they are given up, and nothing may
be given up before that is known.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from forwarder.appends import size_bound
from forwarder.faults import Blame, FaultError, blame_grpc
from forwarder.rowproto import RequestEncoder
from forwarder.writeapi import CallError, WriteApi, code_name
from spool import Reading

CANDIDATES_MAX = 50
CANDIDATES_MAX_BYTES = 1_000_000
TRIES_MAX = 20
"""Requests of one dry run: the service does not always name all bad rows, or any."""


def publisher_of(row: Reading) -> tuple[str, str, str]:
    """Return what tells the publishers of readings apart: site, sensor and tag."""
    return row[4], row[5], row[6]


def candidates(rows: Iterable[Reading], refused: Iterable[Reading]) -> list[Reading]:
    """Return the newest row of each publisher, those of whom nothing was refused first.

    Args:
        rows: Of which nothing is known, in the order of seq.
        refused: Those that were refused.
    """
    newest = {publisher_of(row): row for row in rows}
    suspects = {publisher_of(row) for row in refused}
    chosen = sorted(newest.values(), key=lambda row: (publisher_of(row) in suspects, -row[0]))
    size = 0
    for count, row in enumerate(chosen[:CANDIDATES_MAX]):
        size += size_bound(row)
        if count and size > CANDIDATES_MAX_BYTES:
            return chosen[:count]
    return chosen[:CANDIDATES_MAX]


class DryRun:
    """Appends rows to a stream that is never committed: they are judged, and never in the table.

    Rows of a stream of type PENDING are visible only after a commit, which is never made
    (https://cloud.google.com/bigquery/docs/write-api#pending_type).

    Args:
        api: The write API.
    """

    def __init__(self, api: WriteApi) -> None:
        self._api = api
        self._stream = ""

    def forget(self) -> None:
        """Let the next run have a stream of its own: the table may be another one."""
        self._stream = ""

    def accepts_any(self, encoder: RequestEncoder, rows: Sequence[Reading]) -> bool:
        """Return whether the service takes any of ``rows``; False where it cannot be told.

        Args:
            encoder: Of the table's columns.
            rows: At most CANDIDATES_MAX.
        """
        parts = deque([list(rows)])
        for _ in range(TRIES_MAX):
            if not parts:
                return False
            part = parts.popleft()
            try:
                refused = self._refused(encoder, part)
            except (CallError, FaultError):
                self._stream = ""
                return False
            if refused is None:
                return True
            if refused:
                rest = [row for index, row in enumerate(part) if index not in refused]
                parts.extendleft([rest] if rest else [])
            elif len(part) > 1:
                half = len(part) // 2
                parts.extend([part[:half], part[half:]])
        return False

    def _refused(self, encoder: RequestEncoder, rows: list[Reading]) -> set[int] | None:
        """Return the indices of the rows that are named as bad; None if all are taken.

        Raises:
            CallError: The service cannot be asked.
            FaultError: There are no credentials.
        """
        if not self._stream:
            self._stream = self._api.create_stream(pending=True)
        appender = self._api.open(self._stream)
        try:
            appender.send(encoder.request(encoder.rows(rows), None, stream=self._stream))
            answer = appender.receive()
        except CallError as error:
            if blame_grpc(error.code) is Blame.ROWS:
                return set()
            raise
        finally:
            appender.close()
        if answer.row_errors:
            return {int(error.index) for error in answer.row_errors}
        if answer.HasField("error"):
            code = code_name(answer.error.code)
            if blame_grpc(code) is Blame.ROWS:
                return set()
            raise CallError(code, str(answer.error.message))
        return None
