"""What the collector's unit tests share: messages, log lines that act, a disk that fails."""

import errno
import json
import logging
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import RawIOBase
from pathlib import Path

import pytest

from collector.inbox import Delivered
from collector.packets import Message
from spool import (
    DiskFullError,
    NewReading,
    Rejection,
    Settlement,
    SinkProgress,
    SinkState,
    SpoolWriter,
    event_id,
)

MIB = 1024 * 1024
SITE = "S1"
TAG = "TI-101.PV"


def message(  # noqa: PLR0913 - what a PUBLISH has
    number: int,
    *,
    qos: int = 1,
    mid: int | None = None,
    retained: bool = False,
    site: str = SITE,
    pad_bytes: int = 0,
) -> Message:
    """Return a good reading that is told from others by its number, which is also its value."""
    content = {
        "site_code": site,
        "sensor_id": "PT-1",
        "timestamp": "2026-01-01T00:00:00Z",
        "value": number,
        "pad": "x" * pad_bytes,
    }
    topic = f"FCTS/FAE/{SITE}/SolvExtract/{TAG}".encode()
    payload = json.dumps(content).encode()
    identifier = number if mid is None else mid
    return Message(topic, payload, qos, retained, identifier if qos else 0, len(payload))


def garbage(number: int, *, qos: int = 1) -> Message:
    """Return a message that is no reading."""
    payload = b"not json %d" % number
    topic = f"FCTS/FAE/{SITE}/SolvExtract/{TAG}".encode()
    return Message(topic, payload, qos, retained=False, mid=number if qos else 0, size=len(payload))


def identity(one: Message) -> bytes:
    """Return the event id that the message has in the spool."""
    return event_id(one.topic, one.payload)


def read(*messages: Message, generation: int = 1) -> Delivered:
    """Return what one read of the connection ``generation`` brought."""
    size = sum(len(m.topic) + len(m.payload) for m in messages)
    return Delivered(generation, 1_000_000, list(messages), size)


def deliver_through(directory: Path, seq: int, epoch: str, sink: str = "pubsub") -> None:
    """Move the sink's cursor, as its forwarder does once the rows are delivered."""
    state = SinkState.open(directory, sink)
    state.settle(Settlement(epoch, seq, delivered=seq))
    state.close()


class Clock:
    """Seconds that pass only when a test says so; counts how often it was asked."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now_s


class Logbook(logging.Handler):
    """Keeps log records, and lets a test act, within the thread that logs, on a certain line.

    This is how a test steps in at one exact point of a loop, without waiting for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._actions: list[tuple[str, Callable[[], object]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        for text, action in self._actions:
            if text in record.getMessage():
                action()

    def when(self, text: str, action: Callable[[], object]) -> None:
        """Call ``action`` at each line that contains ``text``."""
        self._actions.append((text, action))

    def lines(self, text: str = "") -> list[str]:
        """Return the messages that contain ``text``."""
        return [m for m in (r.getMessage() for r in self.records) if text in m]

    def values(self, text: str) -> list[dict[str, object]]:
        """Return the fields of the lines that contain ``text``."""
        return [r.__dict__.get("fields", {}) for r in self.records if text in r.getMessage()]

    def levels(self, text: str) -> list[str]:
        """Return the severities of the lines that contain ``text``."""
        return [r.levelname for r in self.records if text in r.getMessage()]


@contextmanager
def logbook(name: str = "collector") -> Iterator[Logbook]:
    """Listen to the logger ``name``."""
    logger = logging.getLogger(name)
    book, level = Logbook(), logger.level
    logger.addHandler(book)
    logger.setLevel(logging.INFO)
    try:
        yield book
    finally:
        logger.removeHandler(book)
        logger.setLevel(level)


@dataclass(frozen=True)
class Fault:
    """How one append ends.

    Attributes:
        error: What is raised.
        durable_share: How much of the readings is on the disk all the same, 0 to 1.
    """

    error: Exception
    durable_share: float = 0.0


def disk_full(durable_share: float = 0.0) -> Fault:
    """Return the fault of an append that finds no room."""
    return Fault(DiskFullError("append failed: database or disk is full"), durable_share)


@dataclass
class Script:
    """What the writers of one spool are to do, and what they did, over all reopenings."""

    faults: deque[Fault | None] = field(default_factory=deque)
    """One for each append to come; then none any more."""
    progress_faults: deque[Exception] = field(default_factory=deque)
    meta_faults: deque[Exception] = field(default_factory=deque)
    opening_faults: deque[Exception] = field(default_factory=deque)
    appends: list[int] = field(default_factory=list)
    """How many readings and rejections each append had that was committed."""
    snapshots: int = 0
    """How many snapshots of the sinks were stored, in whatever way."""
    openings: int = 0
    on_opening: Callable[[int], object] = lambda _: None
    """Told, before each opening, which one it is."""


class ScriptedWriter(SpoolWriter):
    """A real writer that keeps a record, and fails where its script says so."""

    script: Script

    def append(
        self,
        readings: Sequence[NewReading],
        rejections: Sequence[Rejection],
        counts: Mapping[str, int],
        progress: Sequence[SinkProgress] = (),
        meta: Mapping[str, str] | None = None,
    ) -> None:
        fault = self.script.faults.popleft() if self.script.faults else None
        if fault is not None:
            durable = readings[: round(len(readings) * fault.durable_share)]
            if fault.durable_share == 1:
                super().append(readings, rejections, counts, progress, meta)
            elif durable:
                super().append(durable, (), {"received": len(durable), "spooled": len(durable)})
            raise fault.error
        super().append(readings, rejections, counts, progress, meta)
        self.script.appends.append(len(readings) + len(rejections))
        self.script.snapshots += bool(progress)

    def write_progress(self, progress: "Sequence[SinkProgress]") -> None:
        if self.script.progress_faults:
            raise self.script.progress_faults.popleft()
        super().write_progress(progress)
        self.script.snapshots += 1

    def set_meta(self, key: str, value: str) -> None:
        if self.script.meta_faults:
            raise self.script.meta_faults.popleft()
        super().set_meta(key, value)


def open_scripted(directory: Path, script: Script) -> ScriptedWriter:
    """Open the spool with a writer that follows ``script``."""
    script.openings += 1
    script.on_opening(script.openings)
    if script.opening_faults:
        raise script.opening_faults.popleft()
    writer = ScriptedWriter.open(directory)
    assert isinstance(writer, ScriptedWriter)
    writer.script = script
    return writer


@contextmanager
def small_disk(directory: Path, size_mib: int) -> Iterator[Path]:
    """Mount a file system of its own that is quickly full; skip where that is not allowed."""
    mount = directory / "disk"
    mount.mkdir()
    options = f"size={size_mib}m,mode=0755"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def fill_disk(path: Path) -> None:
    """Write a file until the disk has not one byte left."""
    with path.open("wb", buffering=0) as file:
        for step in (64 * 1024, 512):
            while _has_room_for(file, bytes(step)):
                continue


def _has_room_for(file: RawIOBase, data: bytes) -> bool:
    try:
        file.write(data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True
