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


json_bytes = msgspec.json.Encoder().encode
"""Encodes a value as the events' JSON has it: compact, UTF-8."""


@lru_cache(maxsize=64)
def second(seconds: int) -> bytes:
    """Return a time as in :func:`rfc3339`, but only up to its seconds.

    Args:
        seconds: Since 1970 UTC; from year 1 to 9999.
    """
    # Neighbouring readings share their second, and formatting one costs ten times a look-up.
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19].encode()


def rfc3339(microseconds: int) -> str:
    """Return a time as RFC 3339 in UTC with microseconds.

    Args:
        microseconds: Since 1970 UTC; from year 1 to 9999.
    """
    seconds, fraction = divmod(microseconds, 1_000_000)
    return (b"%b.%06dZ" % (second(seconds), fraction)).decode()


def kpi_event(row: Reading) -> bytes:
    """Return the reading as compact UTF-8 JSON."""
    _, event_id, received_us, timestamp_us, site, sensor, tag, value, topic, _, _ = row
    return json_bytes(
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


def event_template(site: str, sensor: str, tag: str, topic: str) -> bytes:
    """Return the event of a tag with places for what differs from one reading to the next.

    Filled in with ``%``, by the event id in hexadecimal, the timestamp's second and its
    microseconds, the value and received_at, it is what :func:`kpi_event` returns, byte by byte.
    """
    site_text, tag_text, sensor_text, topic_text = (
        json_bytes(name).replace(b"%", b"%%") for name in (site, tag, sensor, topic)
    )
    return (
        b'{"event_id":"%%b","site_code":%b,"kpi_name":%b,"sensor_id":%b,'
        b'"timestamp":"%%b.%%06dZ","value":%%b,"source_topic":%b,"received_at":"%%b",'
        b'"schema_version":%d}' % (site_text, tag_text, sensor_text, topic_text, SCHEMA_VERSION)
    )
