"""Stands between the broker and the collector, and notes what the collector acknowledged.

The promise begins with the PUBACK, so it is read off the wire and not asked of the product.
"""

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Self

from tests.harness.waiting import HOST, free_port

_PUBLISH, _PUBACK = 0x30, 0x40
_READ_BYTES = 65_536
_POLL_S = 0.2


class WireTap:
    """A relay for one client's connections, one after the other.

    Attributes:
        port: Where the collector connects.
        upstream: The broker's port.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.upstream = 0
        self._acknowledged: list[bytes] = []
        self._passed: set[bytes] = set()
        self._ended = threading.Event()
        self._listener = socket.create_server((HOST, self.port))
        self._listener.settimeout(_POLL_S)
        self._thread = threading.Thread(target=self._serve, name="wiretap", daemon=True)

    def __enter__(self) -> Self:
        """Relay from now on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut what there is."""
        self._ended.set()
        self._thread.join()
        self._listener.close()

    @property
    def acknowledged(self) -> list[bytes]:
        """The payloads that the collector acknowledged, in order; repetitions included."""
        return self._acknowledged.copy()

    @property
    def published(self) -> int:
        """How many different payloads were passed on to the collector."""
        return len(self._passed)

    @property
    def count(self) -> int:
        """How many acknowledgements there were."""
        return len(self._acknowledged)

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client, contextlib.suppress(OSError):
                broker = socket.create_connection((HOST, self.upstream), timeout=_POLL_S)
                with broker:
                    self._relay(client, broker)

    def _relay(self, client: socket.socket, broker: socket.socket) -> None:
        published: dict[int, bytes] = {}
        down, up = _Packets(), _Packets()
        for sock in (client, broker):
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ)
            selector.register(broker, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                while not self._ended.is_set():
                    ready = {key.fileobj for key, _ in selector.select(_POLL_S)}
                    if client in ready:
                        data = client.recv(_READ_BYTES)
                        if not data:
                            return
                        self._note(published, up.feed(data))
                        broker.sendall(data)
                    elif self._listener in ready:
                        return  # it has a new connection, so it has given this one up
                    if broker in ready:
                        data = broker.recv(_READ_BYTES)
                        if not data:
                            return
                        messages = dict(_messages(down.feed(data)))
                        published.update(messages)
                        client.sendall(data)
                        self._passed.update(messages.values())
            finally:
                # What it said before it, or the broker, died counts as said.
                client.settimeout(0)
                while data := client.recv(_READ_BYTES):
                    self._note(published, up.feed(data))

    def _note(self, published: dict[int, bytes], packets: list[tuple[int, bytes]]) -> None:
        for command, body in packets:
            if command == _PUBACK:
                payload = published.pop(struct.unpack("!H", body[:2])[0], None)
                if payload is not None:
                    self._acknowledged.append(payload)


def _messages(packets: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield packet identifier and payload of each PUBLISH of QoS 1."""
    for command, body in packets:
        if command & 0xF0 == _PUBLISH and command & 0x06:
            (topic,) = struct.unpack_from("!H", body)
            (mid,) = struct.unpack_from("!H", body, 2 + topic)
            yield mid, body[4 + topic :]


class _Packets:
    """Cuts a stream into MQTT packets."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Return first byte and body of each packet that is complete."""
        rest = self._rest + data
        packets: list[tuple[int, bytes]] = []
        begin = 0
        while (head := _length(rest, begin)) is not None:
            start, size = head
            if len(rest) < start + size:
                break
            packets.append((rest[begin], rest[start : start + size]))
            begin = start + size
        self._rest = rest[begin:]
        return packets


def _length(data: bytes, begin: int) -> tuple[int, int] | None:
    """Return where a packet's body starts and how long it is; None if that is not there yet."""
    size = 0
    for digit in range(4):
        position = begin + 1 + digit
        if position >= len(data):
            return None
        size |= (data[position] & 0x7F) << 7 * digit
        if not data[position] & 0x80:
            return position + 1, size
    raise ValueError("not MQTT")
