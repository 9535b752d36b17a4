"""Publishes readings that carry the moment at which they are sent, one by one.

``python -m bench.live_publisher PORT COUNT RATE [SITES [SEED]]``: QoS 1, one packet at a time, each
when it is due; ends when the broker has acknowledged all of them. Evenly spaced, or with a SEED at
random, as from sensors that know nothing of each other (exponential gaps with a mean of 1/RATE).
"""

import random
import select
import sys
import time
from collections.abc import Iterator

from bench.publish import PUBACK_BYTES, SITES, connect, publish_packet, reading_at

MAX_MID = 65_000


def due_times(count: int, rate: float, seed: int | None) -> Iterator[float]:
    """Yield, in seconds after the begin, when each reading is due."""
    if seed is None:
        yield from (number / rate for number in range(count))
        return
    source = random.Random(seed)  # noqa: S311 - no secret
    due_s = 0.0
    for _ in range(count):
        due_s += source.expovariate(rate)
        yield due_s


def main(port: int, count: int, rate: float, sites: int = SITES, seed: int | None = None) -> None:
    """Publish, and wait for the acknowledgements."""
    sock = connect(port, "bench-live")
    acked_bytes = 0
    due_s = 0.0
    begun = time.perf_counter()
    for number, due_s in enumerate(due_times(count, rate, seed)):
        while (left_s := begun + due_s - time.perf_counter()) > 0:
            if select.select([sock], [], [], left_s)[0]:
                acked_bytes += len(sock.recv(65_536))
        topic, payload = reading_at(number, time.time_ns() // 1000, sites)
        sock.sendall(publish_packet(topic, payload, number % MAX_MID + 1))
    late_s = time.perf_counter() - begun - due_s
    while acked_bytes < count * PUBACK_BYTES:
        data = sock.recv(65_536)
        if not data:
            raise ConnectionError("the broker closed the connection")
        acked_bytes += len(data)
    sys.stdout.write(f"done {late_s:.3f}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
