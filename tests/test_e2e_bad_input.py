"""Whatever arrives has its documented outcome, and the next good reading is spooled."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from collector.validation import Reason
from tests.harness import COLLECTOR, Packet, Rig, assert_adds_up, wait_until

TIMEOUT_S = 20.0
MAX_PAYLOAD_BYTES = 256 * 1024
HUGE_BYTES = 20 * 1024 * 1024
MEMORY_SLACK_KIB = 6 * 1024
"""Room for buffers of one read; far below the 20 MB of the message."""

TOPIC = "FCTS/FAE/FAE1/SolvExtract/PT-101"
SPOOLED = "spooled"
GOOD: dict[str, object] = {
    "site_code": "FAE1",
    "sensor_id": "PT/1",
    "timestamp": "2026-11-24T05:00:00Z",
    "value": 3.25,
}


def changed(**fields: object) -> bytes:
    """Return a good payload with other fields; None takes one away."""
    merged = {**GOOD, **fields}
    return json.dumps({k: v for k, v in merged.items() if v is not None}).encode()


def with_value(literal: bytes) -> bytes:
    """Return a good payload with ``literal`` in the place of the value."""
    return changed(value=0).replace(b'"value": 0', b'"value": ' + literal)


def with_note(literal: bytes) -> bytes:
    """Return a good payload with ``literal`` as the value of an unknown field."""
    return changed(note="N").replace(b'"N"', literal)


def sized(size: int) -> bytes:
    """Return a good payload of exactly ``size`` bytes."""
    bare = len(changed(note=""))
    payload = changed(note="x" * (size - bare))
    assert len(payload) == size
    return payload


@dataclass(frozen=True)
class Case:
    """One message and what has to become of it: SPOOLED, or a rejection's reason."""

    name: str
    outcome: str
    payload: bytes
    topic: str = TOPIC
    qos: int = 1
    retain: bool = False

    def __str__(self) -> str:
        """Return the test's name."""
        return self.name


DEEP = b"[" * 100_000
CASES = (
    # --- topics
    Case("a level too few", Reason.TOPIC_SHAPE, changed(), "FCTS/FAE/FAE1/SolvExtract"),
    Case("a level too many", Reason.TOPIC_SHAPE, changed(), f"{TOPIC}/x"),
    Case("another third level", Reason.TOPIC_SHAPE, changed(), "FCTS/FAE/FAE1/Other/PT-101"),
    Case("an empty site", Reason.TOPIC_SHAPE, changed(), "FCTS/FAE//SolvExtract/PT-101"),
    Case("an empty tag", Reason.TOPIC_SHAPE, changed(), "FCTS/FAE/FAE1/SolvExtract/"),
    Case("a site that is not the topic's", SPOOLED, changed(site_code="FAE2")),
    # --- not JSON
    Case("an empty payload", Reason.EMPTY_PAYLOAD, b""),
    Case("words", Reason.NOT_JSON, b"on fire"),
    Case("half an object", Reason.NOT_JSON, changed()[:-1]),
    Case("text behind the object", Reason.NOT_JSON, changed() + b" x"),
    Case("two objects", Reason.NOT_JSON, changed() * 2),
    Case("a NUL alone", Reason.NOT_JSON, b"\0"),
    Case("a NUL behind the object", Reason.NOT_JSON, changed() + b"\0"),
    Case("NaN", Reason.NOT_JSON, with_value(b"NaN")),
    Case("Infinity", Reason.NOT_JSON, with_value(b"-Infinity")),
    Case("100,000 brackets", Reason.NOT_OBJECT, DEEP),
    Case("100,000 brackets as the value", Reason.BAD_VALUE, with_value(DEEP)),
    Case("100,000 brackets in an unknown field", Reason.TOO_DEEP, with_note(DEEP)),
    Case(
        "100,000 closed brackets in an unknown field",
        Reason.TOO_DEEP,
        with_note(DEEP + b"]" * 100_000),
    ),
    # --- encodings
    Case(
        "invalid UTF-8 in a field", Reason.NOT_UTF8, changed(sensor_id="N").replace(b"N", b"\xff")
    ),
    Case("invalid UTF-8 in an unknown field", Reason.NOT_UTF8, with_note(b'"\xc3\x28"')),
    Case("a surrogate in UTF-8", Reason.NOT_UTF8, with_note(b'"\xed\xa0\x80"')),
    Case("a lone surrogate, escaped", Reason.NOT_JSON, changed(sensor_id="\ud800")),
    Case("a NUL in a field, escaped", Reason.CONTROL_CHARACTER, changed(sensor_id="a\0b")),
    Case("a NUL in an unknown field, escaped", SPOOLED, changed(note="a\0b")),
    Case("a byte order mark", Reason.NOT_JSON, b"\xef\xbb\xbf" + changed()),
    # --- shapes
    Case("a list", Reason.NOT_OBJECT, b"[1]"),
    Case("a number", Reason.NOT_OBJECT, b"1"),
    Case("null", Reason.NOT_OBJECT, b"null"),
    Case("no site_code", Reason.MISSING_FIELD, changed(site_code=None)),
    Case("no value", Reason.MISSING_FIELD, changed(value=None)),
    Case("an empty site_code", Reason.BAD_FIELD, changed(site_code="")),
    Case("sensor_id is a number", Reason.BAD_FIELD, changed(sensor_id=7)),
    Case("value is a boolean", Reason.BAD_VALUE, changed(value=True)),
    Case("value is a text", Reason.BAD_VALUE, changed(value="3.25")),
    Case("1e999", Reason.BAD_VALUE, with_value(b"1e999")),
    Case(
        "a timestamp without an offset",
        Reason.BAD_TIMESTAMP,
        changed(timestamp="2026-11-24T05:00:00"),
    ),
    Case("a timestamp that is a number", Reason.BAD_TIMESTAMP, changed(timestamp=1795500000)),
    Case(
        "a day that does not exist", Reason.BAD_TIMESTAMP, changed(timestamp="2026-02-30T05:00:00Z")
    ),
    Case("duplicate keys", SPOOLED, changed()[:-1] + b', "value": 4.5}'),
    # --- sizes
    Case("256 KiB", SPOOLED, sized(MAX_PAYLOAD_BYTES)),
    Case("256 KiB + 1", Reason.TOO_LARGE, sized(MAX_PAYLOAD_BYTES + 1)),
    # --- ways of sending
    Case("QoS 0", SPOOLED, changed(value=0.5), qos=0),
    Case("QoS 2", SPOOLED, changed(value=2.5), qos=2),
    Case("retained", SPOOLED, changed(value=7.5), retain=True),
    Case("retained and empty", Reason.EMPTY_PAYLOAD, b"", retain=True),
)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A collector that is sent everything below FCTS, and a broker that stops nothing."""
    with Rig(APP_ENV="LOCAL", MQTT_TOPIC="FCTS/#", broker_options={"max_packet_size": None}) as rig:
        rig.start(COLLECTOR)
        yield rig


def send(rig: Rig, *packets: Packet) -> None:
    """Publish ``packets`` and a good reading; wait until that one is spooled."""
    (good,) = rig.plant.samples(1)
    # One after the other: with QoS 2 the broker passes a message on later than one of QoS 1.
    rig.publisher.publish(packets, TIMEOUT_S)
    rig.publisher.publish([good.packet()], TIMEOUT_S)
    wait_until(
        lambda: (good.payload,) in rows_after(rig, "reading_row", "seq", 0, "payload"),
        TIMEOUT_S,
        "the next good reading is spooled",
    )


def rows_after(rig: Rig, table: str, key: str, after: int, columns: str) -> list[tuple[Any, ...]]:
    """Return those columns of the rows whose key is above ``after``."""
    return rig.books.rows("spool", f"SELECT {columns} FROM {table} WHERE {key} > {after}")  # noqa: S608 - our own names


def as_operator_after(rig: Rig, view: str, key: str, after: int) -> list[dict[str, Any]]:
    """Return what an operator sees of the rows whose key is above ``after``."""
    return rig.books.as_operator(f"select * from {view} where {key} > {after}")  # noqa: S608 - the same


def last(rig: Rig, table: str, key: str) -> int:
    """Return the highest key; 0 if there is none."""
    return max((row[0] for row in rows_after(rig, table, key, 0, key)), default=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_message_has_its_documented_outcome(rig: Rig, case: Case) -> None:
    seq = last(rig, "reading_row", "seq")
    rejected = last(rig, "rejected_row", "id")
    pid = rig.programs[COLLECTOR].pid
    send(rig, Packet(case.topic.encode(), case.payload, case.qos, case.retain))
    new = as_operator_after(rig, "readings", "seq", seq)
    refused = as_operator_after(rig, "rejected", "id", rejected)
    if case.outcome == SPOOLED:
        assert refused == []
        assert len(new) == 2, "it and the good reading behind it"
        assert new[0]["payload"].encode() == case.payload
        assert new[0]["topic"] == case.topic
    else:
        assert [row["reason"] for row in refused] == [case.outcome]
        assert len(new) == 1, "only the good reading behind it"
        assert refused[0]["payload_bytes"] == len(case.payload)
        assert refused[0]["detail"]
        summary = rig.books.as_operator("select reason, count from rejected_summary")
        assert case.outcome in {row["reason"] for row in summary}
    assert rig.programs[COLLECTOR].running
    assert rig.programs[COLLECTOR].pid == pid
    assert_adds_up(rig.books, ())


def test_the_last_of_duplicate_keys_counts(rig: Rig) -> None:
    send(rig, Packet(TOPIC.encode(), changed(value=1)[:-1] + b', "value": 99.25}'))
    assert rig.books.rows("spool", "SELECT 1 FROM reading_row WHERE value = 99.25")


def test_the_same_message_again_is_spooled_once_and_counted(rig: Rig) -> None:
    before = rig.books.figures()
    send(rig, *[Packet(TOPIC.encode(), changed(value=12.5))] * 5)
    after = assert_adds_up(rig.books, ())
    assert after.duplicates - before.duplicates == 4
    assert after.spooled - before.spooled == 2


def test_qos_0_and_retained_messages_are_counted(rig: Rig) -> None:
    before = rig.books.counter("qos0")
    send(rig, Packet(TOPIC.encode(), changed(value=0.125), qos=0))
    assert rig.books.counter("qos0") == before + 1


def test_a_retained_message_comes_once_and_not_again_after_a_restart(rig: Rig) -> None:
    topic = TOPIC.replace("FAE1", "FAE9").encode()
    send(rig, Packet(topic, changed(value=77.5), retain=True))
    before = rig.books.figures()
    assert rig.programs[COLLECTOR].stop()[0] == 0
    rig.start(COLLECTOR)
    send(rig)
    after = assert_adds_up(rig.books, ())
    assert after.received == before.received + 1, "the good reading, and nothing retained"
    rig.publisher.publish([Packet(topic, b"", retain=True)])


def test_a_message_of_20_mb_is_rejected_without_being_kept_in_memory(rig: Rig) -> None:
    collector = rig.programs[COLLECTOR]
    send(rig, Packet(TOPIC.encode(), sized(MAX_PAYLOAD_BYTES)[:-2] + b'1"}'))
    before_kib = collector.memory_kib("VmHWM")
    rejected = last(rig, "rejected_row", "id")
    payload = changed(note="x" * HUGE_BYTES)
    send(rig, Packet(TOPIC.encode(), payload))
    columns = "reason, payload_bytes, length(payload)"
    assert rows_after(rig, "rejected_row", "id", rejected, columns) == [
        (Reason.TOO_LARGE, len(payload), 64 * 1024)
    ]
    assert collector.memory_kib("VmHWM") - before_kib < MEMORY_SLACK_KIB


def test_a_flood_of_garbage_is_counted_and_told_in_a_few_lines(rig: Rig) -> None:
    count = 2_000
    before = rig.books.counter("rejected")
    lines = rig.programs[COLLECTOR].log_text.count("\n")
    send(rig, *[Packet(TOPIC.encode(), b"garbage %d" % n) for n in range(count)])
    assert rig.books.counter("rejected") == before + count
    assert rig.programs[COLLECTOR].log_text.count("\n") - lines < 5
    assert_adds_up(rig.books, ())
