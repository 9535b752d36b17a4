"""The reference of the drain to BigQuery: a plain loop of ``insert_rows_json``.

``python -m bench.insert_rows_loop URL TABLE COUNT`` inserts the first COUNT readings, 500 a
call, with the columns and insert ids that our forwarder writes. It has the readings in memory;
ours reads them from the disk and checks them.
"""

import sys
import time

from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

from bench.fill import rows
from forwarder.event import rfc3339
from spool import Reading

CALL_ROWS = 500
TIMEOUT_S = 60.0


def _row(reading: Reading) -> dict[str, object]:
    seq, identity, received_us, timestamp_us, site, sensor, tag, value, topic, payload, _ = reading
    return {
        "event_id": identity.hex(),
        "site_code": site,
        "sensor_id": sensor,
        "pi_tag": tag,
        "timestamp": rfc3339(timestamp_us),
        "value": value,
        "topic": topic,
        "payload": payload.decode(),
        "received_at": rfc3339(received_us),
        "source": "bench",
        "seq": seq,
    }


def main(url: str, table: str, count: int) -> None:
    """Insert, and print the seconds from the client's making to the last answer."""
    readings = list(rows(count))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    begun, cpu_begun = time.perf_counter(), time.process_time()
    client = bigquery.Client(
        project=table.partition(".")[0],
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
        client_options={"api_endpoint": url},
    )
    for start in range(0, count, CALL_ROWS):
        part = readings[start : start + CALL_ROWS]
        errors = client.insert_rows_json(
            table,
            [_row(reading) for reading in part],
            row_ids=[reading[1].hex() for reading in part],
            timeout=TIMEOUT_S,
        )
        if errors:
            raise SystemExit(f"refused: {errors[:3]}")
    seconds = time.perf_counter() - begun
    sys.stdout.write(f"done {seconds:.6f} {time.process_time() - cpu_begun:.6f}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
