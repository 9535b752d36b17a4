"""Every message becomes a reading or a rejection with its reason, and never an exception."""

import gc
import json
import math
import re
import sqlite3
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import collector.validation
from collector.packets import Message
from collector.validation import Reason, Validator
from spool import NewReading, Rejection, SpoolWriter, event_id, intact

TOPIC = b"FCTS/FAE/S1/SolvExtract/TI-101.PV"
NOW_US = 1_700_000_000_000_000
GOOD = b'{"site_code":"S1","sensor_id":"PT-1","timestamp":"2024-01-01T00:00:00Z","value":1.5}'


def check(
    payload: bytes,
    topic: bytes = TOPIC,
    validator: Validator | None = None,
    size: int | None = None,
) -> tuple[NewReading | None, Rejection | None]:
    length = len(payload) if size is None else size
    message = Message(topic, payload, qos=1, retained=False, mid=7, size=length)
    identity = event_id(topic, payload)
    return (validator or Validator()).check(message, identity, NOW_US)[:2]


def reason_for(
    payload: bytes,
    topic: bytes = TOPIC,
    validator: Validator | None = None,
    size: int | None = None,
) -> str:
    """Return the code, or an empty text for a reading."""
    reading, rejection = check(payload, topic, validator, size)
    assert (reading is None) != (rejection is None)
    if rejection is None:
        return ""
    assert rejection[2], "a rejection has a sentence"
    return rejection[1]


def made(**changed: object) -> bytes:
    fields = {
        "site_code": "S1",
        "sensor_id": "PT-1",
        "timestamp": "2024-01-01T00:00:00Z",
        "value": 1.5,
    }
    return json.dumps({k: v for k, v in (fields | changed).items() if v is not ...}).encode()


def raw(name: bytes, value: bytes) -> bytes:
    """Return the good payload with the raw JSON text of one field replaced."""
    return re.sub(rb'("%s":)[^,}]*' % name, lambda m: m[1] + value, GOOD)


def test_a_good_message_becomes_a_row_with_all_its_columns() -> None:
    reading, _ = check(GOOD)
    assert reading is not None
    assert reading[:9] == (
        event_id(TOPIC, GOOD),
        NOW_US,
        1_704_067_200_000_000,
        "S1",
        "PT-1",
        "TI-101.PV",
        1.5,
        TOPIC.decode(),
        GOOD,
    )
    assert intact((1, *reading))


DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE = {
    "empty": (b"", Reason.EMPTY_PAYLOAD),
    "blank": (b" \n", Reason.NOT_JSON),
    "nul": (b"\0", Reason.NOT_JSON),
    "text": (b"21.5", Reason.NOT_OBJECT),
    "null": (b"null", Reason.NOT_OBJECT),
    "string": (b'"x"', Reason.NOT_OBJECT),
    "array": (b"[]", Reason.NOT_OBJECT),
    "array of readings": (b"[" + GOOD + b"]", Reason.NOT_OBJECT),
    "empty object": (b"{}", Reason.MISSING_FIELD),
    "cut off": (GOOD[:-1], Reason.NOT_JSON),
    "two objects": (GOOD + GOOD, Reason.NOT_JSON),
    "trailing nul": (GOOD + b"\0", Reason.NOT_JSON),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, Reason.NOT_JSON),
    "utf-16": (GOOD.decode().encode("utf-16"), Reason.NOT_UTF8),
    "latin-1": (raw(b"sensor_id", b'"\xe9"'), Reason.NOT_UTF8),
    "latin-1 in an unknown field": (GOOD[:-1] + b',"x":"\xe9"}', Reason.NOT_UTF8),
    "an encoded surrogate": (raw(b"sensor_id", b'"\xed\xa0\x80"'), Reason.NOT_UTF8),
    "an overlong encoding": (raw(b"sensor_id", b'"\xc0\xaf"'), Reason.NOT_UTF8),
    "a lone surrogate": (raw(b"sensor_id", rb'"\ud800"'), Reason.NOT_JSON),
    "swapped surrogates": (raw(b"sensor_id", rb'"\udc00\ud800"'), Reason.NOT_JSON),
    "NaN": (raw(b"value", b"NaN"), Reason.NOT_JSON),
    "Infinity": (raw(b"value", b"-Infinity"), Reason.NOT_JSON),
    "1e999": (raw(b"value", b"1e999"), Reason.BAD_VALUE),
    "-1e999": (raw(b"value", b"-1e999"), Reason.BAD_VALUE),
    "400 digits": (raw(b"value", b"1" * 400), Reason.BAD_VALUE),
    "5,000 digits": (raw(b"value", b"1" * 5_000), Reason.BAD_VALUE),
    "value true": (raw(b"value", b"true"), Reason.BAD_VALUE),
    "value null": (raw(b"value", b"null"), Reason.BAD_VALUE),
    "value text": (raw(b"value", b'"1.5"'), Reason.BAD_VALUE),
    "value object": (raw(b"value", b"{}"), Reason.BAD_VALUE),
    "value with a leading zero": (raw(b"value", b"01"), Reason.NOT_JSON),
    "value with a plus": (raw(b"value", b"+1"), Reason.NOT_JSON),
    "value in hex": (raw(b"value", b"0x10"), Reason.NOT_JSON),
    "a last duplicate that is wrong": (GOOD[:-1] + b',"value":"x"}', Reason.BAD_VALUE),
    "site number": (raw(b"site_code", b"7"), Reason.BAD_FIELD),
    "site null": (raw(b"site_code", b"null"), Reason.BAD_FIELD),
    "site empty": (raw(b"site_code", b'""'), Reason.BAD_FIELD),
    "sensor empty": (raw(b"sensor_id", b'""'), Reason.BAD_FIELD),
    "sensor array": (raw(b"sensor_id", b"[]"), Reason.BAD_FIELD),
    "timestamp number": (raw(b"timestamp", b"1704067200"), Reason.BAD_TIMESTAMP),
    "timestamp null": (raw(b"timestamp", b"null"), Reason.BAD_TIMESTAMP),
    "sensor with a nul": (raw(b"sensor_id", rb'"a\u0000b"'), Reason.CONTROL_CHARACTER),
    "sensor with an escape": (raw(b"sensor_id", rb'"\u001b[2J"'), Reason.CONTROL_CHARACTER),
    "site with a C1": (raw(b"site_code", '"\x9b2J"'.encode()), Reason.CONTROL_CHARACTER),
    "a raw escape within a string": (GOOD[:-1] + b',"x":"\x1b"}', Reason.NOT_JSON),
    "an array 100,000 deep": (GOOD[:-1] + b',"x":' + DEEP + b"}", Reason.TOO_DEEP),
    "an object 20,000 deep": (b'{"x":' * 20_000 + b"1" + b"}" * 20_000, Reason.TOO_DEEP),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_have_their_reason(name: str) -> None:
    payload, reason = HOSTILE[name]
    assert reason_for(payload) == reason


@pytest.mark.parametrize(
    "payload",
    [
        GOOD[:-1] + b',"more":{"a":[1,null,true]},"x":1e999}',
        GOOD[:-1] + b',"value":2.5}',
        b" \r\n\t" + GOOD + b"\n",
        raw(b"value", b"-0.0"),
        raw(b"value", b"1E+2"),
        raw(b"value", b"9007199254740993"),
        raw(b"value", b"1e-400"),
        raw(b"sensor_id", '"\u202e 中 😀"'.encode()),
        raw(b"sensor_id", rb'"\ud83d\ude00"'),
        GOOD[:-1] + b'  ,"x":"\x7f"}',
    ],
)
def test_unusual_but_lawful_payloads_are_readings(payload: bytes) -> None:
    assert reason_for(payload) == ""


@pytest.mark.parametrize("field", ["site_code", "sensor_id", "timestamp", "value"])
def test_each_missing_field_is_named(field: str) -> None:
    _, rejection = check(made(**{field: ...}))
    assert rejection is not None
    assert rejection[1] == Reason.MISSING_FIELD
    assert field in rejection[2]


TOPICS: dict[bytes | str, str] = {
    b"": Reason.TOPIC_SHAPE,
    b"FCTS/FAE/S1/SolvExtract": Reason.TOPIC_SHAPE,
    TOPIC + b"/more": Reason.TOPIC_SHAPE,
    TOPIC + b"/": Reason.TOPIC_SHAPE,
    b"/" + TOPIC: Reason.TOPIC_SHAPE,
    b"FCTS/FAE//SolvExtract/T": Reason.TOPIC_SHAPE,
    b"FCTS/FAE/S1/SolvExtract/": Reason.TOPIC_SHAPE,
    b"fcts/FAE/S1/SolvExtract/T": Reason.TOPIC_SHAPE,
    b"FCTS/FAE/S1/solvextract/T": Reason.TOPIC_SHAPE,
    b"FCTS/FAE/S1/SolvExtract/\xff": Reason.TOPIC_NOT_UTF8,
    b"FCTS/FAE/S\x1b1/SolvExtract/T": Reason.CONTROL_CHARACTER,
    b"FCTS/FAE/S1/SolvExtract/T\x00": Reason.CONTROL_CHARACTER,
    "FCTS/FAE/S1/SolvExtract/\x9b".encode(): Reason.CONTROL_CHARACTER,
    "FCTS/FAE/é中/SolvExtract/T 1": "",
}


@pytest.mark.parametrize("topic", TOPICS)
def test_topics_have_five_parts_as_agreed(topic: bytes | str) -> None:
    encoded = topic.encode() if isinstance(topic, str) else topic
    assert reason_for(GOOD, encoded) == TOPICS[topic]


def test_a_payload_above_the_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    exact = Validator(max_payload_bytes=len(GOOD))
    assert reason_for(GOOD, validator=exact) == ""
    assert reason_for(GOOD + b" ", validator=exact) == Reason.TOO_LARGE
    _, rejection = check(GOOD, size=268_435_455)
    assert rejection is not None
    assert (rejection[1], rejection[5]) == (Reason.TOO_LARGE, 268_435_455)


def test_a_rejection_keeps_no_more_than_its_share_of_the_disk() -> None:
    site = b"s" * 60_000
    reject = Validator(reject_site_mismatch=True)
    cases = [
        check(b"x" * 200_000),
        check(GOOD, b"a/" + site),
        check(GOOD, b"\xff" * 65_535),
        check(made(site_code="x" * 100_000), validator=reject),
        check(made(timestamp="x" * 100_000)),
        check(GOOD, b"FCTS/FAE/%s/SolvExtract/T" % site, validator=reject),
    ]
    for reading, rejection in cases:
        assert reading is None
        assert rejection is not None
        assert len(rejection[4]) <= 64 * 1024
        assert len(rejection[2]) <= 1000
        assert len(rejection[3]) <= 1000


def test_a_flood_of_topics_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector.validation, "TOPIC_CACHE_ENTRIES", 10)
    validator = Validator()
    for n in range(100):
        assert reason_for(GOOD, TOPIC + b"%d" % n, validator) == ""
        assert reason_for(GOOD, TOPIC + b"x" * 5000 + b"%d" % n, validator) == ""
    topics = validator._topics  # noqa: SLF001 - the bound of this very table is the claim
    assert len(topics) <= 10
    assert sum(map(len, topics)) < 10 * 600


@pytest.mark.parametrize(
    ("payload", "topic", "size"),
    [
        (made(timestamp="yesterday"), TOPIC, None),
        (made(sensor_id=""), TOPIC, None),
        (GOOD, b"elsewhere", None),
        (GOOD, b"\xff", None),
        (GOOD, TOPIC, 10**9),
        (b"", TOPIC, None),
        (b"\xff", TOPIC, None),
        (b"{", TOPIC, None),
        (b"{}", TOPIC, None),
        (b"[" * 100_000, TOPIC, None),
    ],
    ids=range(10),
)
def test_a_refused_message_is_let_go_of_at_once(
    payload: bytes, topic: bytes, size: int | None
) -> None:
    assert reason_for(payload, topic, size=size)
    gc.collect()
    gc.disable()
    try:
        reason_for(payload, topic, size=size)
        assert gc.collect() == 0, "what refers to itself stays until somebody looks for it"
    finally:
        gc.enable()


def test_a_sites_mismatch_is_taken_or_refused_as_set() -> None:
    payload = made(site_code="S2")
    reading, _ = check(payload)
    assert reading is not None
    assert (reading[3], reading[7]) == ("S2", TOPIC.decode())
    for text, differs in ((payload, True), (GOOD, False), (b"{}", False)):
        message = Message(TOPIC, text, qos=1, retained=False, mid=7, size=len(text))
        assert Validator().check(message, event_id(TOPIC, text), NOW_US)[2] is differs
    assert (
        reason_for(payload, validator=Validator(reject_site_mismatch=True)) == Reason.SITE_MISMATCH
    )
    assert reason_for(GOOD, validator=Validator(reject_site_mismatch=True)) == ""


def test_every_sentence_of_the_decoder_has_its_own_code() -> None:
    """Hold the decoder's sentences to the codes, for they are all there is to go by."""
    sentences = {
        payload: reason
        for payload, reason in HOSTILE.values()
        if reason in {Reason.BAD_FIELD, Reason.BAD_VALUE, Reason.BAD_TIMESTAMP, Reason.NOT_OBJECT}
    }
    seen = set()
    shape = collector.validation._Payload  # noqa: SLF001 - the very type that is decoded
    for payload, reason in sentences.items():
        if reason_for(payload) != reason or b'""' in payload:
            continue  # refused by a check of ours, not by the decoder
        with pytest.raises(msgspec.ValidationError) as caught:
            msgspec.json.decode(payload, type=shape)
        sentence = str(caught.value)
        assert collector.validation._reason_of(sentence) == reason, sentence  # noqa: SLF001
        seen.add(reason)
    assert len(seen) == 4


FORMATS = [("rfc3339",), ("naive",), ("epoch",), ("rfc3339", "naive", "epoch_ms")]

values = st.one_of(
    st.floats(),
    st.integers(),
    st.text(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(), max_size=2),
)
objects = st.fixed_dictionaries(
    {},
    optional={
        "site_code": st.one_of(st.just("S1"), values),
        "sensor_id": st.one_of(st.just("PT-1"), values),
        "timestamp": st.one_of(st.just("2024-01-01T00:00:00Z"), values),
        "value": values,
        "more": values,
    },
)
payloads = st.one_of(
    st.binary(max_size=200),
    objects.map(lambda o: json.dumps(o).encode()),
    objects.map(lambda o: json.dumps(o, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=4)).map(
        lambda cut: GOOD[: cut[0]] + cut[1] + GOOD[cut[0] + len(cut[1]) :]
    ),
)
topics = st.one_of(
    st.just(TOPIC),
    st.binary(max_size=80),
    st.text(min_size=1).map(lambda t: f"FCTS/FAE/{t}/SolvExtract/T".encode("utf-8", "ignore")),
)


@settings(max_examples=400)
@given(payload=payloads, topic=topics, formats=st.sampled_from(FORMATS))
def test_any_bytes_become_a_reading_or_a_rejection_that_can_be_stored(
    payload: bytes, topic: bytes, formats: tuple[str, ...]
) -> None:
    validator = Validator(formats, reject_site_mismatch=len(payload) % 2 == 0)
    reading, rejection = check(payload, topic, validator)
    if reading is not None:
        assert rejection is None
        assert math.isfinite(reading[6])
        assert all(reading[3:6])
        assert reading[8].decode()
        assert intact((1, *reading))
    else:
        assert rejection is not None
    row = reading or rejection
    assert row is not None
    conn = sqlite3.connect(":memory:")
    marks = ",".join("?" * len(row))
    stored = conn.execute(f"SELECT {marks}", row).fetchone()
    assert stored == row
    conn.close()
    for text in row:
        if isinstance(text, str):
            assert text.encode().decode() == text


def test_every_outcome_of_the_hostile_table_can_be_spooled(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    outcomes = [check(payload) for payload, _ in HOSTILE.values()]
    outcomes += [check(GOOD, t.encode() if isinstance(t, str) else t) for t in TOPICS]
    writer.append([r for r, _ in outcomes if r], [j for _, j in outcomes if j], {})
    writer.close()


def test_deep_nesting_is_refused_within_a_small_stack_too() -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(300)
    try:
        assert reason_for(GOOD[:-1] + b',"x":' + DEEP + b"}") == Reason.TOO_DEEP
    finally:
        sys.setrecursionlimit(before)
