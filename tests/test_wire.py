"""What forwarder/wire.py writes is what Google's own classes read."""

from google.protobuf.unknown_fields import UnknownFieldSet
from google.pubsub_v1.types import PublishRequest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.event import kpi_event
from forwarder.wire import MessageEncoder, varint
from spool import Reading

TOPIC = "projects/acme-edge/topics/kpi-events"
NAME = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300),
    # Few, so that rows share them; and what a template or JSON could trip over.
    st.sampled_from(["A", "%b", "100 %", "%%06d", '"', "\\", "ü", "\U0001f321", "\x7f", "</"]),
)
TIME_US = st.one_of(
    st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
    st.sampled_from([0, -1, 1_795_500_000_000_000, 1_795_500_000_000_001, 1_795_500_000_999_999]),
)
VALUE = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e15, 1e16, 1e17, 1e21, 1e22, 1e-4, 1e-5, 1e-7, 5e-324]),
    st.integers(-(2**53), 2**53),
)
ROWS = st.builds(
    lambda seq, identity, received_us, timestamp_us, site, sensor, tag, value, pad: (
        seq,
        identity,
        received_us,
        timestamp_us,
        site,
        sensor,
        tag,
        value,
        f"FCTS/FAE/{site}/SolvExtract/{tag}" + "x" * pad,
        b"{}",
        0,
    ),
    st.integers(1, 2**63 - 1),
    st.binary(min_size=16, max_size=16),
    TIME_US,
    TIME_US,
    NAME,
    NAME,
    NAME,
    VALUE,
    # Around the lengths at which a varint grows by a byte, of the data and of the message.
    st.one_of(
        st.integers(0, 130),
        st.integers(3_500, 4_100),
        st.integers(15_800, 16_400),
        st.just(2_097_000),
    ),
)
Parsed = PublishRequest.pb()


def parsed(request: bytes) -> list[tuple[bytes, dict[str, str], str]]:
    message = Parsed.FromString(request)
    assert message.topic == TOPIC
    assert len(UnknownFieldSet(message)) == 0
    # Written anew by Google's code it has the same size: nothing is there twice.
    assert message.ByteSize() == len(request)
    return [(m.data, dict(m.attributes), m.ordering_key) for m in message.messages]


@given(st.lists(ROWS, max_size=5), NAME)
def test_every_field_is_read_back_and_the_event_is_the_plain_encoder_s(
    rows: list[Reading], source: str
) -> None:
    encoder = MessageEncoder(TOPIC, source)
    assert parsed(encoder.request(rows)) == [
        (
            kpi_event(row),
            {
                "event_id": row[1].hex(),
                "site_code": row[4],
                "kpi_name": row[6],
                "source": source,
                "seq": str(row[0]),
                "schema_version": "1",
            },
            row[4],
        )
        for row in rows
    ]


def test_a_flood_of_tags_does_not_fill_the_memory() -> None:
    encoder = MessageEncoder(TOPIC, "s")
    one: Reading = (1, b"0" * 16, 0, 0, "A", "s", "T", 1.0, "t", b"", 0)
    kept = 0
    for n in range(60):
        encoder.request([(*one[:8], f"{n}{'x' * 200_000}", *one[9:])])
        templates = encoder._templates.values()  # noqa: SLF001 - the claim is about the inside
        kept = max(kept, sum(len(template) for template, _, _ in templates))
    assert 3 * 1024 * 1024 < kept <= 4 * 1024 * 1024
    ((_, attributes, _),) = parsed(encoder.request([one]))
    assert attributes["kpi_name"] == "T"


def test_varints_are_those_of_the_specification() -> None:
    assert varint(1) == b"\x01"
    assert varint(127) == b"\x7f"
    assert varint(150) == b"\x96\x01"
    assert varint(2**32) == b"\x80\x80\x80\x80\x10"


def test_each_row_has_its_own_values_in_the_message_of_its_tag() -> None:
    encoder = MessageEncoder(TOPIC, "s")
    rows: list[Reading] = [
        (n, bytes([n]) * 16, n // 2, n * 999_999, "A", "s", f"T{n % 2}", n / 8, "t", b"", 0)
        for n in range(1, 120)
    ]
    assert [data for data, _, _ in parsed(encoder.request(rows))] == [kpi_event(r) for r in rows]
    assert [a["seq"] for _, a, _ in parsed(encoder.request(rows))] == [str(r[0]) for r in rows]
