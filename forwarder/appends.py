"""Which readings go into which append, and what an answer to one means. Talks to nobody.

Limits (https://cloud.google.com/bigquery/quotas#write-api-limits): 10 MB a request. The
documentation advises fewer and larger requests of about a megabyte and more.
"""

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from forwarder.faults import Blame, blame_grpc
from forwarder.writeapi import code_name, storage_error
from spool import Cut, DeadLetter, Reading

REQUEST_MAX_ROWS = 2_000
REQUEST_MAX_BYTES = 4_000_000
"""A request above this has one row."""

ROW_MAX_BYTES = 7_900_000
"""A row above this has no room in a request; such readings take MAX_PAYLOAD_BYTES near 8 MiB."""

_ROW_OVERHEAD_BYTES = 200
_UTF8_MAX_BYTES = 4
_EXPECTED_OFFSET = re.compile(r"expected offset:? (\d+)", re.IGNORECASE)


class UnrepeatableError(Exception):
    """The rows at hand are not those of which the journal's cuts were made."""


@dataclass(slots=True)
class Append:
    """One request: its place in the stream and its rows."""

    cut: Cut
    rows: list[Reading]


def size_bound(row: Reading) -> int:
    """Return a number of bytes that the row in a request does not exceed."""
    texts = len(row[4]) + len(row[5]) + len(row[6]) + len(row[8])
    return len(row[9]) + _UTF8_MAX_BYTES * texts + _ROW_OVERHEAD_BYTES


def too_large(row: Reading) -> bool:
    """Return whether the row fits into no request."""
    if size_bound(row) <= ROW_MAX_BYTES:
        return False
    texts = sum(len(text.encode()) for text in (row[4], row[5], row[6], row[8]))
    return len(row[9]) + texts + _ROW_OVERHEAD_BYTES > ROW_MAX_BYTES


def cut_rows(rows: Iterable[Reading], offset: int) -> list[Append]:
    """Cut rows into appends that follow one another from ``offset`` on."""
    appends: list[Append] = []
    part: list[Reading] = []
    size = 0
    for row in rows:
        bound = size_bound(row)
        if part and (len(part) == REQUEST_MAX_ROWS or size + bound > REQUEST_MAX_BYTES):
            appends.append(_append(part, offset))
            offset += len(part)
            part, size = [], 0
        part.append(row)
        size += bound
    if part:
        appends.append(_append(part, offset))
    return appends


def _append(rows: list[Reading], offset: int) -> Append:
    return Append(Cut(offset, rows[0][0], rows[-1][0], len(rows)), rows)


def repeat_cuts(rows: Sequence[Reading], cuts: Iterable[Cut]) -> tuple[list[Append], list[Reading]]:
    """Return the appends of journalled cuts, made of the same rows again, and the rows behind.

    Raises:
        UnrepeatableError: Some of them are missing, or there are more.
    """
    appends = []
    at = 0
    for cut in cuts:
        begin = at
        while at < len(rows) and rows[at][0] <= cut.last_seq:
            at += 1
        part = list(rows[begin:at])
        if len(part) != cut.rows or part[0][0] < cut.first_seq:
            raise UnrepeatableError(
                f"seq {cut.first_seq} to {cut.last_seq} had {cut.rows} rows, now {len(part)}"
            )
        appends.append(Append(cut, part))
    return appends, list(rows[at:])


def without_too_large(rows: Sequence[Reading]) -> tuple[list[Reading], list[DeadLetter]]:
    """Return the rows that fit into a request, and dead letters of the others."""
    dead = [
        DeadLetter(row, "limit", "the row is larger than BigQuery's requests may be")
        for row in rows
        if too_large(row)
    ]
    if not dead:
        return list(rows), dead
    gone = {letter.row[0] for letter in dead}
    return [row for row in rows if row[0] not in gone], dead


class Meaning(Enum):
    """What a refusal asks for."""

    ROWS = "rows"
    """Some rows are at fault: leave them out, send the rest again to the same offset."""
    OFFSET = "offset"
    """The service's end of the stream is not where we think it is."""
    STREAM = "stream"
    """The stream takes no appends any more."""
    SCHEMA = "schema"
    """The request as a whole: the rows' type does not fit the table, or a row that is not named
    is at fault."""
    FAULT = "fault"
    """The network, the service, or a person: try the same again later."""


@dataclass(slots=True)
class Refusal:
    """An append that the service did not take."""

    meaning: Meaning
    code: str
    """The gRPC status by name."""
    details: str
    """The service's words."""
    rows: list[tuple[int, str]] = field(default_factory=list)
    """Of ROWS: index within the append, and what is wrong with it."""
    kind: str = ""
    """The name of the StorageError's code, if there is one."""
    expected: int = -1
    """Of OFFSET: the offset that the service names; -1 if it names none."""


def leave_out(append: Append, refusal: Refusal) -> list[DeadLetter]:
    """Take the refused rows out of ``append``; return them as dead letters."""
    refused = {i: text for i, text in refusal.rows if 0 <= i < len(append.rows)}
    letters = [DeadLetter(append.rows[i], "invalid", text) for i, text in refused.items()]
    append.rows = [row for i, row in enumerate(append.rows) if i not in refused]
    return letters


_STREAM_ERRORS = frozenset(
    {
        "TABLE_NOT_FOUND",
        "STREAM_NOT_FOUND",
        "STREAM_FINALIZED",
        "STREAM_ALREADY_COMMITTED",
        "INVALID_STREAM_STATE",
        "INVALID_STREAM_TYPE",
    }
)


_STREAM_CODES = frozenset({"NOT_FOUND", "FAILED_PRECONDITION"})
"""Of a refusal without a StorageError: what the stream's state does not allow. If a new stream is
refused in the same way, it is something of the table, for a person to look at."""


def refusal_of(
    answer: Any,  # noqa: ANN401 - an AppendRowsResponse, which has no type
    cut: Cut | None,
    ends: Container[int] = (),
) -> Refusal | None:
    """Return why the service did not take an append; None if its rows are in the table.

    Args:
        answer: The AppendRowsResponse.
        cut: What was sent; None where there are no offsets.
        ends: At which ends of the stream ALREADY_EXISTS means that the rows that are there are
            these: the ends of the appends of which this one may have been sent before. Another
            end proves rows that this journal does not know of.
    """
    if not answer.HasField("error") and not answer.row_errors:
        return _misplaced(answer, cut)
    status = answer.error
    code = code_name(status.code)
    kind = storage_error(status)
    details = f"{kind}: {status.message}" if kind else str(status.message)
    if answer.row_errors:
        rows = [(int(e.index), str(e.message)) for e in answer.row_errors]
        return Refusal(Meaning.ROWS, code, details, rows)
    refusal = refusal_of_status(code, details, kind)
    exists = code == "ALREADY_EXISTS" or kind == "OFFSET_ALREADY_EXISTS"
    # An answer that names no end proves nothing: then the stream's length decides.
    if exists and cut is not None and refusal.expected >= cut.end and refusal.expected in ends:
        return None
    return refusal


def _misplaced(answer: Any, cut: Cut | None) -> Refusal | None:  # noqa: ANN401 - an AppendRowsResponse, which has no type
    """Return why an answer without an error is no confirmation; None if it is one."""
    if not answer.HasField("append_result"):
        return Refusal(Meaning.FAULT, "UNKNOWN", "an answer without a result")
    result = answer.append_result
    if cut is None or not result.HasField("offset") or result.offset.value == cut.offset:
        return None
    return Refusal(
        Meaning.OFFSET,
        "OK",
        f"the rows of offset {cut.offset} were put to {result.offset.value}",
    )


def refusal_of_status(code: str, details: str, kind: str = "") -> Refusal:
    """Return what the status of a request, or of a whole call, asks for."""
    if kind.startswith("OFFSET_") or (not kind and code in {"ALREADY_EXISTS", "OUT_OF_RANGE"}):
        return Refusal(Meaning.OFFSET, code, details, kind=kind, expected=_expected(details))
    if kind in _STREAM_ERRORS or (not kind and code in _STREAM_CODES):
        return Refusal(Meaning.STREAM, code, details, kind=kind)
    if kind == "SCHEMA_MISMATCH_EXTRA_FIELDS" or blame_grpc(code) is Blame.ROWS:
        return Refusal(Meaning.SCHEMA, code, details, kind=kind)
    return Refusal(Meaning.FAULT, code, details)


def _expected(details: str) -> int:
    found = _EXPECTED_OFFSET.search(details)
    return int(found[1]) if found else -1
