"""What may leave the spool, and when: the rule that no sink loses a row it still needs."""

from collections.abc import Sequence
from dataclasses import dataclass

from spool.progress import SinkProgress
from spool.writer import SpoolWriter

PRUNE_STEP_ROWS = 1_000
"""Small steps: each is a transaction that a batch of new readings may have to wait for."""

DROP_SHARE = 50
"""SPOOL_FULL_POLICY=drop-oldest drops one part in this many of the rows at a time."""


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

    def prune_step(
        self, writer: SpoolWriter, sinks: Sequence[SinkProgress], now_us: int, *, pressure: bool
    ) -> int:
        """Delete one step of what all sinks have and is old enough; return how many rows.

        Args:
            writer: The spool.
            sinks: All sinks, as just read from their files.
            now_us: The time, in microseconds since 1970.
            pressure: Space is short: delivered rows go whatever their age.
        """
        slowest = self.slowest(writer, sinks)
        first = writer.first_seq()
        if first > slowest:
            return 0
        through = min(slowest, first + PRUNE_STEP_ROWS - 1)
        if pressure:
            return writer.delete_through(through, "pruned")
        cutoff_us = now_us - self.keep_us
        if writer.received_us(first) >= cutoff_us:
            return 0
        return writer.delete_through(through, "pruned", older_than_us=cutoff_us)

    def drop_step(self, writer: SpoolWriter, sinks: Sequence[SinkProgress]) -> int:
        """Delete the oldest rows although a sink still needs them; return how many.

        Only SPOOL_FULL_POLICY=drop-oldest, the operator's explicit choice, leads here. Each
        forwarder finds the gap and counts it as its own loss.
        """
        first, last = writer.first_seq(), writer.last_seq()
        step = max(1, min(PRUNE_STEP_ROWS, (last - first + 1) // DROP_SHARE))
        delivered = max(first - 1, self.slowest(writer, sinks))
        return writer.delete_through(max(delivered, first + step - 1), "dropped")
