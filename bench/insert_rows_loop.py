"""The reference of the drain to BigQuery: a plain loop of ``insert_rows_json``.

``python -m bench.insert_rows_loop URL TABLE COUNT`` inserts the rows that our forwarder makes
of the first COUNT readings, 500 a call. They are made beforehand, in the reference's favour.
"""

import sys
import time

from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

from bench.fill import rows
from forwarder.table import COLUMNS

CALL_ROWS = 500
TIMEOUT_S = 60.0


def main(url: str, table: str, count: int) -> None:
    """Insert, and print the seconds from the client's making to the last answer."""
    prepared = [({c.name: c.value(r, "bench") for c in COLUMNS}, r[1].hex()) for r in rows(count)]
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
        part = prepared[start : start + CALL_ROWS]
        errors = client.insert_rows_json(
            table, [row for row, _ in part], row_ids=[i for _, i in part], timeout=TIMEOUT_S
        )
        if errors:
            raise SystemExit(f"refused: {errors[:3]}")
    seconds = time.perf_counter() - begun
    sys.stdout.write(f"done {seconds:.6f} {time.process_time() - cpu_begun:.6f}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
