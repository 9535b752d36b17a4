"""A broker that lies to the collector: every malformed, unlawful or unasked packet.

It keeps the ledger that counts: which message was acknowledged by the collector, seen on the
wire, on the very connection on which it was sent.
"""

import contextlib
import random
import socket
import struct
from collections import Counter
from typing import Self

from collector.packets import PacketReader
from tests.harness.waiting import HOST

TIMEOUT_S = 30.0
SUBSCRIBE, PUBREL = 0x82, 0x62
_CONNECT, _PUBLISH, _PUBACK, _PUBREC, _PINGREQ = 0x10, 0x30, 0x40, 0x50, 0xC0
_DUP = 0x08


class LeftError(Exception):
    """The collector has closed the connection."""


def packet(command: int, body: bytes = b"") -> bytes:
    """Return a packet's bytes (MQTT 3.1.1, section 2.2)."""
    length, left = b"", len(body)
    while True:
        left, digit = divmod(left, 128)
        length += bytes([digit | (128 if left else 0)])
        if not left:
            return bytes([command]) + length + body


def publish(number: int, mid: int, *, qos: int = 1, dup: bool = False) -> bytes:
    """Return a PUBLISH of the reading ``number``."""
    topic = b"FCTS/FAE/FAE1/SolvExtract/PT-101"
    payload = (
        b'{"site_code": "FAE1", "sensor_id": "PT/1", "timestamp": "2026-01-01T00:00:00Z", '
        b'"value": %d}' % number
    )
    head = struct.pack("!H", len(topic)) + topic + (struct.pack("!H", mid) if qos else b"")
    return packet(_PUBLISH | qos << 1 | (_DUP if dup else 0), head + payload)


class LyingBroker:
    """Serves one collector, connection after connection.

    Args:
        seed: Of everything that is left to chance.

    Attributes:
        acknowledged: The numbers of readings for which a PUBACK or PUBREC came.
        violations: What the collector did that it must not.
    """

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - a test's dice
        self._listener = socket.create_server((HOST, 0))
        self._listener.settimeout(TIMEOUT_S)
        self.port: int = self._listener.getsockname()[1]
        self.acknowledged: set[int] = set()
        self.violations: list[str] = []
        self.connections = 0
        self.answers = 0
        self._sent: Counter[int] = Counter()
        self._numbers: dict[int, list[int]] = {}
        self._next = 0
        self._sock: socket.socket | None = None
        self._reader = PacketReader(1_000_000)
        self._packets: list[tuple[int, bytes]] = []

    def __enter__(self) -> Self:
        """It listens already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close everything."""
        self.hang_up()
        self._listener.close()

    @property
    def unacknowledged(self) -> list[int]:
        """The numbers that were sent, or given out, and never acknowledged."""
        return [n for n in range(1, self._next + 1) if n not in self.acknowledged]

    def hang_up(self) -> None:
        """Close the connection."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def await_client(self) -> None:
        """Take the next connection and read its CONNECT."""
        self.hang_up()
        self._sock, _ = self._listener.accept()
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(TIMEOUT_S)
        self._reader = PacketReader(1_000_000)
        self._packets = []
        self._sent, self._numbers = Counter(), {}
        self.connections += 1
        command, _ = self.receive()
        assert command == _CONNECT, f"{command:#x} before CONNECT"

    def welcome(self, *, session_present: bool = False) -> None:
        """Take the next connection through CONNECT and, without a session, SUBSCRIBE."""
        self.await_client()
        self.send(packet(0x20, bytes([session_present, 0])))
        if not session_present:
            self.grant(self.expect(SUBSCRIBE))

    def grant(self, body: bytes) -> None:
        """Answer a SUBSCRIBE of one filter."""
        self.send(packet(0x90, body[:2] + b"\1"))

    def send(self, data: bytes) -> None:
        """Send bytes, in one piece or in several; how TCP cuts them is nobody's promise."""
        assert self._sock is not None
        cuts = sorted(self.chance.randrange(len(data) + 1) for _ in range(self.chance.randrange(3)))
        try:
            for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                self._sock.sendall(data[begin:end])
        except OSError as error:
            raise LeftError(str(error)) from error

    def say(self, data: bytes) -> None:
        """Send bytes to a collector that may leave at any of them."""
        with contextlib.suppress(LeftError):
            self.send(data)

    def new(self, count: int = 1) -> list[int]:
        """Return the numbers of readings that were never sent before."""
        first = self._next + 1
        self._next += count
        return list(range(first, first + count))

    def message(self, number: int, *, qos: int = 1, dup: bool = False, mid: int = 0) -> bytes:
        """Return a PUBLISH, and note it as sent on this connection."""
        mid = mid or number % 65_535 + 1
        self._sent[mid] += 1
        self._numbers.setdefault(mid, []).append(number)
        return publish(number, mid, qos=qos, dup=dup)

    def note_sent(self, mid: int) -> None:
        """Note a message that is no reading as sent: it may be acknowledged."""
        self._sent[mid] += 1
        self._numbers.setdefault(mid, []).append(0)

    def receive(self) -> tuple[int, bytes]:
        """Return the next packet; acknowledgements are noted.

        Raises:
            LeftError: The collector has closed the connection.
        """
        while not self._packets:
            assert self._sock is not None
            try:
                data = self._sock.recv(65_536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise LeftError("closed by the collector")
            messages, others = self._reader.feed(data)
            if messages or self._reader.malformed:
                self.violations.append(f"the collector sent {messages} {self._reader.malformed}")
            for command, body in others:
                self._note(command, body)
                self._packets.append((command, body))
        return self._packets.pop(0)

    def _note(self, command: int, body: bytes) -> None:
        if command not in {_PUBACK, _PUBREC}:
            return
        self.answers += 1
        (mid,) = struct.unpack("!H", body)
        if not self._sent[mid]:
            self.violations.append(f"an acknowledgement of {mid}, which was not sent here")
            return
        self._sent[mid] -= 1
        # In the order in which they were sent under this identifier.
        number = self._numbers[mid].pop(0)
        if number:
            self.acknowledged.add(number)

    def expect(self, wanted: int) -> bytes:
        """Return the body of the next packet of a kind; others are taken note of."""
        while True:
            command, body = self.receive()
            if command == wanted:
                return body
            if command == _PINGREQ:
                self.send(b"\xd0\0")

    def expect_acknowledged(self, numbers: list[int]) -> None:
        """Read until all these are acknowledged."""
        while not self.acknowledged.issuperset(numbers):
            command, body = self.receive()
            if command == _PUBREC:
                self.send(packet(PUBREL, body))
            elif command == _PINGREQ:
                self.send(b"\xd0\0")

    def expect_answers(self) -> None:
        """Read until there is an answer to everything that was sent on this connection."""
        while self._sent.total():
            self.receive()

    def finish_writing(self) -> None:
        """Say nothing more, but listen on."""
        assert self._sock is not None
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def expect_left(self) -> None:
        """Read until the collector closes the connection."""
        try:
            while True:
                self.receive()
        except LeftError:
            return

    def settle(self) -> None:
        """Send everything that is not acknowledged once more, to a collector that is well."""
        for attempt in range(5):
            try:
                self.welcome(session_present=bool(attempt % 2))
                left = self.unacknowledged
                for start in range(0, len(left), 500):
                    part = left[start : start + 500]
                    self.send(b"".join(self.message(n, dup=True) for n in part))
                    self.expect_acknowledged(part)
            except LeftError:
                continue
            else:
                return
        raise AssertionError("the collector does not hold a connection to an honest broker")
