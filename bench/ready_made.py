"""A sender whose requests are ready before it begins: what a server can take, and no more.

``python -m bench.ready_made pubsub HOST:PORT TOPIC COUNT``, or ``bigquery HOST:PORT TABLE COUNT``.
No reading of a spool, no check, no encoding, no cursor: no forwarder can be faster than this.
"""

import http.client
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from bench.fill import rows
from bench.insert_rows_loop import CALL_ROWS, TIMEOUT_S
from forwarder.bigquery import PARALLEL_REQUESTS
from forwarder.insertbody import BodyEncoder
from forwarder.lanes import REQUEST_MAX_MESSAGES
from forwarder.publisher import CHANNEL_OPTIONS
from forwarder.pubsub import PUBLISH_METHOD
from forwarder.table import COLUMNS
from forwarder.wire import MessageEncoder
from spool import Reading

Send = Callable[[list[bytes]], None]


def _pubsub(address: str, topic: str, readings: list[Reading]) -> tuple[list[list[bytes]], Send]:
    """One lane of requests per site, as ordering asks for."""
    sites: dict[str, list[Reading]] = {}
    for reading in readings:
        sites.setdefault(reading[4], []).append(reading)
    encoder = MessageEncoder(topic, "bench")
    lanes = [
        [
            encoder.request(part[start : start + REQUEST_MAX_MESSAGES])
            for start in range(0, len(part), REQUEST_MAX_MESSAGES)
        ]
        for part in sites.values()
    ]
    publish = grpc.insecure_channel(address, options=CHANNEL_OPTIONS).unary_unary(PUBLISH_METHOD)

    def send(lane: list[bytes]) -> None:
        for request in lane:
            publish(request, timeout=TIMEOUT_S)

    return lanes, send


def _bigquery(address: str, table: str, readings: list[Reading]) -> tuple[list[list[bytes]], Send]:
    """As many lanes as our forwarder has connections."""
    encoder = BodyEncoder(COLUMNS, "bench")
    bodies = [
        encoder.body(readings[start : start + CALL_ROWS])
        for start in range(0, len(readings), CALL_ROWS)
    ]
    project, dataset, name = table.split(".")
    path = f"/bigquery/v2/projects/{project}/datasets/{dataset}/tables/{name}/insertAll"

    def send(lane: list[bytes]) -> None:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        for body in lane:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK or b"insertErrors" in answer.read():
                raise SystemExit(f"refused with {answer.status}")
        connection.close()

    return [bodies[lane::PARALLEL_REQUESTS] for lane in range(PARALLEL_REQUESTS)], send


def main(kind: str, address: str, target: str, count: int) -> None:
    """Send, and print the seconds from the first request to the last answer."""
    prepare = {"pubsub": _pubsub, "bigquery": _bigquery}[kind]
    lanes, send = prepare(address, target, list(rows(count)))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(send, lanes))
    seconds = time.perf_counter() - begun
    sys.stdout.write(f"done {seconds:.6f} {time.process_time() - cpu_begun:.6f}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
