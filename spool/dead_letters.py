"""The dead letters of a sink: kept with a copy of the row, inside a budget of their own.

They stand in the sink's own file and share its connection, so that a dead letter, the usage that
counts it and the cursor that passes its row are one transaction. ``SPOOL_MAX_BYTES`` does not
count them: they are kept until a person has looked at them, and a spool that had to make room for
them would stop the reception for one bad sensor.

The budget, ``DEAD_LETTER_MAX_BYTES``, is looked at before a batch is delivered, not within one:
what was begun is finished, and its dead letters are all kept, so the budget is exceeded by those
of one batch at most. A sink that stopped amid a batch would hold rows that its service already
has behind a cursor that cannot pass them; after a hold of days a write stream is forgotten, and
nobody could tell any more whether those rows were appended.
"""

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spool.records import READING_COLUMNS, Reading

if TYPE_CHECKING:
    from spool.sinkstate import SinkState

DEAD_LETTER_MAX_BYTES = 256 * 1024 * 1024
"""One dead letter a second, of 430 bytes with its share of the index, is 37 MB a day: a week of
them, on a VM whose disk has 20 GB and whose spool may take 10 of these."""

WARN_AT = 0.80
"""From this share of DEAD_LETTER_MAX_BYTES the operator is warned."""

DETAIL_MAX_CHARS = 4_096
"""Of the service's own words; an answer of BigQuery's may be megabytes, once for each row."""

DISCARD_STEP_ROWS = 1_000
"""In one transaction: a large discard must neither hold up delivery nor make the log grow."""

DISCARDED = "dead_letters_discarded"
"""The counter of dead letters that were deleted at an operator's wish."""

_INSERT = (
    f"INSERT INTO dead_letter (died_us, reason, detail, epoch, seq, {READING_COLUMNS}) "  # noqa: S608 - our own constant
    "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (epoch, seq) DO NOTHING"
)
_DISCARD = (
    "DELETE FROM dead_letter WHERE id IN "
    "(SELECT id FROM dead_letter WHERE id <= ? ORDER BY id LIMIT ?)"
)
_ADD_DISCARDED = (
    "INSERT INTO counter (name, value) VALUES (?, ?) "
    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row that its service refuses for its own sake."""

    row: Reading
    reason: str
    """A code: lower case, underscores."""
    detail: str
    """The service's own words."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the dead letters take of their budget."""

    kept: int
    kept_bytes: int
    max_bytes: int

    @property
    def full(self) -> bool:
        """Whether no further batch may begin, for it might need room."""
        return self.kept_bytes >= self.max_bytes

    @property
    def nearly_full(self) -> bool:
        """Whether the operator is to be warned."""
        return self.kept_bytes >= WARN_AT * self.max_bytes


class DeadLetters:
    """Keeps and counts the dead letters in a sink's file. Belongs to its only writer.

    Args:
        state: The sink's file.
        max_bytes: DEAD_LETTER_MAX_BYTES.
    """

    def __init__(self, state: "SinkState", max_bytes: int) -> None:
        self._state = state
        self._max_bytes = max_bytes
        self._usage: Usage | None = None

    def add(
        self, conn: sqlite3.Connection, epoch: str, letters: Iterable[DeadLetter], now_us: int
    ) -> int:
        """Keep ``letters`` within a transaction of the file; return how many are new.

        A crash between two writes must not make two dead letters of one reading, so one that is
        there already stays as it is.
        """
        self._usage = None  # also where the commit fails, or is unknown
        new = 0
        for letter in letters:
            seq, *columns = letter.row
            detail = letter.detail
            if len(detail) > DETAIL_MAX_CHARS:
                detail = f"{detail[: DETAIL_MAX_CHARS - 3]}..."
            new += conn.execute(
                _INSERT, (now_us, letter.reason, detail, epoch, seq, *columns)
            ).rowcount
        return new

    def usage(self) -> Usage:
        """Return what they take; costs nothing while none is added or discarded.

        Raises:
            StorageFaultError: The file cannot be read.
        """
        if self._usage is None:
            with self._state.transaction("read the dead letters' usage") as conn:
                kept, kept_bytes = conn.execute(
                    "SELECT kept, kept_bytes FROM dead_letter_usage"
                ).fetchone()
            self._usage = Usage(kept, kept_bytes, self._max_bytes)
        return self._usage

    def note_limit(self) -> None:
        """Show the limit in the view ``dead_letter_budget``, if it is another than before.

        Raises:
            StorageFaultError: The file cannot be written.
        """
        with self._state.transaction("note DEAD_LETTER_MAX_BYTES") as conn:
            conn.execute(
                "UPDATE dead_letter_usage SET max_bytes = ?1 WHERE max_bytes <> ?1",
                (self._max_bytes,),
            )

    def discard(self, through_id: int) -> int:
        """Delete the dead letters up to ``through_id``, for good; return how many there were.

        Only for an operator's wish: what is deleted here exists nowhere else. It is counted as
        ``dead_letters_discarded``, in the transactions that delete. The space goes back to the
        file system.

        Args:
            through_id: The ``id`` of the last one, as the view ``dead_letters`` shows it. Later
                ones, which the operator has not seen, stay.

        Raises:
            StorageFaultError: The file cannot be written; what was deleted before is counted.
        """
        total = 0
        while True:
            self._usage = None
            with self._state.transaction("discard dead letters") as conn:
                gone = conn.execute(_DISCARD, (through_id, DISCARD_STEP_ROWS)).rowcount
                if gone:
                    conn.execute(_ADD_DISCARDED, (DISCARDED, gone))
            if not gone:
                break
            total += gone
        if total:
            self._state.return_space()
        return total
