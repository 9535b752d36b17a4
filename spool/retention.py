"""What may leave the spool, and when: the rule that no sink loses a row it still needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spool.progress import SinkProgress
from spool.writer import SpoolWriter

PRUNE_STEP_ROWS = 4_000
PRUNE_STEP_S = 0.01
"""Small steps: each is a transaction that a batch of new readings may have to wait for. One that
takes longer than this is halved, down to a sixteenth."""

PRUNE_STEP_HALVINGS = 4

WORTH_ROWS = 2_000
"""A step of pruning changes half a dozen pages besides those that it frees; so fewer rows wait for
more to come, or for a quiet moment: at 200 readings a second, 10 s."""

QUIET_S = 1.0
"""So long after the last reading, fewer leave as well."""

FEW_EACH_S = 5.0
"""And no sooner after the last few: one reading a second is not one step a second."""

ALONG_MAX_ROWS = 10_000
ALONG_PER_READING = 2
ALONG_PER_S = 5_000
"""How much is pruned while readings come: more than come, so that it keeps up and catches up."""

DROP_SHARE = 50
DROP_STEP_ROWS = 1_000
"""SPOOL_FULL_POLICY=drop-oldest drops one part in this many of the rows at a time, at most this."""


@dataclass(frozen=True)
class Retention:
    """``SPOOL_RETENTION_HOURS`` as a rule over one spool.

    Attributes:
        keep_us: How long delivered rows stay for audit and replay, in microseconds.
    """

    keep_us: int

    def slowest(self, writer: SpoolWriter, sinks: Sequence[SinkProgress]) -> int:
        """Return the seq up to which every enabled sink has everything.

        With no sink enabled nobody waits for a row, and only the retention counts.
        """
        positions = [p.position_in(writer.epoch) for p in sinks if p.enabled]
        return min(positions, default=writer.last_seq())

    def prune_step(  # noqa: PLR0913 - how much at most and at least
        self,
        writer: SpoolWriter,
        sinks: Sequence[SinkProgress],
        now_us: int,
        *,
        pressure: bool,
        max_rows: int | None = None,
        min_rows: int = 1,
    ) -> int:
        """Delete one step of what all sinks have and is old enough; return how many rows.

        Args:
            writer: The spool.
            sinks: All sinks, as just read from their files.
            now_us: The time, in microseconds since 1970.
            pressure: Space is short: delivered rows go whatever their age.
            max_rows: At most so many; PRUNE_STEP_ROWS where it is not given.
            min_rows: None at all, where fewer are old enough; without a meaning under pressure.
        """
        slowest = self.slowest(writer, sinks)
        first = writer.first_seq()
        if first > slowest:
            return 0
        through = min(slowest, first + (max_rows or PRUNE_STEP_ROWS) - 1)
        if pressure:
            return writer.delete_through(through, "pruned")
        cutoff_us = now_us - self.keep_us
        least = first + min_rows - 1
        if slowest < least or writer.received_us(least) >= cutoff_us:
            return 0
        return writer.delete_through(through, "pruned", older_than_us=cutoff_us)

    def prune_along(
        self, writer: SpoolWriter, sinks: Sequence[SinkProgress], now_us: int, max_rows: int
    ) -> bool:
        """Have the next batch prune up to ``max_rows``; return whether there are enough to go."""
        first = writer.first_seq()
        through = min(self.slowest(writer, sinks), first + max_rows - 1)
        least = first + WORTH_ROWS - 1
        cutoff_us = now_us - self.keep_us
        if through < least or writer.received_us(least) >= cutoff_us:
            return False
        writer.prune_along(through, cutoff_us)
        return True

    def drop_step(self, writer: SpoolWriter, sinks: Sequence[SinkProgress]) -> int:
        """Delete the oldest rows although a sink still needs them; return how many.

        Only SPOOL_FULL_POLICY=drop-oldest, the operator's explicit choice, leads here. Each
        forwarder finds the gap and counts it as its own loss.
        """
        first, last = writer.first_seq(), writer.last_seq()
        step = max(1, min(DROP_STEP_ROWS, (last - first + 1) // DROP_SHARE))
        delivered = max(first - 1, self.slowest(writer, sinks))
        return writer.delete_through(max(delivered, first + step - 1), "dropped")


class Pruner:
    """Prunes at a pace that the readings which come meanwhile hardly notice.

    While readings come, rows leave in the transaction of the next batch: the pages that they free
    take the new rows, which are then written once and not three times, and there is no sync of
    their own to wait for. Otherwise, and when space is short, they leave step by step.

    Args:
        retention: What may go.
        clock: Seconds, monotonic.
    """

    def __init__(self, retention: Retention, clock: Callable[[], float]) -> None:
        self._retention = retention
        self._clock = clock
        self._last_seq: int | None = None
        self._turned_at = clock()
        self._allowed_rows = 0
        self._halvings = 0
        self._came_at = float("-inf")
        self._few_at = float("-inf")
        self.busy = False
        """Whether readings have come since the turn before the last one."""
        self.along = False
        """Whether rows leave with the next batch."""

    def turn(
        self, writer: SpoolWriter, sinks: Sequence[SinkProgress], now_us: int, *, pressure: bool
    ) -> int:
        """Prune, or have the next batch do so; return how many rows have gone just now.

        Args:
            writer: The spool.
            sinks: All sinks, as just read from their files.
            now_us: The time, in microseconds since 1970.
            pressure: Space is short.
        """
        last_seq, now = writer.last_seq(), self._clock()
        came = last_seq - self._last_seq if self._last_seq is not None else 0
        passed_s = now - self._turned_at
        self._last_seq, self._turned_at = last_seq, now
        self.busy = came > 0
        if came:
            self._came_at = now
        # What was allowed before may be needed again by a sink whose file was lost since.
        writer.prune_along(0, 0)
        if pressure or not self.busy:
            self.along = False
            few = now - self._came_at >= QUIET_S and now - self._few_at >= FEW_EACH_S
            return self._step(
                writer,
                sinks,
                now_us,
                few=few,
                came=came,
                pressure=pressure,
            )
        self._allowed_rows += ALONG_PER_READING * came + int(ALONG_PER_S * passed_s)
        self._allowed_rows = min(self._allowed_rows, ALONG_MAX_ROWS)
        self.along = self._retention.prune_along(writer, sinks, now_us, self._allowed_rows)
        if self.along:
            self._allowed_rows = 0
        return 0

    def _step(  # noqa: PLR0913 - what a turn has found out
        self,
        writer: SpoolWriter,
        sinks: Sequence[SinkProgress],
        now_us: int,
        *,
        few: bool,
        came: int,
        pressure: bool,
    ) -> int:
        max_rows = max(PRUNE_STEP_ROWS >> self._halvings, ALONG_PER_READING * came)
        worth = min(WORTH_ROWS, max_rows)
        begun = self._clock()
        gone = self._retention.prune_step(
            writer,
            sinks,
            now_us,
            pressure=pressure,
            max_rows=max_rows,
            min_rows=1 if few else worth,
        )
        if 0 < gone < worth:
            self._few_at = begun
        took_s = self._clock() - begun
        if took_s > PRUNE_STEP_S:
            self._halvings = min(self._halvings + 1, PRUNE_STEP_HALVINGS)
        elif gone and took_s < PRUNE_STEP_S / 4:
            self._halvings = max(self._halvings - 1, 0)
        return gone
