"""Whatever arrives is a reading or a rejection, and no text of it acts on anything on its way."""

import csv
import io
import json
import os
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.harness import COLLECTOR, Packet, Rig, assert_adds_up, wait_until
from tests.harness.cloud import TABLE_REF, TOPIC_PATH
from tests.torture.fuzz import fuzz_packets, fuzz_validation

INPUTS = int(os.environ.get("SLUICE_FUZZ_INPUTS", "20000"))
SEED = int(os.environ.get("SLUICE_TORTURE_SEED", "1"))
LONGEST_PAYLOAD_BYTES = 64 * 1024

# What a terminal may act upon: C0 (but for the line feeds between rows), DEL and C1.
ACTS_ON_A_TERMINAL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
MODES = ("-list", "-csv", "-json", "-box", "-column", "-line")

HARMLESS = {
    "sql": "'; DROP TABLE reading_row; --",
    "sql in quotes": "\"; DELETE FROM reading_row WHERE ''='",
    "shell": "$(reboot)`reboot`;reboot|reboot&&reboot",
    "a format": "%s%n%x{0}{0.__class__}%(name)s",
    "a path": "..\\..\\etc\\passwd",
    "a formula": "=cmd|' /C calc'!A0",
    "csv": '"a","b";c\td'.replace("\t", " "),
    "html": "<script>alert(1)</script>&amp;",
    "json": '{"a": [1, 2}',
    "overrides": "abc\u202egnp.exe\u202c\u2066x\u2069",
    "zero width": "a\u200bb\u200dc\ufeff",
    "separators of lines": "a\u2028b\u2029c",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈🔥",
    "combining": "e\u0301\u0327" + "\u0336" * 50,
    "outside the plane": "\U0001d54a\U0001d55a\U0010ffff",
    "not a character": "\ufffe\uffff",
    "replacement": "\ufffd",
    "spaces": "   ",
    "other spaces": "\u00a0\u2003\u3000",
    "a number": "1e999",
    "null": "null",
    "topics": "$SYS",
    "twenty thousand": "x" * 20_000,
    "long in bytes": "\U0001f525" * 255,
    "too long in bytes": "\U0001f525" * 300,
}
"""Texts that are lawful: as site_code and sensor_id all of them, as levels of a topic those
without slash, plus and hash. They arrive as they are."""

HARMFUL = {
    "a colour": "\x1b[31mred\x1b[0m",
    "clear screen": "\x1b[2J\x1b[H",
    "a title": "\x1b]0;owned\x07",
    "an answer back": '\x1b[6n\x1bP$q"p\x1b\\',
    "C1": "\x9b31m\x9d0;owned\x9c",
    "NUL": "a\x00b",
    "a line": "a\nb",
    "a carriage return": "good\rbad",
    "a backspace": "good\b\b\b\bbad",
    "DEL": "a\x7fb",
    "a tab": "a\tb",
    "next line": "a\x85b",
}
"""Texts that must never be shown as they are; they are a reason to reject."""


def payload(site: str, sensor: str, number: int, **more: object) -> bytes:
    """Return the payload of a reading whose value tells it from others."""
    fields: dict[str, Any] = {
        "site_code": site,
        "sensor_id": sensor,
        "timestamp": "2026-11-24T05:00:00Z",
        "value": number,
    }
    return json.dumps({**fields, **more}, ensure_ascii=False).encode()


def topic(site: str = "FAE1", tag: str = "PT-1") -> bytes:
    """Return a topic of five levels."""
    return f"FCTS/FAE/{site}/SolvExtract/{tag}".encode()


def as_level(text: str) -> str:
    """Return the text as one level of a topic.

    MQTT gives three characters a meaning, and Mosquitto refuses what Unicode calls no characters.
    """
    return re.sub("[/+#\ufffe\uffff\U0010ffff]", "_", text)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A whole system, to which all hostile texts were sent, and which has delivered them."""
    with Rig(MQTT_TOPIC="FCTS/#") as rig:
        rig.start()
        packets = []
        for number, text in enumerate(HARMLESS.values(), 1):
            level = as_level(text)
            if len(level.encode()) > 1_000:
                level = "FAE1"
            packets.append(Packet(topic(level, level), payload(text, text, number, note=text)))
        for number, text in enumerate(HARMFUL.values(), 1_001):
            packets.append(Packet(topic(), payload(text, "PT", number)))
            packets.append(Packet(topic(), payload("FAE1", text, number)))
            packets.append(Packet(topic(), text.encode()))
            # In a field that nobody needs it is kept, as it came.
            packets.append(Packet(topic(), payload("FAE1", "PT", number, note=text)))
            packets.append(Packet(topic(), payload("FAE1", "PT", number + 0, **{text: 1})))
            raw = payload("FAE1", "PT", number).replace(b'"PT"', b'"P' + text.encode() + b'"')
            packets.append(Packet(topic(), raw))
        packets.append(Packet(topic(), b"x" * LONGEST_PAYLOAD_BYTES))
        packets.append(Packet(topic(), payload("x" * LONGEST_PAYLOAD_BYTES, "PT", 5_000)))
        # Mosquitto refuses control characters in topics: through it such a topic never comes.
        rig.publisher.publish(packets)
        wait_until(lambda: rig.books.counter("received") == len(packets), 30.0, "all are received")
        rig.wait_until_delivered()
        yield rig


def test_harmless_texts_are_delivered_as_they_are(rig: Rig) -> None:
    assert_adds_up(rig.books, rig.sinks)
    rows = {int(float(str(r["value"]))): r for r in rig.cloud.bigquery.rows(TABLE_REF)}
    events = {}
    for message in rig.cloud.pubsub.messages(TOPIC_PATH):
        event = json.loads(message.data)
        events[int(event["value"])] = (event, message)
    for number, (name, text) in enumerate(HARMLESS.items(), 1):
        row = rows[number]
        assert (row["site_code"], row["sensor_id"]) == (text, text), name
        assert json.loads(str(row["payload"]))["note"] == text, name
        if len(text.encode()) > 1_024:
            assert number not in events, "no ordering key can hold it"
            continue
        event, message = events[number]
        assert (event["site_code"], event["sensor_id"]) == (text, text), name
        assert event["kpi_name"] == event["source_topic"].split("/")[4], name
        assert message.ordering_key == message.attributes["site_code"] == text, name


def test_what_no_ordering_key_can_hold_is_a_dead_letter_and_no_other(rig: Rig) -> None:
    dead = rig.books.rows("pubsub", "SELECT reason, site_code FROM dead_letter ORDER BY seq")
    too_long = [text for text in HARMLESS.values() if len(text.encode()) > 1_024]
    assert dead == [("limit", text) for text in (*too_long, "x" * LONGEST_PAYLOAD_BYTES)]
    assert rig.books.rows("bigquery", "SELECT seq FROM dead_letter") == []


def test_harmful_texts_in_names_are_rejected_and_elsewhere_kept(rig: Rig) -> None:
    reasons = rig.books.rows("spool", "SELECT reason, count(*) FROM rejected_row GROUP BY reason")
    counts = dict(reasons)
    # Twice each as a name; raw and unescaped where JSON allows it (DEL, C1) once more.
    assert counts["control_character"] >= 2 * len(HARMFUL)
    assert set(counts) == {"control_character", "not_json"}
    names = rig.books.rows("spool", "SELECT site_code, sensor_id, pi_tag, topic FROM reading_row")
    for row in names:
        assert not any(ACTS_ON_A_TERMINAL.search(str(text)) for text in row)
    kept = {p for (p,) in rig.books.rows("spool", "SELECT payload FROM reading_row")}
    for number, text in enumerate(HARMFUL.values(), 1_001):
        assert payload("FAE1", "PT", number, note=text) in kept


def shown(rig: Rig, name: str, statement: str, mode: str) -> str:
    """Return what the operator's terminal gets to see."""
    path = str(rig.spool_dir / f"{name}.db")
    command = ["sqlite3", "-readonly", mode, path, statement]
    result = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return result.stdout.decode(errors="surrogateescape")


VIEWS = {
    "spool": ("readings", "rejected", "rejected_summary", "backlog", "counters"),
    "pubsub": ("dead_letters", "now", "counters"),
    "bigquery": ("dead_letters", "now", "counters", "appends"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "view"), [(n, v) for n, views in VIEWS.items() for v in views])
def test_nothing_in_a_view_acts_on_the_terminal(rig: Rig, name: str, view: str, mode: str) -> None:
    text = shown(rig, name, f"select * from {view}", mode)  # noqa: S608 - our own names
    if mode == "-csv":
        text = text.replace("\r\n", "\n")  # how its lines end (RFC 4180)
    found = ACTS_ON_A_TERMINAL.search(text)
    assert found is None, f"{found[0]!r} in {text[max(0, found.start() - 60) : found.end() + 60]!r}"


def test_every_row_of_the_readings_is_one_line(rig: Rig) -> None:
    rows = rig.books.rows("spool", "SELECT count(*) FROM reading_row")[0][0]
    listed = shown(rig, "spool", "select * from readings", "-list")
    assert listed.count("\n") == rows
    table = list(csv.reader(io.StringIO(shown(rig, "spool", "select * from readings", "-csv"))))
    assert len(table) == rows


def test_no_log_line_holds_what_acts_on_a_terminal(rig: Rig) -> None:
    for program in rig.programs.values():
        assert not ACTS_ON_A_TERMINAL.search(program.log_text), program.name
        for line in program.log_text.splitlines():
            json.loads(line)
    assert rig.programs[COLLECTOR].running


def test_a_services_words_do_not_act_on_the_terminal(rig: Rig) -> None:
    words = "\x1b[2J\x07 bad\r\nx\x9b"  # as a captive portal's page may have them
    rig.cloud.pubsub.faults.abort(grpc.StatusCode.UNAVAILABLE, words, times=None)
    rig.cloud.refuse_bigquery(503, words, grpc.StatusCode.UNAVAILABLE)
    try:
        rig.publish(10)
        for sink in rig.sinks:
            wait_until(
                lambda sink=sink: rig.books.backlog(sink)["state"] == "retrying",  # type: ignore[misc]
                30.0,
                f"{sink} retries",
            )
        for name, view in (("spool", "backlog"), ("pubsub", "now"), ("bigquery", "now")):
            text = shown(rig, name, f"select * from {view}", "-list")  # noqa: S608 - our own names
            assert not ACTS_ON_A_TERMINAL.search(text), view
    finally:
        rig.cloud.pubsub.faults.clear()
        rig.cloud.mend_bigquery()


def test_no_stream_of_bytes_confuses_the_packet_reader() -> None:
    size = fuzz_packets(INPUTS, SEED)
    assert size > 20 * INPUTS


def test_no_message_is_anything_but_a_reading_or_a_rejection() -> None:
    readings = fuzz_validation(2 * INPUTS, SEED)
    # Enough of both, or the fuzzer would say little.
    assert INPUTS / 10 < readings < INPUTS


if INPUTS > 100_000:
    pytestmark = pytest.mark.timeout(0)
