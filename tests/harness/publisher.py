"""An MQTT 3.1.1 client that knows what the broker acknowledged, and sends what it likes.

Not paho, on purpose: the product uses paho, a raw client can send what paho refuses, and a
ledger wants every acknowledgement in order.
"""

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tests.harness.waiting import HOST

if TYPE_CHECKING:
    from tests.harness.plant import Sample

WINDOW = 200
TIMEOUT_S = 60.0
_CONNECT, _CONNACK, _PUBLISH, _DISCONNECT = 0x10, 0x20, 0x30, 0xE0
_PUBACK, _PUBREC, _PUBREL, _PUBCOMP = 0x40, 0x50, 0x62, 0x70
_DUP = 0x08
_MIDS = 65_535
_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class Packet:
    """One PUBLISH."""

    topic: bytes
    payload: bytes
    qos: int = 1
    retain: bool = False
    sample: "Sample | None" = None

    def encoded(self, mid: int, *, again: bool) -> bytes:
        """Return its bytes."""
        command = _PUBLISH | self.qos << 1 | self.retain | (_DUP if again else 0)
        identifier = struct.pack("!H", mid) if self.qos else b""
        return _framed(command, _text(self.topic) + identifier + self.payload)


class Publisher:
    """One connection, made anew when it breaks; what was not acknowledged is sent again.

    Args:
        port: The broker's.
        client_id: Its MQTT client id.

    Attributes:
        acknowledged: Every packet that the broker took responsibility for, in order.
    """

    def __init__(self, port: int, client_id: str = "plant") -> None:
        self._port = port
        self._client_id = client_id.encode()
        self._socket: socket.socket | None = None
        self._received = b""
        self._mid = 0
        self._outstanding: dict[int, Packet] = {}
        self.acknowledged: list[Packet] = []

    @property
    def samples(self) -> "list[Sample]":
        """The samples among what was acknowledged, in order."""
        return [packet.sample for packet in self.acknowledged if packet.sample is not None]

    def publish(self, packets: Iterable[Packet], timeout_s: float = TIMEOUT_S) -> None:
        """Send all, and return once the broker has acknowledged each of QoS 1 and 2."""
        deadline = time.monotonic() + timeout_s
        waiting = deque(packets)
        while waiting or self._outstanding:
            if time.monotonic() >= deadline:
                left = [p.topic for p in self._outstanding.values()]
                # Given up, so that one test's failure is not also the next one's.
                self._outstanding.clear()
                raise AssertionError(
                    f"not acknowledged by the broker within {timeout_s} s: {left[:3]} …, "
                    f"{len(left)} in all"
                )
            try:
                self._send(waiting)
                if self._outstanding:
                    self._receive()
            except (OSError, EOFError):
                self.close()
                time.sleep(_RETRY_S)  # the broker is away: the deadline above bounds this

    def _send(self, waiting: deque[Packet]) -> None:
        connection = self._connected()
        frames = []
        while waiting and len(self._outstanding) < WINDOW:
            packet = waiting.popleft()
            if packet.qos:
                self._mid = self._mid % _MIDS + 1
                self._outstanding[self._mid] = packet
            else:
                self.acknowledged.append(packet)
            frames.append(packet.encoded(self._mid, again=False))
        if frames:
            connection.sendall(b"".join(frames))

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        self._received = b""
        connection = socket.create_connection((HOST, self._port), timeout=5.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        # Protocol level 4, clean session, no keepalive.
        hello = _text(b"MQTT") + b"\x04\x02\x00\x00" + _text(self._client_id)
        connection.sendall(_framed(_CONNECT, hello))
        command, body = self._next_packet()
        assert (command, body[1:]) == (_CONNACK, b"\0"), f"refused by the broker: {body!r}"
        again = [packet.encoded(mid, again=True) for mid, packet in self._outstanding.items()]
        connection.sendall(b"".join(again))
        return connection

    def _receive(self) -> None:
        """Take one packet in and all those that came with it."""
        self._take(*self._next_packet())
        while (packet := self._buffered_packet()) is not None:
            self._take(*packet)

    def _take(self, command: int, body: bytes) -> None:
        if command == _PUBREC:
            self._connected().sendall(_framed(_PUBREL, body[:2]))
        elif command in {_PUBACK, _PUBCOMP}:
            # One that the old connection still counted may come a second time.
            packet = self._outstanding.pop(struct.unpack("!H", body[:2])[0], None)
            if packet is not None:
                self.acknowledged.append(packet)

    def _next_packet(self) -> tuple[int, bytes]:
        while (packet := self._buffered_packet()) is None:
            assert self._socket is not None
            data = self._socket.recv(65_536)
            if not data:
                raise EOFError("the broker closed the connection")
            self._received += data
        return packet

    def _buffered_packet(self) -> tuple[int, bytes] | None:
        # What a broker sends to a publisher is shorter than 128 bytes: one byte of length.
        if len(self._received) < 2 or len(self._received) < 2 + self._received[1]:
            return None
        end = 2 + self._received[1]
        command, body = self._received[0], self._received[2:end]
        self._received = self._received[end:]
        return command, body

    def close(self) -> None:
        """Leave, if connected."""
        if self._socket is not None:
            connection, self._socket = self._socket, None
            with connection:
                try:
                    connection.sendall(_framed(_DISCONNECT, b""))
                except OSError:
                    return  # it was gone already


class Load:
    """Publishes at a steady rate in a thread of its own, until told to end.

    Args:
        publisher: Used by nobody else meanwhile.
        packets: Returns the next so many packets.
        rate: Packets per second.
    """

    TICK_S = 0.02

    def __init__(
        self, publisher: Publisher, packets: Callable[[int], list[Packet]], rate: int
    ) -> None:
        self._publisher = publisher
        self._packets = packets
        self._per_tick = max(1, round(rate * self.TICK_S))
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")

    @property
    def count(self) -> int:
        """How many packets the broker has acknowledged."""
        return len(self._publisher.acknowledged)

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Publish for as long as the block takes."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._ended.wait(self.TICK_S):
                self._publisher.publish(self._packets(self._per_tick))
        except BaseException as failure:  # noqa: BLE001 - raised again where the test waits
            self._failure = failure


def _framed(command: int, body: bytes) -> bytes:
    length, left = b"", len(body)
    while True:
        left, digit = divmod(left, 128)
        length += bytes([digit | (128 if left else 0)])
        if not left:
            return bytes([command]) + length + body


def _text(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value
