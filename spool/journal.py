"""The append journal: what is about to be appended to a write stream, before it is sent.

It stands in the sink's own file and shares its connection, so that a cut disappears in the same
transaction in which the cursor passes it (:meth:`spool.sinkstate.SinkState.settle`).
"""

import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spool.sinkstate import SinkState

POSSIBLY_REPEATED = "possibly_repeated"
"""The counter of rows that a service may have twice, and nobody can tell."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of one append: those from ``first_seq`` to ``last_seq`` that are not left out."""

    offset: int
    """Of its first row in the stream."""
    first_seq: int
    last_seq: int
    rows: int

    @property
    def end(self) -> int:
        """The offset behind its last row."""
        return self.offset + self.rows


@dataclass(slots=True)
class Journal:
    """What the journal holds."""

    stream: str = ""
    """The stream's name; empty if there is none."""
    next_offset: int = 0
    """Behind the last cut that was ever made for this stream: it never goes back, because an
    offset is assigned to one row and to no other."""
    epoch: str = ""
    """Of the spool that the cuts are of; empty if there are none."""
    cuts: list[Cut] = field(default_factory=list)
    """In the order of offset and seq."""
    left_out: dict[int, tuple[str, str]] = field(default_factory=dict)
    """By seq: reason and detail of a refused row."""


class AppendJournal:
    """Writes and reads the journal in a sink's file.

    All methods raise StorageFaultError (DiskFullError) where the file cannot be written: then
    nothing may be sent, and :meth:`load` tells what is there.

    Args:
        state: The sink's file, opened by its owner.
    """

    def __init__(self, state: "SinkState") -> None:
        self._state = state

    def load(self, epoch: str) -> Journal:
        """Return what is journalled, as the last process left it.

        Args:
            epoch: Of the spool whose rows were left out.
        """
        journal = Journal()
        with self._state.transaction("read the append journal") as conn:
            row = conn.execute("SELECT name, next_offset FROM append_stream").fetchone()
            if row:
                journal.stream, journal.next_offset = str(row[0]), int(row[1])
            for found, *cut in conn.execute(
                "SELECT epoch, start_offset, first_seq, last_seq, row_count FROM append_cut "
                "ORDER BY start_offset"
            ):
                journal.epoch = found
                journal.cuts.append(Cut(*cut))
            for seq, reason, detail in conn.execute(
                "SELECT seq, reason, detail FROM append_left_out WHERE epoch = ?", (epoch,)
            ):
                journal.left_out[seq] = (reason, detail)
        return journal

    def begin_stream(self, name: str, possibly_repeated: int = 0) -> None:
        """Note a new stream, without cuts; what was journalled for the old one is decided.

        Args:
            name: As the service gave it.
            possibly_repeated: Rows of the old stream of which nobody can tell whether the
                service has them; counted.
        """
        with self._state.transaction("begin a stream in the append journal") as conn:
            conn.execute("DELETE FROM append_cut")
            conn.execute(
                "INSERT INTO append_stream (id, name, next_offset, begun_us) VALUES (1, ?, 0, ?) "
                "ON CONFLICT (id) DO UPDATE SET name=excluded.name, next_offset=0, "
                "begun_us=excluded.begun_us",
                (name, time.time_ns() // 1000),
            )
            if possibly_repeated:
                conn.execute(
                    "INSERT INTO counter (name, value) VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                    (POSSIBLY_REPEATED, possibly_repeated),
                )

    def add(
        self,
        epoch: str,
        cuts: Iterable[Cut],
        left_out: Mapping[int, tuple[str, str]] | None = None,
    ) -> None:
        """Note cuts that follow those that are there; durable when this returns.

        Args:
            epoch: Of the spool.
            cuts: In the order of offset and seq.
            left_out: By seq: reason and detail of rows among them that are not sent.
        """
        with self._state.transaction("write the append journal") as conn:
            if left_out:
                _leave_out(conn, epoch, left_out)
            _insert(conn, epoch, cuts)

    def leave_out(self, epoch: str, left_out: Mapping[int, tuple[str, str]]) -> None:
        """Note rows that the service refuses, before the others are cut again without them.

        Args:
            epoch: Of the spool.
            left_out: By seq: reason and detail.
        """
        with self._state.transaction("note refused rows in the append journal") as conn:
            _leave_out(conn, epoch, left_out)


def _leave_out(
    conn: sqlite3.Connection, epoch: str, left_out: Mapping[int, tuple[str, str]]
) -> None:
    conn.executemany(
        "INSERT INTO append_left_out (epoch, seq, reason, detail) VALUES (?,?,?,?) "
        "ON CONFLICT (epoch, seq) DO NOTHING",
        [(epoch, seq, reason, detail) for seq, (reason, detail) in left_out.items()],
    )


def _insert(conn: sqlite3.Connection, epoch: str, cuts: Iterable[Cut]) -> None:
    end = None
    for cut in cuts:
        conn.execute(
            "INSERT INTO append_cut (start_offset, epoch, first_seq, last_seq, row_count) "
            "VALUES (?,?,?,?,?)",
            (cut.offset, epoch, cut.first_seq, cut.last_seq, cut.rows),
        )
        end = cut.end
    if end is not None:
        conn.execute("UPDATE append_stream SET next_offset = ?", (end,))
