"""A spool with readings in it, as the collector would have written them, made quickly."""

import time
from collections.abc import Iterator
from pathlib import Path

from bench.publish import SITES, TAGS, reading, reading_us, reading_value
from spool import NewReading, Reading, SpoolWriter, claim_environment, event_id, row_crc

BATCH_ROWS = 5_000
APP_ENV = "DEV"


def new_reading(number: int, received_us: int) -> NewReading:
    """Return reading ``number`` of :func:`bench.publish.reading` as the collector stores it."""
    topic, payload = reading(number)
    tag = number % TAGS
    site = tag % SITES
    text = topic.decode()
    names = (f"SITE{site}", f"SX{site}-PIT-{tag:04d}", f"SX{site}_PIT_{tag:04d}")
    identity = event_id(topic, payload)
    timestamp_us, value = reading_us(number), reading_value(number)
    crc = row_crc(identity, (received_us, timestamp_us, value), "".join((*names, text)), payload)
    return (identity, received_us, timestamp_us, *names, value, text, payload, crc)


def rows(count: int) -> Iterator[Reading]:
    """Yield the first ``count`` readings as a forwarder reads them from a filled spool."""
    received_us = time.time_ns() // 1000
    for number in range(count):
        yield (number + 1, *new_reading(number, received_us))


def fill(directory: Path, count: int, *, age_s: float = 0.0, app_env: str = APP_ENV) -> None:
    """Make a spool with ``count`` readings, or add to one until it has so many.

    Args:
        directory: SPOOL_DIR.
        count: Rows that the spool shall have had; reading ``n`` has seq ``n + 1``.
        age_s: How long ago they were received.
        app_env: Under which APP_ENV.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o750)
    writer = SpoolWriter.open(directory)
    try:
        claim_environment(writer, app_env, [])
        received_us = time.time_ns() // 1000 - int(age_s * 1e6)
        for start in range(writer.last_seq(), count, BATCH_ROWS):
            part = [
                new_reading(n, received_us) for n in range(start, min(start + BATCH_ROWS, count))
            ]
            writer.append(part, (), {"received": len(part), "spooled": len(part)})
        writer.checkpoint()
    finally:
        writer.close()
