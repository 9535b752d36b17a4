"""The hot path of the spool's writer: readings into their table."""

import sqlite3
from collections.abc import Sequence

from spool.records import READING_COLUMNS, NewReading

_INSERT_READING = f"INSERT INTO reading_row ({READING_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?)"  # noqa: S608 - our own constant
_TOGETHER = 50
"""Readings of one INSERT."""

_INSERT_TOGETHER = ",".join([_INSERT_READING, *["(?,?,?,?,?,?,?,?,?,?)"] * (_TOGETHER - 1)])


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
