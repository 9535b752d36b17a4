"""What was promised and what had arrived, at any moment of a recorded run."""

import bisect
import dataclasses
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spool import event_id
from tests.torture.syscalls import Event, Kind

_PUBLISH, _PUBACK = 0x30, 0x40


@dataclass(frozen=True, slots=True)
class Arrival:
    """Readings that a service took in one request."""

    at: float
    """Seconds since 1970, when it had them, and the answer was still to be sent."""
    confirmed: float
    """Seconds since 1970; the answer was not sent before."""
    readings: Sequence[tuple[int, bytes]]
    """seq and event id."""
    stream: str = ""
    """Of an append: the write stream, and the offset in it."""
    offset: int = 0


@dataclass(slots=True)
class Truth:
    """How things stood at one moment."""

    acked: set[bytes]
    """Event ids of the messages whose PUBACK may have left."""
    arrived: Mapping[str, Sequence[Arrival]]
    """By sink."""
    through: Mapping[str, int]
    """By sink: the service has confirmed every seq up to there."""
    seqs: Mapping[bytes, int] = field(default_factory=dict)
    """By event id: the seq that the reading had, as far as it ever arrived anywhere."""


class Witness:
    """Answers what was true at a moment.

    Args:
        events: The whole log, in order.
        arrivals: By sink, in order.
        before: How things stood at the power cut that the log is of the recovery from.
    """

    def __init__(
        self,
        events: Sequence[Event],
        arrivals: Mapping[str, Sequence[Arrival]],
        before: Truth | None = None,
    ) -> None:
        self._acks = list(acknowledged(events))
        self._acked_before: set[bytes] = set()
        if before is not None:
            self._acked_before = before.acked
            # Confirmed or not: the service has them, and says so when they are sent again.
            earlier = {
                sink: [dataclasses.replace(arrival, at=0.0, confirmed=0.0) for arrival in given]
                for sink, given in before.arrived.items()
            }
            arrivals = {sink: [*earlier[sink], *given] for sink, given in arrivals.items()}
        self._arrivals = arrivals
        self._through = {sink: list(_contiguous(given)) for sink, given in arrivals.items()}
        self._seqs: dict[bytes, int] = {}
        for given in arrivals.values():
            for arrival in given:
                for seq, identity in arrival.readings:
                    self._seqs[identity] = min(seq, self._seqs.get(identity, seq))

    def truth(self, at: float) -> Truth:
        """Return how things stood at ``at``, seconds since 1970, that moment included."""
        ends = {
            sink: bisect.bisect_right(given, at, key=lambda arrival: arrival.at)
            for sink, given in self._arrivals.items()
        }
        confirmed = {
            sink: bisect.bisect_right(given, at, key=lambda arrival: arrival.confirmed)
            for sink, given in self._arrivals.items()
        }
        acks = bisect.bisect_right(self._acks, at, key=lambda ack: ack[0])
        return Truth(
            acked=self._acked_before | {identity for _, identity in self._acks[:acks]},
            arrived={sink: given[: ends[sink]] for sink, given in self._arrivals.items()},
            through={
                sink: self._through[sink][end - 1] if end else 0 for sink, end in confirmed.items()
            },
            seqs=self._seqs,
        )


def _contiguous(arrivals: Iterable[Arrival]) -> Iterable[int]:
    """Yield after each arrival the seq up to which everything has come."""
    through = 0
    early: set[int] = set()
    for arrival in arrivals:
        early.update(seq for seq, _ in arrival.readings)
        while through + 1 in early:
            through += 1
            early.remove(through)
        yield through


def acknowledged(events: Iterable[Event]) -> Iterable[tuple[float, bytes]]:
    """Yield time and event id of each PUBACK, as seen on the wire.

    An identifier means the message that came with it last, on the same connection.
    """
    messages: dict[str, dict[int, bytes]] = {}
    received: dict[str, bytes] = {}
    sent: dict[str, bytes] = {}
    for event in events:
        if event.kind is Kind.RECEIVE:
            packets, received[event.path] = _packets(received.get(event.path, b"") + event.data)
            for command, body in packets:
                if command & 0xF0 == _PUBLISH and command & 0x06:
                    mid, identity = _message(body)
                    messages.setdefault(event.path, {})[mid] = identity
        elif event.kind is Kind.SEND:
            packets, sent[event.path] = _packets(sent.get(event.path, b"") + event.data)
            for command, body in packets:
                if command == _PUBACK:
                    yield event.at, messages[event.path][struct.unpack("!H", body)[0]]


def _message(body: bytes) -> tuple[int, bytes]:
    (length,) = struct.unpack_from("!H", body)
    (mid,) = struct.unpack_from("!H", body, 2 + length)
    return mid, event_id(body[2 : 2 + length], body[4 + length :])


def _packets(stream: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the whole packets, first byte and body, and what is left."""
    packets = []
    at = 0
    while (found := _body(stream, at)) is not None:
        begin, end = found
        packets.append((stream[at], stream[begin:end]))
        at = end
    return packets, stream[at:]


def _body(stream: bytes, at: int) -> tuple[int, int] | None:
    """Return where the body of the packet at ``at`` begins and ends; None if it is not whole."""
    length = 0
    for index in range(at + 1, min(at + 5, len(stream))):
        length |= (stream[index] & 0x7F) << 7 * (index - at - 1)
        if stream[index] < 0x80:
            end = index + 1 + length
            return (index + 1, end) if end <= len(stream) else None
    return None
