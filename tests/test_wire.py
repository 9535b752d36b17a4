"""What forwarder/wire.py writes is what Google's own classes read."""

from google.protobuf.unknown_fields import UnknownFieldSet
from google.pubsub_v1.types import PublishRequest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.event import kpi_event
from forwarder.wire import MessageEncoder, varint
from spool import Reading

TOPIC = "projects/acme-edge/topics/kpi-events"
NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)
ROWS = st.builds(
    lambda seq, identity, site, sensor, tag, value, pad: (
        seq,
        identity,
        1_795_500_000_000_001,
        -1,
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
    NAME,
    NAME,
    NAME,
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 100, 3_000, 4_000, 20_000, 200_000]),
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
def test_every_field_is_read_back(rows: list[Reading], source: str) -> None:
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
