"""One group commit: what a transaction will hold, and what is acknowledged after it."""

from collections import Counter
from dataclasses import dataclass, field

from collector.paho_client import Ack
from spool import NewReading, Rejection


@dataclass
class Group:
    """What one transaction will hold, and what is acknowledged after it."""

    readings: list[NewReading] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    acks: list[tuple[int, list[Ack]]] = field(default_factory=list)
    size: int = 0
    """Bytes that the readings will take. Rejected messages have a ring of their own, and
    duplicates take nothing: for neither may a reading be dropped or refused."""
