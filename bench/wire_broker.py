"""A broker for one client, the collector, which only sends and times: Mosquitto left out.

``python -m bench.wire_broker steady --seconds S`` sends groups of QoS 1 PUBLISH packets at fixed
times and measures, for each, the time from its sending to its PUBACK; that is the collector's
commit latency as the broker feels it. ``… flood --count N`` sends as fast as the collector
acknowledges. Both print one JSON line at the end; nothing is printed unless every message was
acknowledged, once.
"""

import argparse
import json
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.publish import PUBACK_BYTES, publish_packet, reading

CONNECT, PUBACK, SUBSCRIBE, PINGREQ = 1, 4, 8, 12
MAX_MID = 60_000
FLOOD_WINDOW = 20_000
FLOOD_BLOCK = 200
"""Messages; as many as one of the collector's reads brings."""

ACK_TIMEOUT_S = 60.0
_PUBACK = struct.Struct("!BBH")


def mid_of(number: int) -> int:
    """Return the packet identifier of message ``number``."""
    return number % MAX_MID + 1


@dataclass
class Client:
    """The connection that the collector made."""

    sock: socket.socket
    buffer: bytes = b""
    subscribed: bool = False

    def receive(self) -> list[int]:
        """Take in what is there; return the packet identifiers that were acknowledged."""
        data = self.sock.recv(256 * 1024)
        if not data:
            raise ConnectionError("the collector closed the connection")
        self.buffer += data
        mids: list[int] = []
        position, end = 0, len(self.buffer)
        while end - position >= PUBACK_BYTES:
            kind, length, mid = _PUBACK.unpack_from(self.buffer, position)
            if kind >> 4 != PUBACK:
                if end - position < 2 + length:
                    break
                self._answer(kind >> 4, self.buffer[position + 2 : position + 2 + length])
                position += 2 + length
                continue
            mids.append(mid)
            position += PUBACK_BYTES
        if end - position == 2 and self.buffer[position] >> 4 == PINGREQ:  # noqa: PLR2004 - all of it
            self._answer(PINGREQ, b"")
            position = end
        self.buffer = self.buffer[position:]
        return mids

    def _answer(self, kind: int, body: bytes) -> None:
        answers = {
            CONNECT: b"\x20\x02\0\0",
            SUBSCRIBE: b"\x90\x03" + body[:2] + b"\x01",
            PINGREQ: b"\xd0\0",
        }
        if kind in answers:
            self.sock.sendall(answers[kind])
        self.subscribed = kind == SUBSCRIBE or self.subscribed


def accept(listener: socket.socket) -> Client:
    """Wait for the collector to connect and subscribe."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client = Client(sock)
    while not client.subscribed:
        client.receive()
    return client


def steady(
    client: Client, first: int, seconds: float, group: int, interval_s: float
) -> dict[str, object]:
    """Send groups at fixed times; return when each message went (Unix time) and what it took."""
    groups = int(seconds / interval_s)
    blocks = [
        b"".join(
            publish_packet(*reading(first + number), mid_of(number))
            for number in range(start, start + group)
        )
        for start in range(0, groups * group, group)
    ]
    sent_at: dict[int, float] = {}
    went: list[float] = []
    took_ms: list[float] = []
    wall = time.time() - time.perf_counter()

    def take(until: Callable[[], bool], deadline: float) -> None:
        while not until() and (left_s := deadline - time.perf_counter()) > 0:
            if select.select([client.sock], [], [], left_s)[0]:
                mids = client.receive()
                now = time.perf_counter()
                for mid in mids:
                    sent = sent_at.pop(mid)
                    went.append(wall + sent)
                    took_ms.append((now - sent) * 1e3)

    begun = time.perf_counter()
    for index, block in enumerate(blocks):
        take(lambda: False, begun + index * interval_s)
        now = time.perf_counter()
        mids = [mid_of(index * group + i) for i in range(group)]
        if not sent_at.keys().isdisjoint(mids):
            raise ConnectionError("the collector is so far behind that identifiers run out")
        sent_at.update(dict.fromkeys(mids, now))
        client.sock.sendall(block)
    take(lambda: not sent_at, time.perf_counter() + ACK_TIMEOUT_S)
    return {"acked": len(took_ms), "sent": groups * group, "went": went, "took_ms": took_ms}


def flood(client: Client, first: int, count: int) -> dict[str, object]:
    """Send as fast as it is acknowledged; return the seconds to the last acknowledgement."""
    blocks = []
    for start in range(0, count, FLOOD_BLOCK):
        numbers = range(start, min(start + FLOOD_BLOCK, count))
        packets = [publish_packet(*reading(first + n), mid_of(n)) for n in numbers]
        blocks.append((b"".join(packets), len(numbers)))
    client.sock.setblocking(False)  # noqa: FBT003 - the standard library's own signature
    acked: list[int] = []
    index = offset = sent = 0
    deadline = time.perf_counter() + ACK_TIMEOUT_S + count / 1000
    begun = time.perf_counter()
    while len(acked) < count and time.perf_counter() < deadline:
        may = index < len(blocks) and sent - len(acked) < FLOOD_WINDOW
        readable, writable, _ = select.select([client.sock], [client.sock] if may else [], [], 1.0)
        if readable:
            acked += client.receive()
        if writable:
            block, messages = blocks[index]
            offset += client.sock.send(memoryview(block)[offset:])
            if offset == len(block):
                index, offset, sent = index + 1, 0, sent + messages
    seconds = time.perf_counter() - begun
    # In the order received (MQTT 3.1.1, section 4.6), none twice, none left out.
    in_order = acked == [mid_of(number) for number in range(count)]
    return {"acked": len(acked), "sent": count, "seconds": seconds, "in_order": in_order}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["steady", "flood"])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--group", type=int, default=20)
    parser.add_argument("--interval-ms", type=float, default=10.0)
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.stdout.write(f"port {listener.getsockname()[1]}\n")
        sys.stdout.flush()
        client = accept(listener)
    sys.stdin.readline()
    if arguments.mode == "flood":
        result = flood(client, arguments.first, arguments.count)
    else:
        result = steady(
            client,
            arguments.first,
            arguments.seconds,
            arguments.group,
            arguments.interval_ms / 1000,
        )
    sys.stdout.write(f"done {json.dumps(result)}\n")
    sys.stdout.flush()
    # The connection stays until the collector has been stopped: it would try to come back.
    sys.stdin.readline()


if __name__ == "__main__":
    main()
