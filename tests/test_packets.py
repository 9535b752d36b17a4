"""The stream is cut into packets rightly, wherever TCP cut it, whatever it holds."""

import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.packets import (
    KEPT_OF_OVERSIZED_BYTES,
    TOPIC_MAX_BYTES,
    Message,
    Packet,
    PacketReader,
)

LIMIT = 1000
"""MAX_PAYLOAD_BYTES of these tests."""


def length(number: int) -> bytes:
    """Encode a remaining length (3.1.1, section 2.2.3)."""
    encoded = bytearray()
    while True:
        number, digit = divmod(number, 128)
        encoded.append(digit | (0x80 if number else 0))
        if not number:
            return bytes(encoded)


def publish(message: Message, *, dup: bool = False) -> bytes:
    flags = message.qos << 1 | message.retained | dup << 3
    mid = struct.pack("!H", message.mid) if message.qos else b""
    body = struct.pack("!H", len(message.topic)) + message.topic + mid + message.payload
    return bytes([0x30 | flags]) + length(len(body)) + body


def other(packet: Packet) -> bytes:
    return bytes([packet.command]) + length(len(packet.body)) + packet.body


def message(payload: bytes = b"p", topic: bytes = b"t", qos: int = 1, mid: int = 7) -> Message:
    return Message(topic, payload, qos, retained=False, mid=mid if qos else 0, size=len(payload))


def feed(reader: PacketReader, *pieces: bytes) -> tuple[list[Message], list[Packet]]:
    messages: list[Message] = []
    others: list[Packet] = []
    for piece in pieces:
        more, rest = reader.feed(piece)
        messages += more
        others += rest
    return messages, others


messages = st.builds(
    lambda topic, payload, qos, retained, mid: Message(
        topic, payload, qos, retained, mid if qos else 0, len(payload)
    ),
    st.binary(max_size=200),
    st.one_of(st.binary(max_size=20), st.integers(100, LIMIT).map(bytes)),
    st.integers(0, 2),
    st.booleans(),
    st.integers(1, 65535),
)
others = st.builds(
    Packet,
    st.sampled_from([0x20, 0x40, 0x50, 0x62, 0x70, 0x90, 0xB0, 0xC0, 0xD0, 0xE0, 0x00, 0xF0]),
    st.one_of(st.binary(max_size=8), st.integers(120, 140).map(bytes)),
)
streams = st.lists(st.one_of(messages, others), max_size=12)


@settings(max_examples=200)
@given(stream=streams, cuts=st.lists(st.integers(0, 5000), max_size=30), dup=st.booleans())
def test_any_split_of_a_stream_gives_the_same_packets(
    stream: list[Message | Packet],
    cuts: list[int],
    dup: bool,  # noqa: FBT001 - drawn by hypothesis
) -> None:
    data = b"".join(publish(p, dup=dup) if isinstance(p, Message) else other(p) for p in stream)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[a:b] for a, b in pairwise(edges)]
    reader = PacketReader(LIMIT)
    got = feed(reader, *pieces)
    assert got[0] == [p for p in stream if isinstance(p, Message)]
    assert got[1] == [p for p in stream if isinstance(p, Packet)]
    assert reader.malformed == ""


@settings(max_examples=60)
@given(stream=streams)
def test_one_byte_at_a_time_gives_the_same_packets(stream: list[Message | Packet]) -> None:
    data = b"".join(publish(p) if isinstance(p, Message) else other(p) for p in stream)
    got = feed(PacketReader(LIMIT), *(data[i : i + 1] for i in range(len(data))))
    assert got[0] == [p for p in stream if isinstance(p, Message)]
    assert got[1] == [p for p in stream if isinstance(p, Packet)]


@settings(max_examples=500)
@given(pieces=st.lists(st.binary(max_size=60), max_size=8))
def test_arbitrary_bytes_never_raise(pieces: list[bytes]) -> None:
    reader = PacketReader(LIMIT)
    for piece in pieces:
        if reader.malformed:
            break
        for got in reader.feed(piece)[0]:
            assert got.size >= len(got.payload)


@settings(max_examples=100)
@given(
    pieces=st.lists(
        st.one_of(st.binary(max_size=4), st.integers(0, 200_000).map(lambda n: b"\x32" * n)),
        max_size=8,
    )
)
def test_what_is_buffered_is_bounded_whatever_comes(pieces: list[bytes]) -> None:
    reader = PacketReader(LIMIT)
    bound = LIMIT + TOPIC_MAX_BYTES + 8 + KEPT_OF_OVERSIZED_BYTES
    for piece in pieces:
        reader.feed(piece)
        if reader.malformed:
            break
        held = sum(map(len, reader._pieces))  # noqa: SLF001 - what it holds is the claim
        assert held <= bound + len(piece)


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 1, 119, 120, 121, 122, 16_376, 16_377, 16_383, 2_097_152])
def test_lengths_of_one_to_four_bytes_and_every_qos_are_read(size: int, qos: int) -> None:
    sent = message(bytes(size), qos=qos)._replace(retained=True)
    reader = PacketReader(4_000_000)
    got, _ = feed(reader, publish(sent)[:3], publish(sent)[3:], publish(message(b"next")))
    assert got == [sent, message(b"next")]


_lengths = st.one_of(st.integers(0, 400).map(length), st.binary(min_size=1, max_size=4))
_topic_lengths = st.one_of(
    st.integers(0, 400).map(lambda n: struct.pack("!H", n)), st.binary(max_size=2)
)


@given(_lengths, _topic_lengths, st.binary(max_size=12), st.integers(0, 400), st.binary(max_size=9))
def test_the_usual_packet_is_read_like_any_other(
    announced: bytes, topic_length: bytes, body: bytes, padding: int, behind: bytes
) -> None:
    usual, sent_before = PacketReader(1_000), PacketReader(1_000)
    rest = announced + topic_length + body + b"x" * padding + behind
    assert usual.feed(b"\x32" + rest) == sent_before.feed(b"\x3a" + rest)
    assert usual.malformed == sent_before.malformed


def test_an_empty_payload_and_an_empty_topic_are_handed_on() -> None:
    sent = [message(b""), message(b"", b"", qos=0), message(b"x", b"")]
    assert feed(PacketReader(LIMIT), *map(publish, sent))[0] == sent


@pytest.mark.parametrize("payload", [LIMIT + 1, 200_000, 300_000])
@pytest.mark.parametrize("piece", [1000, 65_536, 10**9])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_an_oversized_payload_is_cut_and_the_stream_goes_on_behind(
    payload: int, piece: int, qos: int
) -> None:
    sent = message(b"x" * payload, b"topic", qos)
    data = publish(message(b"before")) + publish(sent) + publish(message(b"behind"))
    pieces = [data[i : i + piece] for i in range(0, len(data), piece)]
    reader = PacketReader(LIMIT)
    before, cut, behind = feed(reader, *pieces)[0]
    assert (before, behind) == (message(b"before"), message(b"behind"))
    assert cut.size == payload
    assert cut.payload == sent.payload[: len(cut.payload)]
    assert min(payload, KEPT_OF_OVERSIZED_BYTES) <= len(cut.payload) <= LIMIT + 2 * 65_536 + piece
    assert cut[:1] + cut[2:5] == sent[:1] + sent[2:5]


def test_the_largest_packet_of_all_costs_little_memory() -> None:
    size = 268_435_455 - 2 - 1 - 2
    head = publish(message(b""))[:1] + length(268_435_455) + b"\x00\x01t\x00\x07"
    reader = PacketReader(LIMIT)
    reader.feed(head)
    chunk = bytes(1024 * 1024)
    got: list[Message] = []
    left = size
    tracemalloc.start()
    while left:
        piece = chunk[:left]
        got += reader.feed(piece)[0]
        left -= len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(chunk)
    assert [(m.size, len(m.payload)) for m in got] == [(size, KEPT_OF_OVERSIZED_BYTES)]
    assert feed(reader, publish(message(b"behind")))[0] == [message(b"behind")]


def test_many_small_pieces_of_a_large_packet_are_not_joined_each_time() -> None:
    sent = message(bytes(3_000_000))
    data = publish(sent)
    reader = PacketReader(4_000_000)
    pieces = [data[i : i + 100] for i in range(0, len(data), 100)]
    assert feed(reader, *pieces)[0] == [sent]


MALFORMED = {
    "QoS 3": (b"\x36\x05\x00\x01t\x00\x07", "QoS 3"),
    "identifier 0": (b"\x32\x05\x00\x01t\x00\x00", "identifier 0"),
    "a length of five bytes": (b"\x30\xff\xff\xff\xff\x01", "four bytes"),
    "no room for the topic's length": (b"\x30\x01\x00", "shorter"),
    "an empty PUBLISH": (b"\x30\x00", "shorter"),
    "a topic that is longer than the packet": (b"\x30\x03\x00\x09t", "shorter"),
    "no room for the identifier": (b"\x32\x03\x00\x01t", "shorter"),
    "half an identifier": (b"\x32\x04\x00\x01t\x00", "shorter"),
    "a SUBACK of 200 MB": (b"\x90\xff\xff\xff\x7f", "type 9"),
    "an oversized PUBLISH with QoS 3": (
        b"\x36" + length(500_000) + bytes(TOPIC_MAX_BYTES + 4 + KEPT_OF_OVERSIZED_BYTES),
        "QoS 3",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_named_and_what_stood_before_it_is_kept(name: str) -> None:
    data, reason = MALFORMED[name]
    for pieces in ([publish(message()) + data], [publish(message())] + [bytes([b]) for b in data]):
        reader = PacketReader(LIMIT)
        assert feed(reader, *pieces)[0] == [message()]
        assert reason in reader.malformed


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_header_that_is_not_all_there_yet_is_waited_for(cut: int) -> None:
    data = publish(message(bytes(200)))
    reader = PacketReader(LIMIT)
    assert reader.feed(data[:cut]) == ([], [])
    assert reader.malformed == ""
    assert reader.feed(data[cut:])[0] == [message(bytes(200))]
