"""MQTT 3.1.1 packets out of a stream of bytes, PUBLISH packets taken apart in one loop.

Reading large pieces and cutting them here costs a third of what a receive call per header
byte costs. Only PUBLISH is understood; every other packet is handed on whole.

A packet that announces more than a reading may have is never buffered: its first part is
kept for the record and the rest is thrown away as it arrives, so that an announced 256 MB
costs no memory and the session goes on behind it.
"""

from typing import NamedTuple

PUBLISH = 0x30
_USUAL = 0x32
"""A PUBLISH with QoS 1, neither sent before nor retained."""

_USUAL_LEAST = 5
"""Its length without topic and payload: the topic's own length, and the packet identifier."""

LENGTH_BYTES_MAX = 4
TOPIC_MAX_BYTES = 65_535
KEPT_OF_OVERSIZED_BYTES = 64 * 1024
"""How much of an oversized payload is kept."""


class Message(NamedTuple):
    """One PUBLISH as it arrived."""

    topic: bytes
    payload: bytes
    """Only the first part where the whole was too large; see size."""
    qos: int
    retained: bool
    mid: int
    """The packet identifier; 0 at QoS 0."""
    size: int
    """The whole payload's length in bytes."""


class Packet(NamedTuple):
    """Any other packet: its first byte and what follows the length."""

    command: int
    body: bytes


class PacketReader:
    """Takes bytes as they come and gives back whole packets.

    Args:
        max_payload_bytes: A payload above this is cut while it arrives.
    """

    def __init__(self, max_payload_bytes: int) -> None:
        self._buffered_max = max_payload_bytes + TOPIC_MAX_BYTES + 4
        self._pieces: list[bytes] = []
        self._have = 0
        self._need = 2
        self._skip = 0
        self.malformed = ""
        """Why the stream cannot be read any further; empty while it can."""

    def feed(self, data: bytes) -> tuple[list[Message], list[Packet]]:
        """Return the packets that ``data`` completes, in their order within each kind.

        After a malformed packet :attr:`malformed` says why, what stood before it has still
        been returned, and the connection has to be closed (MQTT 3.1.1, section 4.8).
        """
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        # Pieces of an unfinished packet are joined once, when it is complete: joining at
        # each piece would be quadratic in its size.
        self._have += len(data)
        if self._pieces:
            self._pieces.append(data)
            if self._have < self._need:
                return [], []
            data = b"".join(self._pieces)
            self._pieces = []
        messages: list[Message] = []
        others: list[Packet] = []
        position = self._parse(data, messages, others)
        rest = data[position:]
        self._have = len(rest)
        if rest:
            self._pieces.append(rest)
        return messages, others

    def _parse(self, data: bytes, messages: list[Message], others: list[Packet]) -> int:
        """Take packets off ``data``; return where the first incomplete one begins."""
        end = len(data)
        position = _take_usual(data, 0, messages)
        while end - position >= 2:  # noqa: PLR2004 - the least that a packet has
            command = data[position]
            length = data[position + 1]
            body = position + 2
            if length >= 128:  # noqa: PLR2004 - the continuation bit, section 2.2.3
                length, body = self._long_length(data, position + 1)
                if body <= 0:
                    break
            stop = body + length
            if stop > end:
                if length <= self._buffered_max or not self._cut(
                    data, position, body, stop, messages
                ):
                    self._need = min(stop, body + self._head_bytes(length)) - position
                    break
                return end
            if command & 0xF0 != PUBLISH:
                if length > self._buffered_max:
                    # Refused also where it is all there: how TCP cuts a stream decides nothing.
                    self._refuse_long(command, length)
                    break
                others.append(Packet(command, data[body:stop]))
            else:
                message = self._publish(data, command, body, stop, stop)
                if message is None:
                    break
                messages.append(message)
            position = _take_usual(data, stop, messages)
        else:
            self._need = 2
        return position

    def _head_bytes(self, length: int) -> int:
        if length <= self._buffered_max:
            return length
        return min(length, TOPIC_MAX_BYTES + 4 + KEPT_OF_OVERSIZED_BYTES)

    def _long_length(self, data: bytes, position: int) -> tuple[int, int]:
        """Return the remaining length and where the body begins; 0 as the latter if unknown."""
        length = 0
        for index in range(LENGTH_BYTES_MAX):
            if position + index >= len(data):
                self._need = index + 2
                return 0, 0
            byte = data[position + index]
            length |= (byte & 127) << (7 * index)
            if byte < 128:  # noqa: PLR2004 - no continuation bit
                return length, position + index + 1
        self.malformed = "a remaining length of more than four bytes"
        return 0, 0

    def _cut(
        self, data: bytes, position: int, body: int, stop: int, messages: list[Message]
    ) -> bool:
        """Report an oversized PUBLISH by its first part and skip the rest, if enough is there."""
        command = data[position]
        if command & 0xF0 != PUBLISH:
            self._refuse_long(command, stop - body)
            return False
        if len(data) - body < self._head_bytes(stop - body):
            return False
        message = self._publish(data, command, body, len(data), stop)
        if message is None:
            return False
        messages.append(message._replace(payload=message.payload[:KEPT_OF_OVERSIZED_BYTES]))
        self._skip = stop - len(data)
        return True

    def _refuse_long(self, command: int, length: int) -> None:
        self.malformed = f"a packet of type {command >> 4} announces {length} bytes"

    def _publish(
        self, data: bytes, command: int, body: int, stop: int, whole: int
    ) -> Message | None:
        """Take a PUBLISH apart (section 3.3); None, with the reason noted, if it is malformed.

        Args:
            data: The stream.
            command: The packet's first byte.
            body: Where the variable header begins.
            stop: Where the available part of the packet ends.
            whole: Where all of it would end.
        """
        qos = (command >> 1) & 3
        if qos == 3:  # noqa: PLR2004 - section 3.3.1.2
            self.malformed = "a PUBLISH with QoS 3"
            return None
        topic = body + 2
        payload = topic + ((data[body] << 8) | data[body + 1]) if stop >= topic else whole + 1
        topic_end = payload
        mid = 0
        if qos:
            payload += 2
            if payload <= stop:
                mid = (data[payload - 2] << 8) | data[payload - 1]
                if mid == 0:
                    self.malformed = "a PUBLISH with packet identifier 0"
                    return None
        if payload > stop:
            self.malformed = "a PUBLISH shorter than its own header"
            return None
        return Message(
            data[topic:topic_end],
            data[payload:stop],
            qos,
            bool(command & 1),
            mid,
            whole - payload,
        )


_new_tuple = tuple.__new__


def _take_usual(data: bytes, position: int, messages: list[Message]) -> int:
    """Take off the packets from ``position`` on that are usual and whole; return where they end.

    It is :meth:`PacketReader._parse` for what nearly all packets are, in a third of the time. It
    stops before whatever is not plainly in order, and never judges it.
    """
    append, new = messages.append, _new_tuple
    end = len(data)
    last = end - 2 - _USUAL_LEAST
    while position <= last and data[position] == _USUAL:
        length, body = data[position + 1], position + 2
        if length >= 128:  # noqa: PLR2004 - the continuation bit, section 2.2.3
            length += (data[body] - 1) << 7
            body += 1
        stop = body + length
        topic_end = body + 2 + (data[body] << 8 | data[body + 1])
        payload = topic_end + 2
        if payload > stop or stop > end or data[body - 1] >= 128:  # noqa: PLR2004 - a third byte
            break
        mid = data[topic_end] << 8 | data[topic_end + 1]
        if mid == 0:
            break
        topic = data[body + 2 : topic_end]
        append(new(Message, (topic, data[payload:stop], 1, False, mid, stop - payload)))
        position = stop
    return position
