"""What a write stream's length tells about the appends that were journalled. Does no I/O.

An offset of a stream is assigned to one row and to no other, by the run of the forwarder that made
the stream; each assignment is in the journal before it is used. So a stream that is longer than
the end of an append has the rows of that append, also where the journal is an older copy, or where
a clone of this machine has sent them. A length that the journal cannot explain (beyond what was
ever assigned, or within an append, which a service takes whole or not at all) proves rows that it
does not know of: then nothing is believed, and rows may repeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from spool import Cut, Journal, Reading


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of the appends of a stream that was given up."""

    confirmed: list[Cut]
    """Those at the front whose rows are in the table."""
    unknown_rows: int
    """So many rows of the stream, or so many of ours, may be those that will be sent again."""
    explained: bool
    """Whether the stream's length is one that the journal knows."""


def judge(
    journal: Journal, rows: Sequence[Reading], there: int | None, *, sent_through: int
) -> Verdict:
    """Return what the length of ``journal``'s stream tells.

    Args:
        journal: Its cuts are those that are not settled.
        rows: Those that were handed in, and are not settled.
        there: How many rows the stream has; None if the service does not know it any more.
        sent_through: The highest offset of an append that may have been sent.
    """
    cuts = journal.cuts
    if there is None:
        lost = sum(cut.rows for cut in cuts if cut.offset <= sent_through)
        return Verdict([], lost, explained=True)
    confirmed: list[Cut] = []
    if _plausible(journal, there):
        for cut in cuts:
            if cut.end > there or cut.offset > sent_through or _more(rows, cut):
                break
            confirmed.append(cut)
    left = cuts[len(confirmed) :]
    expected = left[0].offset if left else journal.next_offset
    return Verdict(confirmed, max(0, there - expected), explained=there == expected)


def _plausible(journal: Journal, there: int) -> bool:
    """Return whether the stream ends where an append of ours ends, or before all of them."""
    cuts = journal.cuts
    if there > journal.next_offset:
        return False
    return not cuts or there <= cuts[0].offset or any(cut.end == there for cut in cuts)


def _more(rows: Sequence[Reading], cut: Cut) -> bool:
    """Return whether there are more rows than when the cut was made.

    One failed its checksum then, and reads well now: it is not known which are there.
    """
    return sum(1 for row in rows if cut.first_seq <= row[0] <= cut.last_seq) > cut.rows


def same_table(stream: str, table: str) -> bool:
    """Return whether a stream is of a table; a service may name the project by its number.

    Args:
        stream: ``projects/P/datasets/D/tables/T/streams/S``.
        table: ``projects/P/datasets/D/tables/T``.
    """
    project, there = _split(stream.rpartition("/streams/")[0])
    own_project, own = _split(table)
    by_number = project.isdecimal() or own_project.isdecimal()
    return there == own and (project == own_project or by_number)


def _split(table: str) -> tuple[str, str]:
    project, _, rest = table.removeprefix("projects/").partition("/")
    return project, rest
