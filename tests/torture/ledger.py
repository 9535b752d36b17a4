"""The ledger outside the system, and the checker that is asked after every run.

Three parties are heard: the wire (what the collector acknowledged), the services (what each
has), the product's own books. What the broker acknowledged to the sensors and never passed on
is stated, but it is the broker's: Mosquitto acknowledges before it saves.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from tests.harness import Packet, Received, Rig
from tests.harness.books import Figures
from tests.torture.wiretap import WireTap

_SHOWN = 5
_GARBAGE = b"garbage "


@dataclass(frozen=True, slots=True)
class SinkLedger:
    """What became of everything at one sink."""

    lost: int
    """Acknowledged on the wire, and neither delivered nor anywhere on record."""
    repeated: int
    """Deliveries of a reading beyond its first."""
    respooled: int
    """Of those, the ones under another seq: the collector did not know the message again."""
    reordered: int
    """Readings that came after a later one of their site."""
    dead_lettered: int
    dropped: int
    pending: int


@dataclass(slots=True)
class Ledger:
    """What is said after every run."""

    sent: int
    """Acknowledged by the broker to the sensors."""
    lost_by_broker: int
    """Of those, the ones the collector has never acknowledged."""
    acknowledged: int
    """Acknowledged by the collector on the wire, each message once."""
    rejected: int
    sinks: Mapping[str, SinkLedger]
    violations: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise if the promise was broken.

        Raises:
            AssertionError: With every violation.
        """
        assert not self.violations, "\n".join([*self.violations, str(self)])


@dataclass(frozen=True, slots=True)
class Lawful:
    """What a run may show beside a clean ledger."""

    lost: int = 0
    """Readings that the damage hit: more may not be lost to any sink."""
    repeats: frozenset[str] = frozenset({"pubsub"})
    """Sinks that may have readings twice."""
    respooled: bool = False
    """Whether the collector may have forgotten what it had: DEDUP_WINDOW is reloaded from the
    rows that are still in the spool, and a short retention leaves few."""
    order_by: str = "seq"
    """``number`` where the broker never lost its memory: then the sensors' order holds."""
    earlier: Figures | None = None
    """The books of a spool that was set aside since: the sinks' counters go on, its own do not."""
    received_before: Mapping[str, int] = field(default_factory=dict)
    """How many each service had by then: the numbers began anew."""


def garbage(number: int) -> Packet:
    """Return a message that is no reading, recognisable in ``rejected``."""
    payload = _GARBAGE + str(number).encode()
    return Packet(b"FCTS/FAE/FAE1/SolvExtract/PT-101", payload)


def reckon(rig: Rig, tap: WireTap, lawful: Lawful | None = None) -> Ledger:
    """Hear all parties, once everything has settled or been stopped.

    Args:
        rig: The system.
        tap: What the collector acknowledged.
        lawful: What may be.
    """
    lawful = lawful or Lawful()
    figures = rig.books.figures()
    acknowledged = {_identity(payload) for payload in tap.acknowledged}
    rejected = {
        _identity(payload)
        for (payload,) in rig.books.rows("spool", "SELECT payload FROM rejected_row")
    } | set(_salvaged_rejections(rig))
    sent = {_identity(packet.payload) for packet in rig.publisher.acknowledged}
    ledger = Ledger(
        sent=len(sent),
        lost_by_broker=len(sent - acknowledged - _spooled(rig) - rejected),
        acknowledged=len(acknowledged),
        rejected=len(rejected),
        sinks={},
    )
    sinks: dict[str, SinkLedger] = {}
    for sink in rig.sinks:
        sinks[sink] = _sink(rig, sink, acknowledged - rejected, lawful, ledger.violations)
    ledger.sinks = sinks
    _books(figures, sinks, lawful, ledger.violations, _salvaged(rig))
    if rig.cloud.pubsub.violations:
        ledger.violations.append(f"Pub/Sub's rules: {rig.cloud.pubsub.violations[:_SHOWN]}")
    return ledger


def _sink(
    rig: Rig, sink: str, acknowledged: set[str], lawful: Lawful, violations: list[str]
) -> SinkLedger:
    received = rig.cloud.received(sink)
    there = {str(one.number) for one in received}
    # By the column: a row's payload may be what was damaged.
    dead = {str(int(v)) for (v,) in rig.books.rows(sink, "SELECT value FROM dead_letter")}
    pending = _pending(rig, sink)
    figures = rig.books.figures().sinks[sink]
    lost = acknowledged - there - dead - pending
    unknown = there - {str(s.number) for s in rig.publisher.samples} - acknowledged
    spooled = _spooled(rig) - there - dead - pending
    if len(lost) - figures.dropped > lawful.lost:
        violations.append(f"{sink}: {len(lost)} are lost: {sorted(lost)[:_SHOWN]}")
    if len(spooled) > lawful.lost:
        violations.append(f"{sink}: {len(spooled)} spooled ones never came: {_few(spooled)}")
    if unknown:
        violations.append(f"{sink}: {len(unknown)} came that nobody sent: {_few(unknown)}")
    times = Counter(one.event_id for one in received)
    repeated = sum(n - 1 for n in times.values())
    respooled = len({(one.event_id, one.seq) for one in received}) - len(times)
    unlawful = repeated - (respooled if lawful.respooled else 0)
    if unlawful and sink not in lawful.repeats:
        twice = [identity for identity, n in times.items() if n > 1]
        violations.append(f"{sink}: {unlawful} repeated: {_few(twice)}")
    reordered = _reordered(received, lawful.order_by, lawful.received_before.get(sink, 0))
    if reordered:
        violations.append(f"{sink}: {len(reordered)} came too late: {reordered[:_SHOWN]}")
    return SinkLedger(
        lost=len(lost),
        repeated=repeated,
        respooled=respooled,
        reordered=len(reordered),
        dead_lettered=figures.dead_lettered,
        dropped=figures.dropped,
        pending=figures.pending,
    )


def _books(
    figures: Figures,
    sinks: Mapping[str, SinkLedger],
    lawful: Lawful,
    violations: list[str],
    salvaged: int,
) -> None:
    """Check the sums that the product's own counters promise."""
    if figures.received != figures.spooled + figures.duplicates + figures.rejected:
        violations.append(f"received = spooled + duplicates + rejected does not hold: {figures}")
    for sink in sinks:
        before = 0
        if lawful.earlier is not None:
            old = lawful.earlier.sinks[sink]
            before = old.total - old.pending
        if figures.spooled + salvaged + before != figures.sinks[sink].total:
            violations.append(
                f"{sink}: spooled = delivered + dead-lettered + dropped + pending does not hold: "
                f"{figures}, salvaged {salvaged}, in earlier spools {before}"
            )


def _reordered(received: Sequence[Received], by: str, anew_from: int) -> list[int]:
    newest: dict[str, int] = {}
    seen: set[str] = set()
    late: list[int] = []
    for place, one in enumerate(received):
        if place == anew_from:
            newest.clear()
        if one.event_id in seen:
            continue
        seen.add(one.event_id)
        position = one.number if by == "number" else one.seq
        if position <= newest.get(one.site, 0):
            late.append(position)
        newest[one.site] = max(position, newest.get(one.site, 0))
    return late


def _identity(payload: bytes) -> str:
    """Return the number of a reading as text; the payload itself of anything else."""
    try:
        return str(int(json.loads(payload)["value"]))
    except (ValueError, TypeError, KeyError):
        return payload.decode("utf-8", "replace")


def _spooled(rig: Rig) -> set[str]:
    return {str(int(value)) for (value,) in rig.books.rows("spool", _VALUES)}


def _pending(rig: Rig, sink: str) -> set[str]:
    """Return what lies behind the sink's cursor in the present spool."""
    cursor = rig.books.rows(sink, "SELECT epoch, seq FROM cursor")
    epoch = rig.books.rows("spool", "SELECT value FROM meta WHERE key = 'epoch'")
    after = cursor[0][1] if cursor and epoch and cursor[0][0] == epoch[0][0] else 0
    rows = rig.books.rows("spool", f"{_VALUES} WHERE seq > {int(after)}")
    return {str(int(value)) for (value,) in rows}


def _salvaged(rig: Rig) -> int:
    return rig.books.counter("salvaged")


def _salvaged_rejections(rig: Rig) -> Iterable[str]:
    """Yield the rejected messages of the spools that were set aside, as far as they are readable.

    They stay there: they are evidence and no data.
    """
    for path in rig.spool_dir.glob("spool.db.damaged-*Z*"):
        if path.name.endswith(("-wal", "-shm")):
            continue
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as old:
                yield from [_identity(p) for (p,) in old.execute(_REJECTED)]
        except sqlite3.Error:
            continue  # not even that can be read; then the caller allows for it


def _few(names: Iterable[str]) -> list[str]:
    return sorted(names)[:_SHOWN]


_VALUES = "SELECT value FROM reading_row"
_REJECTED = "SELECT payload FROM rejected_row"
