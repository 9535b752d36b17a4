"""Gives an image to the real processes, with services that have what they had, and drains it.

The broker is played by a new one that sends again what it has no PUBACK for, and, as one whose
own state was old, some of what it has one for.
"""

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing

from spool import event_id, spool_path
from tests.harness import COLLECTOR, Packet, Rig, assert_adds_up, last_words, wait_until
from tests.torture.recording import Recording
from tests.torture.verdict import Violation, Wrong
from tests.torture.witness import Truth

ACKED_AGAIN = 200
_TIMEOUT_S = 40.0


def revive(files: Mapping[str, bytes], truth: Truth, recording: Recording) -> list[Violation]:
    """Start the real processes on an image and return what they did wrong.

    Args:
        files: The image.
        truth: How things stood at the cut.
        recording: What the image is of.
    """
    try:
        # A shorter retention than a broker's memory would make duplicates, lawfully.
        with Rig() as rig:
            for name, content in files.items():
                (rig.spool_dir / name).write_bytes(content)
            _fill_bigquery(rig, truth, recording)
            sent = _packets(rig, truth, recording.packets)
            received = rig.books.counter("received") + len(sent)
            rig.start()
            rig.programs[COLLECTOR].wait_for_log('"message": "subscribed"')
            rig.publisher.publish(sent)
            wait_until(lambda: _drained(rig, received), _TIMEOUT_S, "all is delivered")
            return [*_sums(rig), *_compare(rig, truth, recording.packets)]
    except AssertionError as error:
        words = "\n".join(f"{name}: {text[-1_500:]}" for name, text in last_words())
        return [Violation(Wrong.NOT_DELIVERED, f"{error}\n{words}")]


def _fill_bigquery(rig: Rig, truth: Truth, recording: Recording) -> None:
    """Let BigQuery have the streams and the rows that it had."""
    streams = rig.cloud.write_api.streams
    for name in recording.streams:
        assert streams.create(name.partition("/streams/")[0]).name == name, "streams are numbered"
    at = 0
    for arrival in truth.arrived["bigquery"]:
        rows = recording.rows[at : at + len(arrival.readings)]
        streams.append(arrival.stream, arrival.offset, len(rows), lambda rows=rows: rows)  # type: ignore[misc] # the rows of this turn
        at += len(rows)


def _identity(packet: Packet) -> bytes:
    return event_id(packet.topic, packet.payload)


def _packets(rig: Rig, truth: Truth, packets: Sequence[Packet]) -> list[Packet]:
    """Return what the broker sends again."""
    spooled: set[bytes] = set()
    path = spool_path(rig.spool_dir)
    if path.exists() and path.stat().st_size:
        with closing(sqlite3.connect(path)) as connection:
            tables = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'reading_row'")
            if tables.fetchone():
                spooled = {row[0] for row in connection.execute("SELECT event_id FROM reading_row")}
    by_identity = {_identity(packet): packet for packet in packets}
    acked = [p for i, p in by_identity.items() if i in truth.acked and i in spooled]
    return acked[-ACKED_AGAIN:] + [p for i, p in by_identity.items() if i not in truth.acked]


def _drained(rig: Rig, received: int) -> bool:
    figures = rig.books.figures()
    pending = sum(sink.pending for sink in figures.sinks.values())
    return figures.received >= received and not pending


def _sums(rig: Rig) -> list[Violation]:
    try:
        assert_adds_up(rig.books, rig.sinks)
    except AssertionError as error:
        return [Violation(Wrong.SUMS, str(error))]
    return []


def _compare(rig: Rig, truth: Truth, packets: Sequence[Packet]) -> list[Violation]:
    found = []
    expected = {_identity(packet) for packet in packets if packet.sample is not None}
    for sink in rig.sinks:
        new = [bytes.fromhex(one.event_id) for one in rig.cloud.received(sink)]
        old = [i for arrival in truth.arrived[sink] for _, i in arrival.readings]
        there = Counter(new if sink == "bigquery" else old + new)
        if set(there) != expected:
            missing, surplus = len(expected - set(there)), len(set(there) - expected)
            text = f"{sink}: {missing} are missing, {surplus} came that nobody sent"
            found.append(Violation(Wrong.NOT_DELIVERED, text))
        twice = sum(1 for times in there.values() if times > 1)
        if sink == "bigquery" and twice:
            found.append(Violation(Wrong.REPEATED, f"{twice} readings"))
    return found
