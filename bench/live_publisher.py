"""Publishes readings that carry the moment at which they are sent, at a steady rate.

``python -m bench.live_publisher PORT COUNT RATE``: QoS 1, one packet at a time, each when it is
due; ends when the broker has acknowledged all of them.
"""

import select
import sys
import time

from bench.publish import PUBACK_BYTES, connect, publish_packet, reading_at

MAX_MID = 65_000


def main(port: int, count: int, rate: float) -> None:
    """Publish, and wait for the acknowledgements."""
    sock = connect(port, "bench-live")
    acked_bytes = 0
    begun = time.perf_counter()
    for number in range(count):
        due_s = begun + number / rate
        while (left_s := due_s - time.perf_counter()) > 0:
            if select.select([sock], [], [], left_s)[0]:
                acked_bytes += len(sock.recv(65_536))
        topic, payload = reading_at(number, time.time_ns() // 1000)
        sock.sendall(publish_packet(topic, payload, number % MAX_MID + 1))
    late_s = time.perf_counter() - begun - count / rate
    while acked_bytes < count * PUBACK_BYTES:
        data = sock.recv(65_536)
        if not data:
            raise ConnectionError("the broker closed the connection")
        acked_bytes += len(data)
    sys.stdout.write(f"done {late_s:.3f}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
