"""The request that forwarder/insertbody.py writes is the one that the service documents."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.event import rfc3339
from forwarder.insertbody import encoder_for
from forwarder.table import COLUMNS
from spool import Reading

TIMES = list(enumerate([5, 5, 6, 5, 1_700_000_000_000_000, 1_700_000_000_000_000, 0]))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50)


def row(site: str, value: float, payload: str) -> Reading:
    """Return a row with what is hostile in JSON."""
    topic = f"FCTS/FAE/{site}/SolvExtract/T"
    return (7, b"\x01" * 16, 1_000_001, -1, site, "s", "T", value, topic, payload.encode(), 0)


@given(TEXT, st.floats(allow_nan=False, allow_infinity=False), TEXT, TEXT)
def test_the_service_reads_what_was_meant(
    site: str, value: float, payload: str, source: str
) -> None:
    body = json.loads(encoder_for(COLUMNS, source).body([row(site, value, payload)]))
    assert body == {
        "rows": [
            {
                "insertId": "01" * 16,
                "json": {
                    "event_id": "01" * 16,
                    "site_code": site,
                    "sensor_id": "s",
                    "pi_tag": "T",
                    "timestamp": "1969-12-31T23:59:59.999999Z",
                    "value": value,
                    "topic": f"FCTS/FAE/{site}/SolvExtract/T",
                    "payload": payload,
                    "received_at": "1970-01-01T00:00:01.000001Z",
                    "source": source,
                    "seq": 7,
                },
            }
        ]
    }


@pytest.mark.parametrize("left_out", [{"payload"}, {"topic", "payload", "source", "seq"}])
def test_only_the_columns_that_the_table_has_are_written(left_out: set[str]) -> None:
    columns = tuple(c for c in COLUMNS if c.name not in left_out)
    body = json.loads(encoder_for(columns, "s").body([row("A", 1.0, "{}")] * 2))
    for entry in body["rows"]:
        assert set(entry["json"]) == {c.name for c in columns}


def test_each_row_has_its_own_times() -> None:
    rows = [(n, b"\x01" * 16, at, at + 7, "A", "s", "T", 1.0, "t", b"{}", 0) for n, at in TIMES]
    body = json.loads(encoder_for(COLUMNS, "s").body(rows))
    written = [(e["json"]["received_at"], e["json"]["timestamp"]) for e in body["rows"]]
    assert written == [(rfc3339(at), rfc3339(at + 7)) for _, at in TIMES]
