"""A batch of rows on its way, and what is known of it so far."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from spool import DeadLetter, Gap, Reading, Settlement, intact, presentable

_seq_of = itemgetter(0)


@dataclass
class Checked:
    """Rows read together, by whether their checksums are right.

    Attributes:
        rows: All, in the order of seq.
        good: Those to be delivered.
        damaged: The others.
        shortened: Whether rows that were read as well are left to the next batch.
    """

    rows: list[Reading]
    good: list[Reading]
    damaged: list[Reading]
    shortened: bool = False

    def shorten(self, good: list[Reading]) -> None:
        """Leave what is behind ``good``, the first ones of those to be delivered, to the next."""
        if len(good) < len(self.good):
            end = self.good[len(good)][0]
            self.rows = self.rows[: bisect_left(self.rows, end, key=_seq_of)]
            self.damaged = [row for row in self.damaged if row[0] < end]
            self.shortened = True
        self.good = good


def check(rows: list[Reading]) -> Checked:
    """Tell the rows that are intact from the others."""
    good: list[Reading] = []
    damaged: list[Reading] = []
    for row in rows:
        (good if intact(row) else damaged).append(row)
    return Checked(rows, good, damaged)


@dataclass
class Batch:
    """Rows read together, and what is known of them so far.

    Attributes:
        rows: In the order of seq.
        gaps: The numbers that are missing before and between them.
        settled_seq: Up to here all is settled; at first the position after which they were read.
        dead: Those that no service takes, not settled yet.
    """

    rows: Sequence[Reading]
    gaps: list[Gap]
    settled_seq: int
    dead: list[DeadLetter] = field(default_factory=list)

    def add(self, rows: Sequence[Reading], gaps: Sequence[Gap], dead: Sequence[DeadLetter]) -> None:
        """Take in more rows behind those that are there, and let go of what is settled."""
        self.rows = [*self.unsettled(), *rows]
        self.gaps += gaps
        self.dead += dead

    def unsettled(self) -> Sequence[Reading]:
        """Return the rows of which something is still to be settled."""
        return self.rows[self._rows_through(self.settled_seq) :]

    def settle_before(self, seq: int, epoch: str) -> Settlement:
        """Return what is decided up to, and without, ``seq``; each row is counted once."""
        done = seq - 1
        dead = [d for d in self.dead if d.row[0] <= done]
        gaps = [g for g in self.gaps if g.last_seq <= done]
        passed = self._rows_through(done) - self._rows_through(self.settled_seq)
        self.dead = [d for d in self.dead if d.row[0] > done]
        self.gaps = [g for g in self.gaps if g.last_seq > done]
        self.settled_seq = done
        return Settlement(epoch, done, passed - len(dead), dead, gaps)

    def _rows_through(self, seq: int) -> int:
        return bisect_right(self.rows, seq, key=_seq_of)


def corrupt(row: Reading) -> DeadLetter:
    """Return the dead letter of a row whose content is not what was spooled."""
    detail = "the row's checksum is wrong: its bits changed"
    return DeadLetter(presentable(row), "corrupt_row", detail)


def find_gaps(after_seq: int, rows: Sequence[Reading], dropped_through: int) -> list[Gap]:
    """Return the numbers that are missing between ``after_seq`` and the last row.

    Args:
        after_seq: The position after which ``rows`` were read.
        rows: At least one.
        dropped_through: Up to here a missing number is one that the spool itself dropped.
    """
    if rows[-1][0] - after_seq == len(rows):
        return []
    gaps = []
    expected = after_seq + 1
    for row in rows:
        if row[0] != expected:
            gaps.append(Gap(expected, row[0] - 1, gap_reason(row[0] - 1, dropped_through)))
        expected = row[0] + 1
    return gaps


def gap_reason(last_seq: int, dropped_through: int) -> str:
    """Return why readings up to ``last_seq`` are missing.

    Args:
        last_seq: Of the last one that is missing.
        dropped_through: As in :func:`find_gaps`.
    """
    if last_seq <= dropped_through:
        return "dropped by SPOOL_FULL_POLICY=drop-oldest"
    return "left the spool before this sink saw them (disabled, or its file was lost?)"
