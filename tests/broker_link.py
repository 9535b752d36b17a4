"""A broker of a few lines on a real socket: a test says each packet and reads each answer."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from collector.packets import Packet, PacketReader

SAFETY_S = 30.0
"""After this a test that waits for a packet in vain fails."""

CONNECT, PUBACK, SUBSCRIBE, UNSUBSCRIBE = 0x10, 0x40, 0x82, 0xA2
PINGREQ, DISCONNECT = 0xC0, 0xE0
PINGRESP = b"\xd0\0"


def publish(mid: int, payload: bytes = b"{}", topic: bytes = b"a/b", qos: int = 1) -> bytes:
    """Return a small PUBLISH packet (MQTT 3.1.1, section 3.3)."""
    body = struct.pack("!H", len(topic)) + topic + (struct.pack("!H", mid) if qos else b"")
    return bytes((0x30 | qos << 1, len(body) + len(payload))) + body + payload


def texts(body: bytes, width: int = 0) -> list[str]:
    """Return the strings in ``body``, each followed by ``width`` bytes that are left out."""
    found, position = [], 0
    while position < len(body):
        (length,) = struct.unpack_from("!H", body, position)
        found.append(body[position + 2 : position + 2 + length].decode())
        position += 2 + length + width
    return found


@dataclass
class Link:
    """One connection that the collector made."""

    sock: socket.socket
    _reader: PacketReader = field(default_factory=lambda: PacketReader(1_000_000))
    _packets: list[Packet] = field(default_factory=list)

    def packet(self) -> Packet | None:
        """Return the next packet, or None if the collector has closed the connection."""
        while not self._packets:
            try:
                data = self.sock.recv(65_536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            messages, packets = self._reader.feed(data)
            assert messages == [], "the collector publishes nothing"
            assert self._reader.malformed == ""
            self._packets += packets
        return self._packets.pop(0)

    def expect(self, command: int) -> bytes:
        """Return the body of the next packet, which is of this kind."""
        packet = self.packet()
        assert packet is not None, f"the connection was closed instead of {command:#x}"
        assert packet.command == command
        return packet.body

    def expect_acks(self, count: int) -> list[int]:
        """Return the packet identifiers of the next PUBACKs."""
        return [struct.unpack("!H", self.expect(PUBACK))[0] for _ in range(count)]

    def expect_end(self) -> None:
        """Check that the collector closes the connection, and sends nothing before."""
        assert self.packet() is None

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def accept(self, *, session_present: bool = False, code: int = 0) -> bytes:
        """Read CONNECT, answer it by this CONNACK, and return its body."""
        body = self.expect(CONNECT)
        self.send(bytes((0x20, 2, session_present, code)))
        return body

    def grant(self, *codes: int) -> list[str]:
        """Read SUBSCRIBE, answer it by these codes (or QoS 1), and return the filters."""
        body = self.expect(SUBSCRIBE)
        filters = texts(body[2:], 1)
        given = bytes(codes) or b"\1" * len(filters)
        self.send(bytes((0x90, 2 + len(given))) + body[:2] + given)
        return filters

    def close(self) -> None:
        self.sock.close()


class WireBroker:
    """Listens on a port of its own; hands out each connection as a Link."""

    def __init__(self, receive_buffer_bytes: int = 0) -> None:
        self._listener = socket.socket()
        if receive_buffer_bytes:
            # Accepted connections inherit it.
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._listener.settimeout(SAFETY_S)
        self.port: int = self._listener.getsockname()[1]
        self._links: list[Link] = []

    def link(self) -> Link:
        """Return the next connection; nothing is read from it yet."""
        sock, _ = self._listener.accept()
        sock.settimeout(SAFETY_S)
        self._links.append(Link(sock))
        return self._links[-1]

    def close(self) -> None:
        self._listener.close()
        for link in self._links:
            link.close()


@contextmanager
def wire_broker(receive_buffer_bytes: int = 0) -> Iterator[WireBroker]:
    """Give out a broker, and close everything of it at the end."""
    broker = WireBroker(receive_buffer_bytes)
    try:
        yield broker
    finally:
        broker.close()
