"""The reference of the drain to Pub/Sub: the official publisher, with ordering keys.

``python -m bench.official_publisher TOPIC COUNT`` (PUBSUB_EMULATOR_HOST says where) publishes
the first COUNT readings as the same messages as our forwarder's, with the same attributes. It
has the readings in memory; ours reads them from the disk and checks them.
"""

import sys
import time

from google.cloud import pubsub_v1  # type: ignore[attr-defined] # a namespace package

from bench.fill import rows
from forwarder.event import SCHEMA_VERSION, kpi_event
from spool import Reading

RESULT_TIMEOUT_S = 300.0

BATCH = pubsub_v1.types.BatchSettings(max_messages=1_000, max_bytes=9_000_000, max_latency=0.05)
"""As large as the service allows, like ours."""


def _attributes(reading: Reading) -> dict[str, str]:
    return {
        "event_id": reading[1].hex(),
        "site_code": reading[4],
        "kpi_name": reading[6],
        "source": "bench",
        "seq": str(reading[0]),
        "schema_version": str(SCHEMA_VERSION),
    }


def main(topic: str, count: int) -> None:
    """Publish, and print the seconds from the client's making to the last confirmation."""
    readings = list(rows(count))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    client = pubsub_v1.PublisherClient(
        batch_settings=BATCH,
        publisher_options=pubsub_v1.types.PublisherOptions(enable_message_ordering=True),
    )
    futures = [
        client.publish(topic, kpi_event(reading), ordering_key=reading[4], **_attributes(reading))
        for reading in readings
    ]
    for future in futures:
        future.result(RESULT_TIMEOUT_S)
    seconds = time.perf_counter() - begun
    sys.stdout.write(f"done {seconds:.6f} {time.process_time() - cpu_begun:.6f}\n")
    client.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
