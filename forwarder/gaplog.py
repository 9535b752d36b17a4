"""What is told of readings that left the spool before a sink had them."""

import logging
from collections.abc import Iterable

from lifecycle import fields
from spool import Gap

log = logging.getLogger("forwarder")


def log_gaps(sink: str, gaps: Iterable[Gap]) -> None:
    """Log one line for each gap."""
    for gap in gaps:
        log.error(
            "readings are missing and will not be delivered: %s",
            gap.reason,
            extra=fields(sink=sink, first_seq=gap.first_seq, last_seq=gap.last_seq, rows=gap.rows),
        )
