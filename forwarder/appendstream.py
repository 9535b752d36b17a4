"""The write stream that this process appends to: how it begins, what is journalled, how it ends.

**An offset of a stream is assigned to one row and to no other.** That is what the journal's word
rests on, also in a restored copy of it and in a clone of this machine:

* a process appends to no stream that an earlier one made, because since then other rows may have
  been put to the offsets behind its journal's end;
* where a row is refused, the rows behind it do not move up: they go to a new stream.

A stream that is left is finalized, and its length tells which appends have arrived
(:mod:`forwarder.settlement`).
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

from forwarder.appendcalls import AppendCalls
from forwarder.appends import Append, cut_rows, repeat_cuts
from forwarder.faults import FaultError
from forwarder.settlement import Verdict, judge, same_table
from forwarder.sink import FaultKind
from lifecycle import fields
from spool import AppendJournal, Cut, Journal, Reading

log = logging.getLogger("forwarder.bigquery")

_NEVER_SENT = -1


class AppendStream:
    """One stream after the other, and the journal of what is appended to it.

    Args:
        calls: To the service.
        journal: In the sink's file.

    Attributes:
        left: Whether the journal's stream is given up, and all that it tells is known.
    """

    def __init__(self, calls: AppendCalls, journal: AppendJournal) -> None:
        self._calls = calls
        self._file = journal
        self._epoch = ""
        self._known: Journal | None = None
        self._own = ""
        """The stream that this process made."""
        self.left = False
        self._ask = False
        """Whether the stream that is left was not finalized, because nothing was on its way."""
        self._sent_through = _NEVER_SENT
        self._possibly_repeated = 0
        self._left_out_next: dict[int, tuple[str, str]] = {}
        """By seq: reason and detail of rows that are not sent, until the journal has them."""

    @property
    def name(self) -> str:
        """The stream's name; empty if there is none."""
        return self.journal.stream

    @property
    def journal(self) -> Journal:
        """What is journalled; read from the file where it is not known."""
        return self._known or self._load()

    @property
    def is_earlier(self) -> bool:
        """Whether another process made the stream, or there is none yet."""
        return not self.left and (not self.name or self.name != self._own)

    def resume(self, epoch: str) -> int:
        """Read the journal for the spool of ``epoch``; return the seq through which it reaches."""
        self._epoch = epoch
        self._left_out_next = {}
        self._load()
        return self.reaches

    @property
    def reaches(self) -> int:
        """The seq through which the journal's appends reach; 0 if there are none."""
        cuts = self.journal.cuts
        return cuts[-1].last_seq if cuts else 0

    def forget(self) -> None:
        """Read the journal again before the next use: whether it was written is not known."""
        self._known = None

    def _load(self) -> Journal:
        journal = self._known = self._file.load(self._epoch)
        # It is not known which of them the last process had sent.
        self._sent_through = journal.cuts[-1].offset if journal.cuts else _NEVER_SENT
        self.left = self._ask = False
        self._possibly_repeated = 0
        if journal.cuts and journal.epoch != self._epoch:
            log.warning(
                "the spool is another one than the append journal's: a new stream is begun",
                extra=fields(stream=journal.stream),
            )
            self._possibly_repeated = sum(cut.rows for cut in journal.cuts)
            # The same numbers are other readings here.
            journal.cuts.clear()
            self.left = True
        return journal

    def plan(self, rows: Sequence[Reading]) -> list[Append]:
        """Return the journal's appends again, and behind them new ones, which are journalled.

        Raises:
            UnrepeatableError: The rows are not those of which the journal's appends were made.
        """
        journal = self.journal
        appends, behind = repeat_cuts(rows, journal.cuts)
        fresh = cut_rows(behind, journal.next_offset)
        if fresh:
            self._file.add(self._epoch, [append.cut for append in fresh], self._left_out_next)
            self._left_out_next = {}
            journal.cuts += [append.cut for append in fresh]
            journal.next_offset = fresh[-1].cut.end
        return appends + fresh

    def keep(self, cuts: Iterable[Cut]) -> None:
        """Let these be what is not confirmed."""
        self.journal.cuts = list(cuts)

    def leave_out(self, reasons: Mapping[int, tuple[str, str]]) -> None:
        """Note refused rows durably.

        Args:
            reasons: By seq: reason and detail.
        """
        self._file.leave_out(self._epoch, reasons)
        self.journal.left_out |= reasons

    def leave_out_with_next(self, first_seq: int, reasons: Mapping[int, tuple[str, str]]) -> None:
        """Have rows that are not sent noted together with the appends that are planned next.

        They lie between those appends' rows, which can be repeated only without them; and
        tomorrow's date might not tell that they are to be left out.

        Args:
            first_seq: Of the first row that is not settled: what lies before it is forgotten.
            reasons: By seq: reason and detail.
        """
        kept = {seq: why for seq, why in self._left_out_next.items() if seq > first_seq}
        self._left_out_next = {**kept, **reasons}

    def leave_dead_table(self) -> None:
        """Give up the stream of a table that was dropped: what it has is gone with it.

        If it is the new table's already, what is on its way can be there twice.
        """
        journal = self.journal
        if self.left or not journal.stream:
            return
        log.warning("the stream of a dead table is given up", extra=fields(stream=journal.stream))
        sent = [cut.rows for cut in journal.cuts if cut.offset <= self._sent_through]
        self._possibly_repeated = sum(sent)
        journal.cuts.clear()
        self.left, self._ask = True, False

    def may_have_been_sent(self, cut: Cut) -> bool:
        """Return whether an append may have arrived before: only then can its rows be there."""
        return cut.offset <= self._sent_through

    def answers_lost(self, appends: Iterable[Append]) -> None:
        """Note that it is not known what became of these: they may be there already."""
        offsets = [append.cut.offset for append in appends]
        self._sent_through = max([self._sent_through, *offsets])

    def leave_earlier(self, rows: Sequence[Reading]) -> int:
        """Give up the stream of an earlier process, if there is one.

        Args:
            rows: Those that are to be appended.

        Returns:
            The seq through which they are in the table; 0 for none of them.

        Raises:
            FaultError: The service cannot be asked now.
        """
        journal = self.journal
        if not journal.cuts:
            # Nothing was on its way, so delivery does not depend on what it tells.
            self.left, self._ask = True, bool(journal.stream)
            return 0
        try:
            return self.finalize(rows, "an earlier run of this forwarder made it")
        except FaultError as error:
            elsewhere = not same_table(journal.stream, self._calls.table)
            if error.fault.kind is not FaultKind.HOLD or error.fault.of_access or not elsewhere:
                raise
            # We need no rights there any more: what was on its way goes to the new table.
            log.warning("the other table's stream cannot be asked: %s", error.fault)
            self._possibly_repeated = sum(cut.rows for cut in journal.cuts)
            self.left = True
            return 0

    def finalize(self, rows: Sequence[Reading], why: str) -> int:
        """End the stream and learn what it has.

        Args:
            rows: Those that are to be appended.
            why: For the log.

        Returns:
            The seq through which they are in the table; 0 for none of them.

        Raises:
            FaultError: The service cannot be asked now.
        """
        journal = self.journal
        there: int | None = 0
        if journal.stream:
            log.warning("a write stream is given up: %s", why, extra=fields(stream=journal.stream))
            there = self._calls.finalize_stream(journal.stream)
        self.left = True
        verdict = self._judge(journal, rows, there)
        self._possibly_repeated = verdict.unknown_rows
        journal.cuts = journal.cuts[len(verdict.confirmed) :]
        return verdict.confirmed[-1].last_seq if verdict.confirmed else 0

    def begin(self) -> None:
        """Make a stream, and note it, in the place of one that is left or never was.

        Raises:
            FaultError: It cannot be made now.
        """
        journal = self.journal
        name = self._calls.create_stream()
        if self._ask:
            self._possibly_repeated = self._unknown_rows(journal)
        self._file.begin_stream(name, self._possibly_repeated)
        log.info("a new write stream", extra=fields(stream=name))
        if self._possibly_repeated:
            log.error(
                "rows are sent to a new stream of which it is not known whether the old one has "
                "them: they may be in the table twice",
                extra=fields(rows=self._possibly_repeated, previous_stream=journal.stream),
            )
        self._own = journal.stream = name
        journal.next_offset = 0
        journal.cuts.clear()
        self._sent_through = _NEVER_SENT
        self.left = self._ask = False
        self._possibly_repeated = 0

    def _unknown_rows(self, journal: Journal) -> int:
        """Return how many rows an earlier process's stream has that the journal does not know.

        They tell a restored copy, or a clone.
        """
        if not same_table(journal.stream, self._calls.table):
            return 0
        try:
            there = self._calls.finalize_stream(journal.stream)
        except FaultError as error:
            log.warning("the earlier write stream cannot be asked: %s", error.fault)
            return 0
        if there is None or there <= journal.next_offset:
            return 0  # fewer: what another write method has delivered since
        return self._judge(journal, (), there).unknown_rows

    def _judge(self, journal: Journal, rows: Sequence[Reading], there: int | None) -> Verdict:
        verdict = judge(journal, rows, there, sent_through=self._sent_through)
        if not verdict.explained:
            log.error(
                "the stream has another number of rows than this journal explains: the files are "
                "an older copy, or a clone of this machine appends as well",
                extra=fields(stream=journal.stream, rows=there, journal_end=journal.next_offset),
            )
        return verdict
