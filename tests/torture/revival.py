"""Gives an image to the real processes, with services that have what they had, and drains it.

The broker is played by a new one that sends again what it has no PUBACK for, and, as one whose
own state was old, some of what it has one for.
"""

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from spool import event_id, spool_path
from tests.harness import COLLECTOR, Packet, Rig, assert_adds_up, last_words, wait_until
from tests.harness.books import Books
from tests.harness.cloud import TABLE_REF
from tests.torture.recording import Recording, traced
from tests.torture.verdict import Violation, Wrong
from tests.torture.witness import Truth

ACKED_AGAIN = 200
_TIMEOUT_S = 40.0
_IDENTITIES = "SELECT event_id FROM reading_row"


@dataclass(frozen=True, slots=True)
class Revival:
    """What came of starting the real processes on an image."""

    violations: list[Violation]
    recording: Recording | None
    """What they did to the disk meanwhile; None if they broke off, or the clock was set."""


def revive(
    files: Mapping[str, bytes],
    truth: Truth,
    recording: Recording,
    scratch: Path,
    *,
    change: str = "",
) -> Revival:
    """Start the real processes on an image, and see what they do wrong.

    Args:
        files: The image.
        truth: How things stood at the cut.
        recording: What the image is of.
        scratch: Where the logs of system calls go.
        change: One of :mod:`tests.torture.broken`; empty for the product as it is.
    """
    try:
        received, sent = _sent_again(files, truth, recording.packets)
        # A shorter retention than a broker's memory would make duplicates, lawfully.
        with traced(scratch, change, commit_delay_ms=recording.commit_delay_ms) as system:
            rig = system.rig
            for name, content in files.items():
                (rig.spool_dir / name).write_bytes(content)
            _fill_bigquery(rig, truth, recording)
            rig.start()
            rig.programs[COLLECTOR].wait_for_log('"message": "subscribed"')
            rig.publisher.publish(sent)
            all_of_it = received + len(sent)
            wait_until(lambda: _drained(rig, all_of_it), _TIMEOUT_S, "all is delivered")
            found = [*_sums(rig), *_compare(rig, truth, recording.packets)]
            system.end()
            return Revival(found, system.recording(recording.packets, truth))
    except AssertionError as error:
        words = "\n".join(f"{name}: {text[-1_500:]}" for name, text in last_words())
        return Revival([Violation(Wrong.NOT_DELIVERED, f"{error}\n{words}")], None)


def _fill_bigquery(rig: Rig, truth: Truth, recording: Recording) -> None:
    """Let BigQuery have the table, the streams and the rows that it had."""
    rig.cloud.bigquery.store.table(TABLE_REF).created_ms = recording.table_created_ms
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


def _sent_again(
    files: Mapping[str, bytes], truth: Truth, packets: Sequence[Packet]
) -> tuple[int, list[Packet]]:
    """Return how many the collector says it had, and what the broker sends again.

    Looked up in a copy: the processes are to find the image as the power cut left it, and
    whoever opens a database is the one who recovers its log.
    """
    spooled: set[bytes] = set()
    received = 0
    with tempfile.TemporaryDirectory(prefix="sluice-look-") as holder:
        directory = Path(holder)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        path = spool_path(directory)
        if path.exists() and path.stat().st_size:
            # With the right to write: a spool that was half made is rolled back first.
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("SELECT * FROM sqlite_schema").fetchall()
            received = Books(directory).counter("received")
            spooled = {i for (i,) in Books(directory).rows("spool", _IDENTITIES)}
    by_identity = {_identity(packet): packet for packet in packets}
    acked = [p for i, p in by_identity.items() if i in truth.acked and i in spooled]
    again = acked[-ACKED_AGAIN:] + [p for i, p in by_identity.items() if i not in truth.acked]
    return received, again


def _drained(rig: Rig, received: int) -> bool:
    try:
        figures = rig.books.figures()
    except sqlite3.OperationalError:
        return False  # a file that was half made, and whose owner has not opened it yet
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
