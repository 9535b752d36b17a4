"""What operators read: the views of spool.db are right, and safe on a terminal."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spool import SpoolWriter
from tests.test_spool_writer import look, new_reading, progress, rejection


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[SpoolWriter]:
    opened = SpoolWriter.open(tmp_path)
    yield opened
    opened.close()


def test_the_backlog_is_right_with_no_rows_some_rows_and_an_emptied_table(
    writer: SpoolWriter,
) -> None:
    sql = "SELECT pending, oldest_received_at, lag_s FROM backlog WHERE sink='pubsub'"
    assert look(writer.path, sql) == []
    writer.write_progress([progress(0, writer.epoch)])
    assert look(writer.path, sql) == [(0, None, 0.0)]
    now_us = time.time_ns() // 1000
    writer.append(
        [new_reading(n, received_us=now_us - 100_000_000) for n in range(10)],
        [],
        {},
        [progress(4, writer.epoch)],
    )
    ((pending, _, lag_s),) = look(writer.path, sql)
    assert pending == 6
    assert 99 < float(str(lag_s)) < 130
    writer.delete_through(7, "dropped")
    assert look(writer.path, sql)[0][0] == 3
    writer.delete_through(10, "dropped")
    assert look(writer.path, sql) == [(0, None, 0.0)]


def test_the_backlog_counts_a_cursor_of_another_epoch_as_none(writer: SpoolWriter) -> None:
    writer.append([new_reading(n) for n in range(3)], [], {}, [progress(3, "another")])
    assert look(writer.path, "SELECT pending FROM backlog") == [(3,)]


def test_a_disabled_or_forgotten_sink_leaves_the_backlog(writer: SpoolWriter) -> None:
    writer.append([new_reading(1)], [], {})
    writer.write_progress(
        [progress(0, writer.epoch), progress(0, writer.epoch, "bigquery", enabled=False)]
    )
    assert look(writer.path, "SELECT sink FROM backlog") == [("pubsub",)]
    writer.write_progress([progress(0, writer.epoch, "bigquery")])
    assert look(writer.path, "SELECT sink FROM backlog") == [("bigquery",)]


@pytest.mark.parametrize(
    ("timestamp_us", "shown"),
    [
        (-1, "1969-12-31T23:59:59.999999Z"),
        (-1_000_000, "1969-12-31T23:59:59.000000Z"),
        (0, "1970-01-01T00:00:00.000000Z"),
        (-62_135_596_800_000_000, "0001-01-01T00:00:00.000000Z"),
        (253_402_300_799_999_999, "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_readings_show_every_time_of_the_calendar(
    writer: SpoolWriter, timestamp_us: int, shown: str
) -> None:
    writer.append([new_reading(1, timestamp_us=timestamp_us)], [], {})
    assert look(writer.path, "SELECT timestamp FROM readings") == [(shown,)]


CONTROL = [chr(c) for c in (*range(32), *range(127, 160))]


def test_no_view_hands_a_control_character_to_the_terminal(writer: SpoolWriter) -> None:
    payloads = [f"a{c}b".encode() for c in CONTROL] + [b"\x9b2J", b"\xff\xfe", b"\0\x1b[2J"]
    writer.append(
        [new_reading(n, payload=payload) for n, payload in enumerate(payloads)],
        [rejection(payload, topic=payload.decode("latin-1")) for payload in payloads],
        {},
    )
    for view in ("readings", "rejected", "rejected_summary"):
        for row in look(writer.path, f"SELECT * FROM {view}"):  # noqa: S608 - a name of ours
            for value in row:
                assert not any(c in str(value) for c in CONTROL), (view, row)


def test_views_show_harmless_text_as_it_is(writer: SpoolWriter) -> None:
    text = '{"t": "21 °C, 中, ü"}'
    writer.append([new_reading(1, payload=text.encode())], [rejection(text.encode())], {})
    assert look(writer.path, "SELECT payload FROM readings") == [(text,)]
    assert look(writer.path, "SELECT payload FROM rejected") == [(text,)]
