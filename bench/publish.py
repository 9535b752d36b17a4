"""A load generator that is never the bottleneck: prebuilt packets over raw sockets.

``python -m bench.publish --port P --count N`` publishes N distinct realistic readings at QoS 1
and exits when the broker has acknowledged all of them.
"""

import argparse
import os
import selectors
import socket
import struct
import sys
import time
from functools import lru_cache

SITES = 8
TAGS = 500
BLOCK_MESSAGES = 100
WINDOW_MESSAGES = 4_000
"""Per connection: published and not yet acknowledged."""

TURN_S = 0.001
"""At full speed, one look each millisecond: acknowledgements come one by one, and looking for each
would take half as much of the machine as what is measured."""

PUBACK_BYTES = 4
_EPOCH_S = 1_780_000_000


def reading_us(number: int) -> int:
    """Return when reading ``number`` was measured, in microseconds since 1970 UTC."""
    return _EPOCH_S * 1_000_000 + number * 1000


def reading_value(number: int) -> float:
    """Return the value of reading ``number``."""
    return float(f"{number % 9973 / 7:.4f}")


def reading(number: int) -> tuple[bytes, bytes]:
    """Return topic and payload of reading ``number``; all differ, about 120 bytes."""
    return reading_at(number, reading_us(number))


def reading_at(number: int, micros: int, sites: int = SITES) -> tuple[bytes, bytes]:
    """Return topic and payload of a reading that was measured at ``micros``."""
    tag = number % TAGS
    site = tag % sites
    topic = f"FCTS/FAE/SITE{site}/SolvExtract/SX{site}_PIT_{tag:04d}"
    payload = (
        f'{{"site_code":"SITE{site}","sensor_id":"SX{site}-PIT-{tag:04d}","timestamp":'
        f'"{_second(micros // 1_000_000)}.{micros % 1_000_000:06d}Z","value":'
        f"{number % 9973 / 7:.4f}}}"
    )
    return topic.encode(), payload.encode()


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def publish_packet(topic: bytes, payload: bytes, mid: int, qos: int = 1) -> bytes:
    """Return a PUBLISH packet (MQTT 3.1.1, section 3.3)."""
    body = struct.pack("!H", len(topic)) + topic
    if qos:
        body += struct.pack("!H", mid)
    body += payload
    length = len(body)
    header = bytearray([0x30 | qos << 1])
    while True:
        byte, length = length % 128, length // 128
        header.append(byte | (128 if length else 0))
        if not length:
            return bytes(header) + body


def connect(port: int, client_id: str) -> socket.socket:
    """Return a socket on which the broker has accepted a clean MQTT 3.1.1 session."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    identity = client_id.encode()
    body = b"\0\4MQTT\4\2\0\0" + struct.pack("!H", len(identity)) + identity
    sock.sendall(bytes([0x10, len(body)]) + body)
    answer = sock.recv(4)
    if answer != b"\x20\x02\0\0":
        raise ConnectionError(f"the broker refused: {answer.hex()}")
    return sock


class _Connection:
    def __init__(self, port: int, index: int, blocks: list[tuple[bytes, int]]) -> None:
        self.sock = connect(port, f"bench-{index}-{time.monotonic_ns()}")
        self.sock.setblocking(False)  # noqa: FBT003 - the standard library's own signature
        self.blocks = blocks
        self.next = 0
        self.offset = 0
        self.sent = 0
        self.acked_bytes = 0
        self.total = sum(count for _, count in blocks)

    @property
    def acked(self) -> int:
        return self.acked_bytes // PUBACK_BYTES

    @property
    def may_send(self) -> bool:
        return self.next < len(self.blocks) and self.sent - self.acked < WINDOW_MESSAGES

    def send(self) -> None:
        block, count = self.blocks[self.next]
        try:
            self.offset += self.sock.send(memoryview(block)[self.offset :])
        except BlockingIOError:
            return
        if self.offset == len(block):
            self.offset = 0
            self.next += 1
            self.sent += count

    def receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("the broker closed the connection")
        self.acked_bytes += len(data)


def build(first: int, count: int, connections: int) -> list[list[tuple[bytes, int]]]:
    """Return, per connection, blocks of packets with the number of messages in each."""
    shares: list[list[tuple[bytes, int]]] = []
    for index in range(connections):
        numbers = range(first + index, first + count, connections)
        blocks = []
        for start in range(0, len(numbers), BLOCK_MESSAGES):
            part = numbers[start : start + BLOCK_MESSAGES]
            packets = [
                publish_packet(*reading(n), (start + i) % 65_000 + 1) for i, n in enumerate(part)
            ]
            blocks.append((b"".join(packets), len(part)))
        shares.append(blocks)
    return shares


class Gate:
    """How many messages may have been published so far, as lines on standard input say."""

    def __init__(self) -> None:
        self.allowed = 0
        self._rest = b""

    def read(self) -> None:
        """Take in the lines that are there; the last one counts."""
        *lines, self._rest = (self._rest + os.read(sys.stdin.fileno(), 65_536)).split(b"\n")
        if lines:
            self.allowed = int(lines[-1])


def run(
    port: int,
    shares: list[list[tuple[bytes, int]]],
    rate: float = 0.0,
    gate: Gate | None = None,
) -> float:
    """Publish everything; return the seconds until the last acknowledgement.

    Args:
        port: The broker's.
        shares: From :func:`build`.
        rate: Messages per second over all connections; 0 for as fast as possible.
        gate: Holds the messages back until somebody lets them through.
    """
    connections = [_Connection(port, i, blocks) for i, blocks in enumerate(shares)]
    selector = selectors.DefaultSelector()
    for connection in connections:
        selector.register(connection.sock, selectors.EVENT_READ, connection)
    if gate is not None:
        selector.register(sys.stdin, selectors.EVENT_READ, gate)
    begun = time.perf_counter()
    while any(c.acked < c.total for c in connections):
        allowed = (time.perf_counter() - begun) * rate if rate else float("inf")
        if gate is not None:
            allowed = min(allowed, gate.allowed)
        sent = sum(c.sent for c in connections)
        for connection in connections:
            may = connection.may_send and sent < allowed
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if may else 0)
            selector.modify(connection.sock, events, connection)
        for key, events in selector.select(0.01 if rate else 1.0):
            _serve(key.data, events)
        if not rate:
            time.sleep(TURN_S)
    return time.perf_counter() - begun


def _serve(ready: _Connection | Gate, events: int) -> None:
    if isinstance(ready, Gate):
        ready.read()
        return
    if events & selectors.EVENT_READ:
        ready.receive()
    if events & selectors.EVENT_WRITE:
        ready.send()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--wait", action="store_true", help="begin at a line on standard input")
    parser.add_argument(
        "--gated", action="store_true", help="publish as many as the last line on stdin says"
    )
    arguments = parser.parse_args()
    shares = build(arguments.first, arguments.count, arguments.connections)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if arguments.wait:
        sys.stdin.readline()
    gate = Gate() if arguments.gated else None
    seconds = run(arguments.port, shares, arguments.rate, gate)
    sys.stdout.write(f"{seconds:.3f}\n")


if __name__ == "__main__":
    main()
