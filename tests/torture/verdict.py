"""Opens the files of an image with the product's own code and holds them against the truth."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lifecycle import SINKS
from spool import (
    AppendJournal,
    Journal,
    SinkState,
    SpoolError,
    SpoolReader,
    SpoolWriter,
    event_id,
    intact,
    sink_path,
    spool_path,
)
from tests.torture.witness import Arrival, Truth

_SHOWN = 5


class Wrong(Enum):
    """Which rule an image breaks."""

    UNREADABLE = "a file cannot be opened, or is damaged"
    LOST = "a message with a PUBACK is nowhere"
    SUMS = "the counters do not add up"
    PRUNED = "a row is gone that a sink still needs"
    AHEAD = "a cursor is beyond the spool's last row, or of another spool"
    UNCONFIRMED = "a cursor has passed what its service had not confirmed"
    UNJOURNALLED = "the service has an append that neither cursor nor journal knows"
    NOT_DELIVERED = "the processes did not deliver what was to be delivered"
    REPEATED = "a reading is in BigQuery twice"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule."""

    wrong: Wrong
    detail: str


@dataclass(frozen=True, slots=True)
class _Sink:
    name: str
    position: int
    counters: dict[str, int]
    journal: Journal


def judge(directory: Path, truth: Truth) -> list[Violation]:
    """Open the image in ``directory`` and return which rules it breaks.

    Changes the files as an opening does.
    """
    found: list[Violation] = []
    try:
        with closing(SpoolWriter.open(directory)) as writer:
            sinks = [
                _sink(directory, name, writer.epoch, found)
                for name in SINKS
                if sink_path(directory, name).exists()
            ]
            found += _spool(directory, writer, sinks, truth)
            for sink in sinks:
                found += _service(sink, truth)
    except SpoolError as error:
        found.append(Violation(Wrong.UNREADABLE, str(error)))
    return found + list(_integrity(directory))


def _sink(directory: Path, name: str, epoch: str, found: list[Violation]) -> _Sink:
    with closing(SinkState.open(directory, name)) as state:
        known = state.known_epoch()
        if known not in {"", epoch}:
            found.append(Violation(Wrong.AHEAD, f"{name}: of epoch {known}, the spool is {epoch}"))
        journal = AppendJournal(state).load(epoch)
        return _Sink(name, state.position(epoch), state.counters(), journal)


def _spool(
    directory: Path, writer: SpoolWriter, sinks: Sequence[_Sink], truth: Truth
) -> list[Violation]:
    found: list[Violation] = []
    last = writer.last_seq()
    with closing(SpoolReader.open(directory)) as reader:
        rows = reader.read_after(0, last + 1, 2**62)
    damaged = [row[0] for row in rows if not intact(row)]
    if damaged:
        found.append(Violation(Wrong.UNREADABLE, f"checksums are wrong: seq {damaged[:_SHOWN]}"))
    counts = {n: writer.counter(n) for n in ("received", "spooled", "duplicates", "rejected")}
    if counts["received"] != counts["spooled"] + counts["duplicates"] + counts["rejected"]:
        found.append(Violation(Wrong.SUMS, str(counts)))
    if counts["spooled"] != last:
        found.append(Violation(Wrong.SUMS, f"{counts}, but the last seq is {last}"))
    for sink in sinks:
        passed = sum(
            sink.counters.get(n, 0) for n in ("delivered", "logged", "dead_lettered", "dropped")
        )
        if passed != sink.position:
            text = f"{sink.name}: {sink.counters}, but the cursor is at {sink.position}"
            found.append(Violation(Wrong.SUMS, text))
        if sink.position > last:
            text = f"{sink.name}: at {sink.position}, the last row is {last}"
            found.append(Violation(Wrong.AHEAD, text))
    first = rows[0][0] if rows else last + 1
    # A sink without a file yet has everything before it.
    needed = min([*(s.position for s in sinks), *([0] if len(sinks) < len(SINKS) else [])]) + 1
    if first > max(needed, 1) or len(rows) != last + 1 - first:
        text = f"rows {first} to {last}, {len(rows)} of them; a sink needs {needed}"
        found.append(Violation(Wrong.PRUNED, text))
    kept = {row[1] for row in rows} | _rejected(directory)
    lost = [i for i in truth.acked - kept if not 0 < truth.seqs.get(i, 0) < min(first, needed)]
    if lost:
        numbers = sorted(truth.seqs.get(identity, 0) for identity in lost)
        found.append(Violation(Wrong.LOST, f"{len(lost)}, among them seq {numbers[:_SHOWN]}"))
    return found


def _rejected(directory: Path) -> set[bytes]:
    with closing(sqlite3.connect(spool_path(directory))) as connection:
        try:
            rows = connection.execute("SELECT topic, payload FROM rejected_row").fetchall()
        except sqlite3.Error:
            return set()  # a damaged file, as the check of its integrity says
    # In a damaged one a column may be anything.
    return {event_id(t.encode(), p) for t, p in rows if isinstance(t, str) and isinstance(p, bytes)}


def _service(sink: _Sink, truth: Truth) -> list[Violation]:
    found = []
    through = truth.through[sink.name]
    if sink.position > through:
        text = f"{sink.name}: at {sink.position}, the service had confirmed {through}"
        found.append(Violation(Wrong.UNCONFIRMED, text))
    for arrival in reversed(truth.arrived[sink.name]):
        if arrival.readings[-1][0] <= sink.position or not arrival.stream:
            break
        if not _journalled(arrival, sink.journal):
            text = f"{arrival.stream} at {arrival.offset}: {sink.journal}"
            found.append(Violation(Wrong.UNJOURNALLED, text))
            break
    return found


def _journalled(arrival: Arrival, journal: Journal) -> bool:
    place = arrival.offset, arrival.readings[0][0], arrival.readings[-1][0], len(arrival.readings)
    cuts = {(cut.offset, cut.first_seq, cut.last_seq, cut.rows) for cut in journal.cuts}
    return arrival.stream == journal.stream and place in cuts


def _integrity(directory: Path) -> list[Violation]:
    found = []
    for path in sorted(directory.glob("*.db")):
        with closing(sqlite3.connect(path)) as connection:
            try:
                answer = connection.execute("PRAGMA integrity_check").fetchall()
            except sqlite3.Error as error:
                answer = [(str(error),)]
        if answer != [("ok",)]:
            found.append(Violation(Wrong.UNREADABLE, f"{path.name}: {answer[:_SHOWN]}"))
    return found
