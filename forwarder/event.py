"""A reading as the KPI event that Pub/Sub's subscribers and the logs get.

``docs/kpi-event.schema.json`` is its JSON Schema.
"""

from datetime import UTC, datetime, timedelta
from functools import lru_cache

import msgspec

from spool import Reading

SCHEMA_VERSION = 1

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class KpiEvent(msgspec.Struct):
    """The event's fields, in the order in which they are written."""

    event_id: str
    site_code: str
    kpi_name: str
    sensor_id: str
    timestamp: str
    value: float
    source_topic: str
    received_at: str
    schema_version: int = SCHEMA_VERSION


_encode = msgspec.json.Encoder().encode


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    # Neighbouring readings share their second, and formatting one costs ten times a look-up.
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19]


def rfc3339(microseconds: int) -> str:
    """Return a time as RFC 3339 in UTC with microseconds.

    Args:
        microseconds: Since 1970 UTC; from year 1 to 9999.
    """
    seconds, fraction = divmod(microseconds, 1_000_000)
    return f"{_second(seconds)}.{fraction:06d}Z"


def kpi_event(row: Reading) -> bytes:
    """Return the reading as compact UTF-8 JSON."""
    _, event_id, received_us, timestamp_us, site, sensor, tag, value, topic, _, _ = row
    return _encode(
        KpiEvent(
            event_id.hex(),
            site,
            tag,
            sensor,
            rfc3339(timestamp_us),
            value,
            topic,
            rfc3339(received_us),
        )
    )
