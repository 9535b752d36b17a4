"""A row and its checksum: damage in any column is seen, and stops nobody."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spool import Reading, SpoolWriter, event_id, intact, presentable, row_crc, spool_path
from tests.test_spool_writer import edit, new_reading, read_all


@pytest.mark.parametrize("value", [-0.0, 0.0, 5.0, 2.0**63, -(2.0**47), 5e-324, 1.7e308])
def test_a_value_comes_back_from_the_disk_with_its_checksum(tmp_path: Path, value: float) -> None:
    SpoolWriter.open(tmp_path).append([new_reading(1, value=value)], [], {})
    (row,) = read_all(tmp_path)
    assert row[7] == value
    assert intact(row)


DAMAGE = {
    "event_id": "zeroblob(16)",
    "received_us": "received_us + 1",
    "timestamp_us": "timestamp_us - 4096",
    "site_code": "'s1'",
    "sensor_id": "'PT-0'",
    "pi_tag": "'TI-101.QV'",
    "value": "value + 0.5",
    "topic": "topic || 'x'",
    "payload": "CAST('{\"n\":2}' AS BLOB)",
    "crc": "crc + 1",
}


@pytest.mark.parametrize("column", DAMAGE)
def test_a_change_in_any_column_is_seen(tmp_path: Path, column: str) -> None:
    SpoolWriter.open(tmp_path).append([new_reading(1), new_reading(7)], [], {})
    statement = f"UPDATE reading_row SET {column}={DAMAGE[column]} WHERE seq=1"  # noqa: S608
    edit(spool_path(tmp_path), statement)
    damaged, good = read_all(tmp_path)
    assert (intact(damaged), intact(good)) == (False, True)


@given(bit=st.integers(0, 8 * len(b'{"n":1}') - 1))
def test_any_flipped_bit_of_the_payload_is_seen(bit: int) -> None:
    row = new_reading(1)
    payload = bytearray(row[8])
    payload[bit // 8] ^= 1 << (bit % 8)
    assert intact((1, *row))
    assert not intact((1, *row[:8], bytes(payload), row[9]))


def test_a_text_that_is_no_longer_utf8_does_not_stop_the_reader(tmp_path: Path) -> None:
    SpoolWriter.open(tmp_path).append([new_reading(n) for n in range(5)], [], {})
    edit(spool_path(tmp_path), "UPDATE reading_row SET site_code=CAST(x'D331' AS TEXT) WHERE seq=3")
    rows = read_all(tmp_path)
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
    assert [intact(row) for row in rows] == [True, True, False, True, True]
    assert presentable(rows[2])[4].encode()


@given(
    st.tuples(
        *[
            st.one_of(
                st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(), st.binary()
            )
            for _ in range(10)
        ]
    )
)
def test_a_row_of_any_types_is_judged_and_made_presentable_without_an_error(
    columns: tuple[object, ...],
) -> None:
    row: Reading = (1, *columns)  # type: ignore[assignment]
    assert not intact(row)
    kinds = (int, bytes, int, int, str, str, str, float, str, bytes, int)
    assert [type(value) for value in presentable(row)] == list(kinds)
    assert all(-(2**63) <= value < 2**63 for value in presentable(row) if type(value) is int)


def test_the_identity_of_a_message_depends_on_topic_and_payload_apart() -> None:
    assert event_id(b"ab", b"c") != event_id(b"a", b"bc")
    assert len(event_id(b"", b"")) == 16


def test_the_checksum_covers_numbers_bit_by_bit() -> None:
    one = row_crc(b"i", (1, 2, 1.0), "n", b"p")
    next_up = struct.unpack(
        "<d", struct.pack("<q", struct.unpack("<q", struct.pack("<d", 1.0))[0] + 1)
    )
    assert one != row_crc(b"i", (1, 2, next_up[0]), "n", b"p")
    assert one != row_crc(b"i", (1, 3, 1.0), "n", b"p")
