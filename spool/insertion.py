"""Into the spool's tables: readings, which is the writer's hot path, and rejected messages."""

import sqlite3
from collections.abc import Sequence

from spool.records import LAST_SEQ, READING_COLUMNS, NewReading, Rejection

REJECTED_KEPT_ROWS = 10_000
REJECTED_KEPT_BYTES = 32 * 1024 * 1024
"""The ring of rejected messages: whichever limit is reached first drops the oldest. In a small
spool the second one is lower (:meth:`spool.space.Budget.rejected_bytes`)."""

REJECTED_PAYLOAD_BYTES = 64 * 1024
"""How much of a rejected payload is kept."""

_LARGEST_SHARE = 4
"""A rejected message may take one part in this many of the ring."""

_ROW_BYTES = 100
"""What a rejected message takes besides its texts: numbers, header, its share of a page's slack."""

_COST = (
    f"(length(payload) + length(CAST(topic AS BLOB)) + length(CAST(detail AS BLOB)) + {_ROW_BYTES})"
)
"""As :func:`cost_bytes`; also in schema/spool_2.sql."""

KEPT_BYTES = "rejected_kept_bytes"
"""The counter of what the ring holds."""


_INSERT_READING = f"INSERT INTO reading_row (seq, {READING_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)"  # noqa: S608 - our own constant
_TOGETHER = 50
"""Readings of one INSERT."""

_INSERT_TOGETHER = ",".join([_INSERT_READING, *["(?,?,?,?,?,?,?,?,?,?,?)"] * (_TOGETHER - 1)])
_INSERT_REJECTED = (
    "INSERT INTO rejected_row (received_us, reason, detail, topic, payload, payload_bytes, qos, "
    "retained) VALUES (?,?,?,?,?,?,?,?)"
)
_COUNT_REASON = (
    "INSERT INTO rejected_total (reason, count, first_us, last_us) VALUES (?1, 1, ?2, ?2) "
    "ON CONFLICT (reason) DO UPDATE SET count = count + 1, last_us = excluded.last_us"
)
SET_META = (
    "INSERT INTO meta (key, value) VALUES (?, ?) "
    "ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)
SET_COUNTER = (
    "INSERT INTO counter (name, value) VALUES (?, ?) "
    "ON CONFLICT (name) DO UPDATE SET value = excluded.value"
)
ADD_COUNTER = (
    "INSERT INTO counter (name, value) VALUES (?, ?) "
    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
)


def insert_readings(
    conn: sqlite3.Connection, readings: Sequence[NewReading], after_seq: int
) -> int:
    """Insert in the order given; return the last seq.

    A statement for each costs nearly twice as much: for each the module lets go of the
    interpreter's lock.

    Args:
        conn: Within a transaction.
        readings: At least one.
        after_seq: The highest seq ever given.
    """
    together = len(readings) - len(readings) % _TOGETHER
    for start in range(0, together, _TOGETHER):
        part = readings[start : start + _TOGETHER]
        conn.execute(_INSERT_TOGETHER, _parameters(part, after_seq + start))
    rest = enumerate(readings[together:], after_seq + together + 1)
    conn.executemany(_INSERT_READING, [(seq, *reading) for seq, reading in rest])
    last_seq = after_seq + len(readings)
    conn.execute(SET_COUNTER, (LAST_SEQ, last_seq))
    return last_seq


def _parameters(readings: Sequence[NewReading], after_seq: int) -> list[object]:
    """Return all columns of all ``readings`` in one list."""
    flat: list[object] = []
    seq = after_seq
    for identity, received, timestamp, site, sensor, tag, value, topic, payload, crc in readings:
        seq += 1
        # For bytes the module looks for an adapter, twice in vain and each time at 0.2 µs; for
        # a bytearray it does not (need_adapt() in CPython's cursor.c), and stores the same.
        names = (site, sensor, tag)
        flat += (
            seq,
            bytearray(identity),
            received,
            timestamp,
            *names,
            value,
            topic,
            bytearray(payload),
            crc,
        )
    return flat


def insert_rejections(
    conn: sqlite3.Connection, rejections: Sequence[Rejection], max_bytes: int
) -> int:
    """Insert into the ring and return how many rows it dropped, of the old and of the new ones.

    Args:
        conn: Within a transaction.
        rejections: In the order received.
        max_bytes: The ring's limit now, by :func:`cost_bytes`. One message may take a quarter of
            it; what is longer is cut, and payload_bytes shows that.
    """
    conn.executemany(_COUNT_REASON, [(r[1], r[0]) for r in rejections])
    # What would fall out of the ring in this very transaction is not written at all.
    kept: list[Rejection] = []
    added = 0
    for rejection in reversed(rejections[-REJECTED_KEPT_ROWS:]):
        cut = _cut(rejection, max_bytes // _LARGEST_SHARE)
        if kept and added + cost_bytes(cut) > max_bytes:
            break
        added += cost_bytes(cut)
        kept.append(cut)
    conn.executemany(_INSERT_REJECTED, reversed(kept))
    conn.execute(ADD_COUNTER, (KEPT_BYTES, added))
    return len(rejections) - len(kept) + trim_rejections(conn, max_bytes)


def trim_rejections(conn: sqlite3.Connection, max_bytes: int) -> int:
    """Drop the ring's oldest rows until it keeps to its limits; return how many.

    Args:
        conn: Within a transaction.
        max_bytes: By :func:`cost_bytes`; 0 for none at all.
    """
    first, last = conn.execute("SELECT min(id), max(id) FROM rejected_row").fetchone()
    if first is None:
        return 0
    keep_from = last - REJECTED_KEPT_ROWS + 1
    row = conn.execute("SELECT value FROM counter WHERE name = ?", (KEPT_BYTES,)).fetchone()
    kept_bytes = row[0] if row else 0
    if kept_bytes > max_bytes:
        # The running sum from the newest down says where the limit is crossed.
        (by_bytes,) = conn.execute(
            f"SELECT coalesce(max(id), 0) + 1 FROM (SELECT id, sum({_COST}) OVER "  # noqa: S608 - our own constant
            "(ORDER BY id DESC) AS total FROM rejected_row) WHERE total > ?",
            (max_bytes,),
        ).fetchone()
        # One that is above the limit alone is kept until the next one comes.
        keep_from = max(keep_from, min(by_bytes, last) if max_bytes else last + 1)
    if keep_from <= first:
        return 0
    (freed,) = conn.execute(
        f"SELECT coalesce(sum({_COST}), 0) FROM rejected_row WHERE id < ?",  # noqa: S608 - our own constant
        (keep_from,),
    ).fetchone()
    dropped = conn.execute("DELETE FROM rejected_row WHERE id < ?", (keep_from,)).rowcount
    conn.execute(ADD_COUNTER, (KEPT_BYTES, -freed))
    return dropped


def cost_bytes(rejection: Rejection) -> int:
    """Return what the ring counts for a message: payload, topic, detail and the row itself."""
    _, _, detail, topic, payload, _, _, _ = rejection
    return len(payload) + len(topic.encode()) + len(detail.encode()) + _ROW_BYTES


def _cut(rejection: Rejection, most_bytes: int) -> Rejection:
    received_us, reason, detail, topic, payload, *rest = rejection
    if len(payload) <= most_bytes and 4 * len(topic) <= most_bytes:
        return rejection
    # A character of the topic has at most four bytes.
    return (received_us, reason, detail, topic[: most_bytes // 4], payload[:most_bytes], *rest)  # type: ignore[return-value]
