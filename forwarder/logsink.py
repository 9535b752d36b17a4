"""The sink of APP_ENV=LOCAL: one structured line per event, no cloud client imported."""

import json
import logging
from collections.abc import Sequence

from forwarder.event import kpi_event
from forwarder.sink import Delivery
from lifecycle import unlimited
from spool import Reading

log = logging.getLogger("forwarder.event")


class LogSink:
    """Writes each reading to the log as the event that the service would get."""

    max_rows = 1_000
    max_bytes = 1024 * 1024

    def __init__(self, name: str, gather_s: float) -> None:
        self.name = name
        self.gather_s = gather_s
        # The events are this sink's product: LOG_LEVEL must not silence them.
        log.setLevel(logging.INFO)

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Log each row. A line that was written counts as delivered."""
        for row in rows:
            log.info("event", extra=unlimited(sink=self.name, seq=row[0], event=_event(row)))
        return Delivery()

    def close(self) -> None:
        """Nothing is held."""


def _event(row: Reading) -> object:
    return json.loads(kpi_event(row))
