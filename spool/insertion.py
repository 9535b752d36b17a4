"""Into the spool's tables: readings, which is the writer's hot path, and rejected messages."""

import sqlite3
from collections.abc import Sequence

from spool.records import READING_COLUMNS, NewReading, Rejection

REJECTED_KEPT_ROWS = 10_000
REJECTED_KEPT_BYTES = 32 * 1024 * 1024
"""The ring of rejected messages: whichever limit is reached first drops the oldest."""

REJECTED_PAYLOAD_BYTES = 64 * 1024
"""How much of a rejected payload is kept."""

_INSERT_READING = f"INSERT INTO reading_row ({READING_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)"  # noqa: S608 - our own constant
_TOGETHER = 50
"""Readings of one INSERT."""

_INSERT_TOGETHER = ",".join([_INSERT_READING, *["(?,?,?,?,?,?,?,?,?,?)"] * (_TOGETHER - 1)])
_INSERT_REJECTED = (
    "INSERT INTO rejected_row (received_us, reason, detail, topic, payload, payload_bytes, qos, "
    "retained) VALUES (?,?,?,?,?,?,?,?)"
)
_COUNT_REASON = (
    "INSERT INTO rejected_total (reason, count, first_us, last_us) VALUES (?1, 1, ?2, ?2) "
    "ON CONFLICT (reason) DO UPDATE SET count = count + 1, last_us = excluded.last_us"
)
ADD_COUNTER = (
    "INSERT INTO counter (name, value) VALUES (?, ?) "
    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
)


def insert_readings(conn: sqlite3.Connection, readings: Sequence[NewReading]) -> None:
    """Insert in the order given.

    A statement for each costs nearly twice as much: for each the module lets go of the
    interpreter's lock, and SQLite looks up and notes the last seq.
    """
    together = len(readings) - len(readings) % _TOGETHER
    for start in range(0, together, _TOGETHER):
        conn.execute(_INSERT_TOGETHER, _parameters(readings[start : start + _TOGETHER]))
    conn.executemany(_INSERT_READING, readings[together:])


def _parameters(readings: Sequence[NewReading]) -> list[object]:
    """Return all columns of all ``readings`` in one list."""
    flat: list[object] = []
    for identity, received, timestamp, site, sensor, tag, value, topic, payload, crc in readings:
        # For bytes the module looks for an adapter, twice in vain and each time at 0.2 µs; for
        # a bytearray it does not (need_adapt() in CPython's cursor.c), and stores the same.
        names = (site, sensor, tag)
        flat += (
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


def insert_rejections(conn: sqlite3.Connection, rejections: Sequence[Rejection]) -> int:
    """Insert into the ring and return how many old ones it dropped."""
    conn.executemany(_INSERT_REJECTED, rejections)
    conn.executemany(_COUNT_REASON, [(r[1], r[0]) for r in rejections])
    added = sum(len(r[4]) for r in rejections)
    (kept_bytes,) = conn.execute(
        f"{ADD_COUNTER} RETURNING value", ("rejected_kept_bytes", added)
    ).fetchone()
    first, last = conn.execute("SELECT min(id), max(id) FROM rejected_row").fetchone()
    keep_from = last - REJECTED_KEPT_ROWS + 1
    if kept_bytes > REJECTED_KEPT_BYTES:
        # The running sum from the newest down says where the limit is crossed.
        (by_bytes,) = conn.execute(
            "SELECT coalesce(max(id), 0) + 1 FROM (SELECT id, sum(length(payload)) OVER "
            "(ORDER BY id DESC) AS total FROM rejected_row) WHERE total > ?",
            (REJECTED_KEPT_BYTES,),
        ).fetchone()
        keep_from = max(keep_from, min(by_bytes, last))
    if keep_from <= first:
        return 0
    (freed,) = conn.execute(
        "SELECT coalesce(sum(length(payload)), 0) FROM rejected_row WHERE id < ?", (keep_from,)
    ).fetchone()
    dropped = conn.execute("DELETE FROM rejected_row WHERE id < ?", (keep_from,)).rowcount
    conn.execute(ADD_COUNTER, ("rejected_kept_bytes", -freed))
    return dropped
