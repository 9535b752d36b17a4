"""Which readings a partitioned table cannot take, known before they are sent. Does no I/O.

A sensor with a dead clock stamps its readings 1970. The service refuses such a row each time, so
the row itself is at fault: it becomes a dead letter, and is never sent.

Limits of a table that is partitioned by a column of time, relative to the service's date:

* ``tabledata.insertAll``: 5 years back, 1 year ahead (in its error message: 1,825 and 366 days);
  https://cloud.google.com/bigquery/docs/streaming-data-into-bigquery#time-unit_column_partitioning
* Storage Write API: 10 years back, 1 year ahead;
  https://cloud.google.com/bigquery/docs/write-api#time-unit_column_partitioning

Beyond a limit by less than a partition and a day, the service decides, as it does wherever this
module is not certain. A table that is not partitioned, or by the time of ingestion, or by a column
of whole numbers, or by a column that is not ours, takes any time (years 1 to 9999, which the
collector checks).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from forwarder.event import rfc3339
from lifecycle import fields
from spool import DeadLetter, Reading

log = logging.getLogger("forwarder.bigquery")

INSERT_ALL_PAST_DAYS = 1_825
WRITE_API_PAST_DAYS = 3_652
"""Ten years with two leap days; the margin covers the third."""
FUTURE_DAYS = 366

REASON = "partition_range"
CLOCKS_AGREE_S = 86_400.0
"""This machine's clock and the service's may differ so much; beyond it, one of them is wrong, and
nothing is certain."""

EXPIRED_TOLD_EACH_S = 600.0

_DAY_US = 86_400_000_000
_PARTITION_DAYS = {"HOUR": 1, "DAY": 1, "MONTH": 31, "YEAR": 366}
_TIMESTAMP_COLUMN = "timestamp"


@dataclass(frozen=True, slots=True)
class Partitioning:
    """How a table is partitioned, as far as it concerns a reading's own time.

    Attributes:
        by_timestamp: Whether it is by our column ``timestamp``.
        unit: HOUR, DAY, MONTH or YEAR.
        expiration_ms: How long after its time a partition is deleted; None for never.
    """

    by_timestamp: bool = False
    unit: str = "DAY"
    expiration_ms: int | None = None

    @property
    def days(self) -> int:
        """How long a partition is at the most; unknown units count as the longest."""
        return _PARTITION_DAYS.get(self.unit, _PARTITION_DAYS["YEAR"])


def partitioning_of(column: str | None, unit: str, expiration_ms: int | None) -> Partitioning:
    """Return what a table's ``timePartitioning`` means for readings.

    Args:
        column: Its field; None for the time of ingestion.
        unit: Its type.
        expiration_ms: How long its partitions are kept.
    """
    by_timestamp = (column or "").lower() == _TIMESTAMP_COLUMN
    return Partitioning(by_timestamp, unit.upper(), expiration_ms)


class TimeLimits:
    """Tells rows that a table can take from those that it cannot.

    Args:
        past_days: The limit of the way the rows are written.
        wall: This machine's clock, seconds since 1970.
        monotonic: Seconds, never set back.
    """

    def __init__(
        self,
        past_days: int,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._past_days = past_days
        self._wall = wall
        self._monotonic = monotonic
        self._partitioning = Partitioning()
        self._service: tuple[float, float] | None = None
        """The service's date, seconds since 1970, and when it was told, monotonic."""
        self._told_clock = False
        self._told_expired_at = float("-inf")

    def table_is(self, partitioning: Partitioning) -> None:
        """Take over how the table is partitioned now."""
        self._partitioning = partitioning

    def service_date_is(self, seconds: float) -> None:
        """Take over the service's date of this moment.

        Args:
            seconds: Since 1970.
        """
        self._service = (seconds, self._monotonic())

    def _now_us(self) -> int | None:
        """Return the service's time, microseconds since 1970; None where nothing is certain."""
        if self._service is None:
            return None
        date_s, told_at = self._service
        now_s = date_s + self._monotonic() - told_at
        difference_s = self._wall() - now_s
        if abs(difference_s) > CLOCKS_AGREE_S:
            if not self._told_clock:
                self._told_clock = True
                log.warning(
                    "this machine's clock differs from BigQuery's: readings are not checked "
                    "against the partition limits before they are sent; see timedatectl",
                    extra=fields(difference_s=round(difference_s)),
                )
            return None
        self._told_clock = False
        return int(now_s * 1e6)

    def split(
        self, rows: Sequence[Reading], after_seq: int = 0
    ) -> tuple[Sequence[Reading], list[DeadLetter]]:
        """Return the rows to be sent, and dead letters of those that the table cannot take.

        Args:
            rows: In the order of seq.
            after_seq: Up to here nothing is taken out.
        """
        partitioning = self._partitioning
        if not rows or not partitioning.by_timestamp:
            return rows, []
        now_us = self._now_us()
        if now_us is None:
            return rows, []
        times = [row[3] for row in rows]
        oldest_us = min(times)
        if partitioning.expiration_ms is not None:
            self._tell_expired(rows, oldest_us, now_us)
        margin = partitioning.days + 1
        first_us = now_us - (self._past_days + margin) * _DAY_US
        last_us = now_us + (FUTURE_DAYS + margin) * _DAY_US
        if first_us <= oldest_us and max(times) <= last_us:
            return rows, []
        good: list[Reading] = []
        dead: list[DeadLetter] = []
        for row in rows:
            if first_us <= row[3] <= last_us or row[0] <= after_seq:
                good.append(row)
            else:
                dead.append(DeadLetter(row, REASON, self._sentence(row, now_us)))
        return good, dead

    def _sentence(self, row: Reading, now_us: int) -> str:
        today = datetime.fromtimestamp(now_us / 1e6, UTC).date().isoformat()
        return (
            f"timestamp {rfc3339(row[3])} is outside what the table's partitions by timestamp "
            f"take: from {self._past_days} days before today ({today}) to {FUTURE_DAYS} days "
            "after; not sent. Look at the clock of this sensor"
        )

    def _tell_expired(self, rows: Sequence[Reading], oldest_us: int, now_us: int) -> None:
        """Tell of rows that the table takes, and deletes at once because their partition is over.

        They are delivered all the same: how long the table keeps its rows is its owner's choice,
        and the same happens to each row that is already there.
        """
        partitioning = self._partitioning
        kept_us = (partitioning.expiration_ms or 0) * 1_000 + partitioning.days * _DAY_US
        if oldest_us >= now_us - kept_us:
            return
        now = self._monotonic()
        if now - self._told_expired_at < EXPIRED_TOLD_EACH_S:
            return
        self._told_expired_at = now
        expired = [row[0] for row in rows if row[3] < now_us - kept_us]
        log.warning(
            "readings are older than the table's partition expiration: BigQuery takes them and "
            "deletes them at once; to keep them, raise it: ALTER TABLE … SET OPTIONS "
            "(partition_expiration_days = …)",
            extra=fields(
                rows=len(expired),
                first_seq=expired[0],
                last_seq=expired[-1],
                oldest=rfc3339(oldest_us),
                expiration_h=(partitioning.expiration_ms or 0) // 3_600_000,
            ),
        )
