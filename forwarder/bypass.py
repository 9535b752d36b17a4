"""Other sites go on while some are held: delivery ahead of the cursor, within a bound.

A service may refuse one ordering key and take all others. A sink that can tell names the sites
(:attr:`forwarder.sink.Delivery.faults`); then the drain loop hands over to this module until
nothing is held any more. The cursor stays before the first reading of a held site, and the other
sites are delivered behind it. Of the held ones only the numbers of their readings are kept; each
has a backoff of its own, and is read again from the spool when it is due. The sink's file notes
how far the others are (:mod:`spool.ahead`), so that a restart repeats none of that.

Nothing runs side by side: deliveries take turns, one of held sites, one of the others. Sites
therefore wait for each other for one delivery, which a sink bounds by its deadline.

In an outage every site is held. Then what is read on, one batch after each backoff, only serves to
find sites that are not; it is forgotten when the service takes readings again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from forwarder import heldlog
from forwarder.batch import Batch, Checked, check, corrupt, gap_reason
from forwarder.hands import Hands
from forwarder.held import HeldSite, HeldSites
from forwarder.sink import Delivery, Fault, FaultKind, Sink
from lifecycle import printable
from spool import (
    AheadStep,
    DeadLetter,
    Gap,
    Reading,
    Settlement,
    SinkState,
    SpoolReader,
    load_ahead,
)

AHEAD_MAX_ROWS = 1_000_000
"""So many readings may lie between the cursor and the last one that was delivered ahead of it.
Bounds the memory (8 bytes for each that waits), and what the spool keeps for one site."""

POLL_S = 0.018
"""How often to look for new readings where they are not announced."""

_NOTHING_TAKEN = Fault(FaultKind.TRANSIENT, "nothing was taken")


class Bypass:
    """Delivers ahead of held sites.

    Args:
        sink: Where to.
        state: The sink's own file.
        hands: What the drain loop does for it.
    """

    def __init__(self, sink: Sink, state: SinkState, hands: Hands) -> None:
        self._sink = sink
        self._state = state
        self._hands = hands
        self._epoch = ""
        self._held = HeldSites()
        self.cursor = 0
        """Everything up to here is settled."""
        self._through = 0
        """Everything up to here is settled, but for the readings of held sites."""
        self._noted_through = 0
        self._used_through = 0
        """Behind it nothing was delivered, nor is a dead letter."""
        self._dead_ahead: list[int] = []
        """The seq of dead letters behind the cursor, which are in the file and not counted."""
        self._gaps: list[Gap] = []
        """Of the batch that was handed over, behind the cursor: counted when it passes them."""
        self._held_next = True
        self._failures = 0
        """How often in a row the service took no reading of a site that was not held."""
        self._blocked_until_s = self._read_at_s = float("-inf")
        self._full = False
        self._first = True
        """Whether nothing was written yet of what is held."""

    @property
    def active(self) -> bool:
        """Whether sites are held: then call :meth:`turn`, and read nothing elsewhere."""
        return bool(self._held)

    def resume(self, reader: SpoolReader, cursor: int) -> None:
        """Take up what the sink's file has about this spool, at a start or for a new spool.

        Raises:
            CursorAheadError: What was delivered ahead is beyond the spool's last reading.
        """
        self._begin(reader.epoch, cursor)
        found = load_ahead(self._state, reader.epoch)
        self._held.loaded(found.held if found else {})
        if found is None:
            return
        reader.check_position(found.through)
        self._dead_ahead = found.dead
        self._first = False
        self._through = self._noted_through = self._used_through = found.through
        first_row = self._find_held(
            reader, {site: first for site, (first, _) in found.held.items()}
        )
        heldlog.log_resumed(self._sink.name, self._held, self._through)
        if first_row > cursor + 1:
            self._left_the_spool(reader, first_row - 1, [*range(cursor + 1, first_row)])
        else:
            self._settle([])

    def _find_held(self, reader: SpoolReader, firsts: dict[str, int]) -> int:
        """Find the readings that wait; return the seq of the first reading that is there."""
        after, first_row = self.cursor, 0
        while after < self._through:
            rows = reader.read_after(after, self._hands.batch_rows(), self._sink.max_bytes)
            self._hands.beat()
            if not rows:
                return first_row or self._through + 1
            first_row = first_row or rows[0][0]
            for row in rows:
                seq, site = row[0], row[4]
                if seq <= self._through and seq >= firsts.get(site, self._through + 1):
                    self._held.hold(site).seqs.append(seq)
            after = rows[-1][0]
        return first_row

    def begin(self, epoch: str, cursor: int, batch: Batch, delivery: Delivery) -> None:
        """Take over from the drain loop after a delivery in which sites failed.

        Args:
            epoch: Of the spool.
            cursor: Everything up to here is settled.
            batch: What was delivered.
            delivery: What became of it; ``retry`` and ``faults`` are not empty.
        """
        self._begin(epoch, cursor)
        self._through = self._used_through = batch.rows[-1][0]
        self._failures = int(cursor < batch.rows[0][0] and len(delivery.retry) == len(batch.rows))
        self._gaps = list(batch.gaps)
        self._hold_back(delivery, 0.0)
        self._report(delivery)
        self._settle(batch.dead)

    def _begin(self, epoch: str, cursor: int) -> None:
        self._epoch = epoch
        self.cursor = self._through = self._used_through = cursor
        self._noted_through = 0
        self._held.loaded({})
        self._dead_ahead = []
        self._gaps = []
        self._held_next = self._full = False
        self._first = True
        self._failures = 0
        self._blocked_until_s = self._read_at_s = float("-inf")

    def turn(self, reader: SpoolReader) -> float:
        """Deliver once, if there is something to deliver; return how long to wait, in seconds.

        New readings end the wait.
        """
        now = self._hands.clock()
        reader.changed()  # forgets the announcement: what comes from here on ends the wait
        steps = [self._deliver_others, self._deliver_held]
        for step in reversed(steps) if self._held_next else steps:
            if step(reader, now):
                self._held_next = step == self._deliver_others
                return 0.0
        wait_s = self._held.next_due_s() - now
        if self._blocked_until_s > now:
            wait_s = min(wait_s, self._blocked_until_s - now)
        elif self._read_at_s > now:
            wait_s = min(wait_s, self._read_at_s - now)
        elif not (reader.listening or self._full or self._failures):
            wait_s = min(wait_s, POLL_S)
        return max(0.0, wait_s)

    def _deliver_others(self, reader: SpoolReader, now: float) -> bool:
        """Read on, and deliver what is not of a held site; return whether there was anything."""
        if now < self._blocked_until_s or now < self._read_at_s or self._is_full():
            return False
        rows = self._read_on(reader)
        if not rows:
            return rows is None
        checked = check(rows)
        wanted: dict[int, str] = {}
        suspects = self._held.suspects()
        todo: list[Reading] = []
        if suspects and any(row[4] not in self._held for row in checked.good):
            # A row behind refused ones that is accepted shows that they are at fault themselves.
            refused = self._read_held(reader, suspects)
            if refused is None:
                return True
            held, wanted = refused
            todo += held.good
            checked.damaged += held.damaged
        for row in checked.good:
            if row[4] in self._held:
                self._held[row[4]].seqs.append(row[0])
            else:
                todo.append(row)
        self._through = rows[-1][0]
        # Rows that come close together go together.
        self._read_at_s = now + self._sink.gather_s
        delivery = self._deliver(todo, wanted)
        if len(delivery.retry) < len(todo):
            self._failures = 0
        elif todo or self._failures:
            self._failures += 1
            wait_s = self._hands.backoff_s(_NOTHING_TAKEN, self._failures)
            self._blocked_until_s = self._hands.clock() + wait_s
        if todo or checked.damaged:
            self._used_through = self._through
        self._settle([*delivery.dead, *map(corrupt, checked.damaged)])
        return True

    def _read_on(self, reader: SpoolReader) -> list[Reading] | None:
        """Return the next rows; None where some have left the spool, which is settled then."""
        room = AHEAD_MAX_ROWS - (self._through - self.cursor)
        rows = reader.read_after(
            self._through, min(self._hands.batch_rows(), room), self._sink.max_bytes
        )
        if rows and rows[0][0] == self._through + 1:
            self._hands.check_rows(reader, rows)
            return rows
        last = rows[0][0] - 1 if rows else reader.last_seq()
        if last > self._through:
            self._left_the_spool(reader, last, self._held.take_through(last))
            return None
        if last < self._through:
            reader.check_position(self._through)
        return []

    def _deliver_held(self, reader: SpoolReader, now: float) -> bool:
        """Try the held sites that are due; return whether there were any."""
        due = self._held.due(now)
        if not due:
            return False
        read = self._read_held(reader, due)
        if read is None:
            return True
        checked, wanted = read
        delivery = self._deliver(checked.good, wanted)
        if len(delivery.retry) < len(checked.good) or checked.damaged:
            self._used_through = max(self._used_through, *wanted)
        if self._failures and len(delivery.retry) + len(delivery.dead) < len(checked.good):
            # The outage is over: what was only looked at is read again, in the usual way.
            self._failures = 0
            self._blocked_until_s = float("-inf")
            self._through = self._used_through
            self._held.forget_after(self._through)
        self._settle([*delivery.dead, *map(corrupt, checked.damaged)])
        return True

    def _read_held(
        self, reader: SpoolReader, sites: Mapping[str, HeldSite]
    ) -> tuple[Checked, dict[int, str]] | None:
        """Read the first readings that wait of ``sites``, and return whose they are, by seq.

        None where readings have left the spool, which is settled then.
        """
        first = min(held.first for held in sites.values())
        rows = reader.read_after(first - 1, self._hands.batch_rows(), self._sink.max_bytes)
        if not rows or rows[0][0] != first:
            last = rows[0][0] - 1 if rows else reader.last_seq()
            self._left_the_spool(reader, last, self._held.take_through(last))
            return None
        self._hands.check_rows(reader, rows)  # of before a restart, under another APP_ENV
        last = rows[-1][0]
        wanted = {seq: site for site, held in sites.items() for seq in held.through(last)}
        return check([row for row in rows if row[0] in wanted]), wanted

    def _deliver(self, todo: list[Reading], wanted: dict[int, str] | None = None) -> Delivery:
        """Deliver ``todo``; hold what failed, and take ``wanted`` from what waits."""
        begun = self._hands.clock()
        delivery = self._sink.deliver(todo) if todo else Delivery()
        self._hands.beat()
        took_s = self._hands.clock() - begun
        delivery.dead = [replace(d, detail=printable(d.detail)) for d in delivery.dead]
        self._hands.log_dead(delivery.dead)
        self._hold_back(delivery, took_s, wanted or {})
        self._report(delivery)
        if todo:
            self._hands.pause(len(todo) - len(delivery.retry), begun)
        return delivery

    def _hold_back(
        self, delivery: Delivery, took_s: float, wanted: dict[int, str] | None = None
    ) -> None:
        """Hold the sites of what is to be tried again.

        Args:
            delivery: What became of the rows.
            took_s: How long that took.
            wanted: By seq, the site of each reading that was taken from those that wait.
        """
        wanted = wanted or {}
        again: dict[str, list[int]] = {}
        for row in delivery.retry:
            again.setdefault(wanted.get(row[0], row[4]), []).append(row[0])
        tried: dict[str, int] = {}
        for site in wanted.values():
            tried[site] = tried.get(site, 0) + 1
        now = self._hands.clock()
        for site in {**tried, **again}:
            held = self._held.hold(site)
            back = again.get(site, [])
            count = tried.get(site, 0)
            held.spend(count, back)
            held.due_s, held.wait_s = now, 0.0
            # Where no site is named, all have the same fault.
            fault = delivery.faults.get(site) or (None if delivery.faults else delivery.fault)
            if fault is not None and back:
                held.failures = held.failures + 1 if len(back) >= count else 1
                held.fault = fault
                # Where a try takes a deadline, the others have as much time between two.
                held.wait_s = max(self._hands.backoff_s(fault, held.failures), took_s)
                held.due_s = now + held.wait_s
            elif not back:
                held.failures = 0
        self._held.release_those_without_readings()

    def _left_the_spool(self, reader: SpoolReader, last: int, waiting: list[int]) -> None:
        """Settle readings that are no longer in the spool.

        Args:
            reader: Of the spool.
            last: Up to here everything has left.
            waiting: Those of them that were still to be delivered, up to what was delivered ahead.
        """
        dead = set(self._dead_ahead)
        gone = [seq for seq in waiting if seq not in dead]
        gone += range(self._through + 1, last + 1)
        self._through = max(self._through, last)
        self._used_through = max(self._used_through, last)
        reason = gap_reason(last, reader.dropped_through())
        gaps = [Gap(first, end, reason) for first, end in _runs(gone)]
        heldlog.log_gone(self._sink.name, gone, reason)
        self._settle([], gaps)

    def _settle(self, dead: Iterable[DeadLetter], gaps: Sequence[Gap] = ()) -> None:
        """Write down what has changed: the cursor, and what is settled behind it."""
        cursor = self._held.oldest()[1].first - 1 if self._held else self._through
        dead = list(dead)
        gaps = [*gaps, *(gap for gap in self._gaps if gap.last_seq <= cursor)]
        self._gaps = [gap for gap in self._gaps if gap.last_seq > cursor]
        settlement = Settlement(
            self._epoch, cursor, dead=[d for d in dead if d.row[0] <= cursor], gaps=gaps
        )
        step = AheadStep(dead=[d for d in dead if d.row[0] > cursor], first=self._first)
        step.held, step.released = self._held.changes()
        step.through = self._through if self._held else 0
        passed = [seq for seq in self._dead_ahead if seq <= cursor]
        settlement.dead_ahead = len(passed)
        settlement.delivered = (
            cursor
            - self.cursor
            - len(settlement.dead)
            - len(passed)
            - sum(gap.rows for gap in gaps)
        )
        moved = (cursor, step.through) != (self.cursor, self._noted_through)
        if moved or dead or step.held or step.released:
            self._hands.settle(settlement, step)
            self._first = False
        self._held.noted(step.held, step.released)
        self.cursor, self._noted_through = cursor, step.through
        self._dead_ahead = sorted(
            [*self._dead_ahead[len(passed) :], *(d.row[0] for d in step.dead)]
        )
        self._tell_status()

    def _is_full(self) -> bool:
        """Return whether nothing may be read ahead any more; say so once."""
        full = self._through - self.cursor >= AHEAD_MAX_ROWS
        if full and not self._full:
            heldlog.log_full(self._sink.name, self._held, AHEAD_MAX_ROWS)
        if full != self._full:
            self._full = full
            self._tell_status()
        return full

    def _tell_status(self) -> None:
        limit_rows = AHEAD_MAX_ROWS if self._full else 0
        self._hands.set_status(*heldlog.status(self._held, limit_rows))

    def _report(self, delivery: Delivery) -> None:
        heldlog.log_failure(self._sink.name, delivery, self._held, self.cursor)


def _runs(seqs: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and the last number of each run of numbers without a hole."""
    runs: list[tuple[int, int]] = []
    for seq in seqs:
        if runs and runs[-1][1] + 1 == seq:
            runs[-1] = (runs[-1][0], seq)
        else:
            runs.append((seq, seq))
    return runs
