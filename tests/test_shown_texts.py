"""What the views hand to a terminal: printable characters, whatever bytes a message had."""

import itertools
import json
import random
import sqlite3
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spool import DeadLetter, Settlement, SinkState, SpoolWriter
from spool.connection import keep_temporary_in_memory
from spool.shown import WALKED_MAX_BYTES, WALKED_MAX_EXTRA_BYTES, with_shown_texts
from tests.test_spool_writer import new_reading, rejection

C1 = range(0x80, 0xA0)
LINES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
READ_AS_OTHERS = {"\ufffe", "\uffff"}
"""SQLite reads these as U+FFFD."""

EDGES = bytes.fromhex("001b0a417f80859b9fa0bfc0c2c3e0e2edeff0f4f8ff")
"""Where the rules of UTF-8 change, and what a terminal obeys."""

BAD = [
    *(bytes([0xC2, c]) for c in C1),
    *(bytes([c]) for c in (*range(32), *range(127, 160))),
    *(bytes([0xE0, 0x82, c]) for c in C1),
    *(bytes([0xF0, 0x80, 0x82, c]) for c in C1),
    *(b"\xc2" + bytes([c, 0x80]) for c in C1),
    *(b"\xe2\x82" + bytes([c]) + b"[2J" for c in C1),
    *(bytes([0xC3, c]) for c in C1),
    *(chr(c).encode() for c in (0x2028, 0x2029, 0x61C, *range(0x200B, 0x2010))),
    *(chr(c).encode() for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
    b"\xed\xa0\x80\xed\xb0\x80",
    b"\x1b[2J\xc2",
    b"\xf4\x90\x80\x80",
    b"\0\x1b[2J",
]
AROUND = [b"%s", b"a%s", b"%sb", b"a%sb", b"\xc2%s", b"%s\xc2", b"%s\x80", b'{"a": "\xc2\xb0%s"}']
PAYLOADS = [around.replace(b"%s", bad) for bad in BAD for around in AROUND]


def reference(raw: bytes) -> str:
    """Return what should be shown, by Python's own decoder, which is strict."""
    in_hex = f"X'{raw.hex().upper()}'"
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return in_hex
    too_long = len(raw) > WALKED_MAX_BYTES or len(raw) - len(text) > WALKED_MAX_EXTRA_BYTES
    if too_long and not raw.isascii():
        return in_hex
    for line, shown in LINES.items():
        text = text.replace(line, shown)
    if any(c < " " or "\x7f" <= c <= "\x9f" or c in READ_AS_OTHERS for c in text):
        return in_hex
    return "".join(json.dumps(c)[1:-1] if any(b in C1 for b in c.encode()) else c for c in text)


@pytest.fixture(scope="module")
def conn() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        keep_temporary_in_memory(opened)
        opened.execute("CREATE TABLE t (payload BLOB)")
        opened.execute(with_shown_texts("CREATE VIEW v AS SELECT shown(payload) AS text FROM t"))
        yield opened


def shown(conn: sqlite3.Connection, payloads: Iterable[bytes]) -> list[bytes]:
    conn.execute("DELETE FROM t")
    conn.execute("BEGIN")
    conn.executemany("INSERT INTO t VALUES (?)", ((p,) for p in payloads))
    conn.execute("COMMIT")
    conn.text_factory = bytes
    return [row[0] for row in conn.execute("SELECT text FROM v ORDER BY rowid")]


def assert_as_the_reference(conn: sqlite3.Connection, payloads: list[bytes]) -> None:
    for raw, text in zip(payloads, shown(conn, payloads), strict=True):
        assert text == reference(raw).encode(), raw
        assert not any(b < 32 or 127 <= b < 160 for b in text), raw


def test_all_pairs_of_bytes_are_shown_as_a_strict_decoder_would(conn: sqlite3.Connection) -> None:
    assert_as_the_reference(
        conn, [b"a%c%cb" % pair for pair in itertools.product(range(256), repeat=2)]
    )


def test_all_triples_of_edges_are_shown_as_a_strict_decoder_would(
    conn: sqlite3.Connection,
) -> None:
    assert_as_the_reference(conn, [bytes(t) for t in itertools.product(EDGES, repeat=3)])


def test_longer_sequences_are_shown_as_a_strict_decoder_would(conn: sqlite3.Connection) -> None:
    draw = random.Random(7)  # noqa: S311 - no secret
    assert_as_the_reference(
        conn, [bytes(draw.choices(EDGES, k=draw.randint(4, 9))) for _ in range(10_000)]
    )
    assert_as_the_reference(conn, PAYLOADS)


def test_every_character_of_unicode_is_shown_as_it_should_be(conn: sqlite3.Connection) -> None:
    points = (c for c in range(1, 0x110000, 7) if not 0xD800 <= c < 0xE000)
    assert_as_the_reference(conn, [chr(c).encode() for c in points])


@given(st.one_of(st.text(), st.binary(), st.lists(st.sampled_from(BAD)).map(b"".join)))
@example("é" * WALKED_MAX_EXTRA_BYTES)
@example("é" * (WALKED_MAX_EXTRA_BYTES + 1))
@example("a" * (WALKED_MAX_BYTES - 2) + "é")
@example("a" * (WALKED_MAX_BYTES - 1) + "é")
@example("a" * 100_000)
def test_any_text_is_shown_as_the_reference_says(
    conn: sqlite3.Connection, given_text: str | bytes
) -> None:
    raw = given_text.encode() if isinstance(given_text, str) else given_text
    assert_as_the_reference(conn, [raw])


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40) | st.floats(allow_nan=False)))
def test_json_stays_the_json_that_it_was(conn: sqlite3.Connection, value: object) -> None:
    raw = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    (text,) = shown(conn, [raw])
    if not text.startswith(b"X'"):
        assert json.loads(text) == json.loads(raw)


def fill(directory: Path) -> None:
    """Fill a spool and a sink's file with everything that a terminal might obey."""
    texts = [p.decode("utf-8", "replace") for p in PAYLOADS]
    writer = SpoolWriter.open(directory)
    writer.append(
        [new_reading(n, payload=payload) for n, payload in enumerate(PAYLOADS)],
        [rejection(p, topic=t) for p, t in zip(PAYLOADS, texts, strict=True)],
        {},
    )
    writer.close()
    state = SinkState.open(directory, "pubsub")
    dead = [
        DeadLetter((n, b"i" * 16, 0, 0, text, text, text, 1.0, text, payload, 0), "refused", text)
        for n, (payload, text) in enumerate(zip(PAYLOADS, texts, strict=True), 1)
    ]
    state.settle(Settlement("e", len(dead), dead=dead))
    state.close()
    # Invalid bytes in texts, as a damaged row may have them.
    for name, table, columns in (
        ("spool", "reading_row", ("site_code", "sensor_id", "pi_tag", "topic")),
        ("spool", "rejected_row", ("topic", "detail")),
        ("pubsub", "dead_letter", ("site_code", "sensor_id", "pi_tag", "topic", "detail")),
    ):
        with closing(sqlite3.connect(directory / f"{name}.db")) as conn, conn:
            for column in columns:
                conn.execute(
                    f"UPDATE {table} SET {column} = CAST(payload AS TEXT) "  # noqa: S608 - names of ours
                    "WHERE payload NOT IN (x'', x'00')"
                )


@pytest.mark.parametrize("mode", ["-list", "-json", "-line", "-csv", "-column"])
@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("spool", "readings"),
        ("spool", "rejected"),
        ("spool", "rejected_summary"),
        ("pubsub", "dead_letters"),
    ],
)
def test_the_shell_prints_no_byte_that_a_terminal_obeys(
    tmp_path_factory: pytest.TempPathFactory, mode: str, name: str, view: str
) -> None:
    directory = filled(tmp_path_factory)
    printed = subprocess.run(
        ["sqlite3", "-readonly", mode, directory / f"{name}.db", f"select * from {view}"],  # noqa: S608
        capture_output=True,
        check=True,
        cwd="/",
    ).stdout
    assert len(printed) > len(PAYLOADS) or view == "rejected_summary"
    printed.decode()  # a terminal in UTF-8 mode
    lines = printed.replace(b"\r\n", b"\n") if mode == "-csv" else printed
    obeyed = {b for b in lines if b < 32 or 127 <= b < 160} - {0x0A}
    assert not obeyed
    if mode == "-json":
        assert json.loads(printed)


_filled: list[Path] = []


def filled(factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the files; they are made once."""
    if not _filled:
        _filled.append(factory.mktemp("shown"))
        fill(_filled[0])
    return _filled[0]
