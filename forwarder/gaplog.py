"""What is told of readings that left the spool before a sink had them."""

import logging
from collections.abc import Iterable

from lifecycle import RateLimitedLog
from spool import Gap


def log_gaps(notices: RateLimitedLog, sink: str, gaps: Iterable[Gap]) -> None:
    """Log the first gap at once, then once a minute how many readings were missing since.

    With SPOOL_FULL_POLICY=drop-oldest each batch can begin with one; the table ``gap`` has them.
    """
    for gap in gaps:
        notices.log(
            logging.ERROR,
            "readings are missing",
            f"readings are missing and will not be delivered: {gap.reason}",
            count=gap.rows,
            sink=sink,
            first_seq=gap.first_seq,
            last_seq=gap.last_seq,
            rows=gap.rows,
        )
