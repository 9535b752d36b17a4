"""What is told of held sites: log lines, and the sink's state."""

import logging
from collections.abc import Sequence

from forwarder.held import HeldSites
from forwarder.sink import Delivery, FaultKind
from lifecycle import fields

log = logging.getLogger("forwarder")


def status(held: HeldSites, limit_rows: int) -> tuple[str, str]:
    """Return state and detail for people.

    Args:
        held: All held sites.
        limit_rows: How many readings may be delivered ahead, where that is reached; otherwise 0.
    """
    if not held:
        return "delivering", ""
    site, oldest = held.oldest()
    hold = any(fault.kind is FaultKind.HOLD for fault in held.faults())
    others = " and others" if len(held) > 1 else ""  # how many would change too often
    why = str(oldest.fault) if oldest.fault else "not tried yet"
    limit = f"all sites wait, others are {limit_rows} readings ahead of it; " if limit_rows else ""
    return "on hold" if hold else "retrying", f"held: site {site}{others}: {limit}{why}"


def log_full(sink: str, held: HeldSites, limit_rows: int) -> None:
    """Log that the limit is reached, and by which site."""
    site, oldest = held.oldest()
    log.error(
        "all sites wait: the limit of readings delivered ahead of a held site is reached",
        extra=fields(
            sink=sink,
            site=site,
            first_seq=oldest.first,
            limit_rows=limit_rows,
            look="select * from held_sites",
        ),
    )


def log_resumed(sink: str, held: HeldSites, through_seq: int) -> None:
    """Log that sites are held since before the start."""
    log.warning(
        "sites are held from before the restart; others are ahead of them",
        extra=fields(sink=sink, sites=len(held), through_seq=through_seq),
    )


def log_gone(sink: str, gone: Sequence[int], reason: str) -> None:
    """Log readings that are no longer in the spool, if there are any, by their seq."""
    if gone:
        log.error(
            "readings are missing and will not be delivered: %s",
            reason,
            extra=fields(sink=sink, first_seq=gone[0], last_seq=gone[-1], rows=len(gone)),
        )


def log_failure(sink: str, delivery: Delivery, held: HeldSites, after_seq: int) -> None:
    """Log one line for a delivery, however many sites failed in it."""
    fault = delivery.fault
    if fault is None:
        return
    hold = fault.kind is FaultKind.HOLD
    failed = [held[site] for site in delivery.faults if site in held]
    log.log(
        logging.ERROR if hold else logging.WARNING,
        "%s: %s",
        "on hold: operator action required" if hold else "delivery failed",
        fault,
        extra=fields(
            sink=sink,
            failures=max((site.failures for site in failed), default=0),
            retry_in_s=round(min((site.wait_s for site in failed), default=0.0), 2),
            rows=len(delivery.retry),
            after_seq=after_seq,
            sites=len(delivery.faults),
            site=next(iter(delivery.faults), ""),
        ),
    )
