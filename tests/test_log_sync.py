"""A write-ahead log is on the disk before its owner believes it, whatever happened before."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spool import SinkState, SpoolWriter, StorageFaultError, UnreadableFileError
from spool.log_sync import PART_MAX_BYTES, _parts
from tests.torture import syscalls
from tests.torture.syscalls import Event, Kind

DATABASES = ("spool", "pubsub", "bigquery")
OPEN = (
    "import sys; from pathlib import Path; from spool import SinkState, SpoolWriter\n"
    "directory, name = Path(sys.argv[1]), sys.argv[2]\n"
    "opened = SpoolWriter.open(directory) if name == 'spool' else SinkState.open(directory, name)\n"
)
LEAVE = "import os; os._exit(0)\n"
CHANGE = (
    "from collections import Counter\n"
    "if name == 'spool': opened.append((), (), Counter(received=1))\n"
    "else: opened.set_status('delivering', '')\n"
)
TELL = (
    "import sys; from pathlib import Path; from spool import *\n"
    "directory, name = Path(sys.argv[1]), sys.argv[2]\n"
    "try: SpoolWriter.open(directory) if name == 'spool' else SinkState.open(directory, name)\n"
    "except SpoolError as error: print(type(error).__name__, error, flush=True)\n"
)


def live(directory: Path, name: str, script: str, *tracing: str) -> str:
    """Run a process that opens the file and ends as the product's do: without closing it."""
    command = [*tracing, sys.executable, "-c", script + LEAVE, str(directory), name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout


def log_of(directory: Path, name: str) -> Path:
    return directory / f"{name}.db-wal"


@pytest.fixture(params=DATABASES)
def left(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, bytes]:
    """A file whose owner was killed, and what its log holds."""
    name = str(request.param)
    live(tmp_path, name, OPEN + CHANGE)
    log = log_of(tmp_path, name).read_bytes()
    assert log
    return tmp_path, name, log


def traced(left: tuple[Path, str, bytes], inject: str = "") -> tuple[str, list[Event]]:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    directory, name, _ = left
    log = directory / "strace"
    tracing = [a for a in syscalls.command(strace, log, sockets=False, inject=inject) if a != "-D"]
    said = live(directory, name, TELL if inject else OPEN, *tracing)
    of_the_log = str(log_of(directory, name))
    return said, [event for event in syscalls.merged([log]) if event.path == of_the_log]


def test_an_owner_writes_its_log_again_and_syncs_it(left: tuple[Path, str, bytes]) -> None:
    directory, name, log = left
    _, events = traced(left)
    written = bytearray(len(log))
    for event in events:
        if event.kind is Kind.WRITE:
            written[event.number : event.number + len(event.data)] = event.data
        elif event.kind is Kind.SYNC_BEGINS:
            break
    # Every byte, before the first sync; and it is the log that it was.
    assert written == log
    assert events[-1].kind is Kind.SYNC_ENDS
    assert log_of(directory, name).read_bytes().startswith(log)


def test_a_log_that_cannot_be_synced_is_not_believed_and_not_folded_in(
    left: tuple[Path, str, bytes],
) -> None:
    directory, name, log = left
    database = (directory / f"{name}.db").read_bytes()
    said, _ = traced(left, "fdatasync:error=EIO:when=1+")
    assert said.startswith("StorageFaultError sync the write-ahead log of ")
    assert "dmesg" in said
    # Closing the last connection would move the log into the database and delete it.
    assert log_of(directory, name).read_bytes() == log
    assert (directory / f"{name}.db").read_bytes() == database


def test_no_room_for_the_log_is_told_as_a_full_disk(left: tuple[Path, str, bytes]) -> None:
    said, _ = traced(left, "fdatasync:error=ENOSPC:when=1+")
    assert said.startswith("DiskFullError sync the write-ahead log of ")


def test_a_log_that_the_disk_cannot_read_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(tmp_path, "spool", OPEN + CHANGE)

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    # SQLite reads the log with the same calls: strace cannot let only one of them fail.
    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(UnreadableFileError, match="read the write-ahead log"):
        SpoolWriter.open(tmp_path)


def test_a_process_that_has_synced_all_itself_does_not_write_the_log_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk has the spool opened again twice a second."""
    live(tmp_path, "spool", OPEN + CHANGE)
    SpoolWriter.open(tmp_path).close()
    live(tmp_path, "spool", OPEN + CHANGE)
    written: list[int] = []
    monkeypatch.setattr("spool.connection.rewrite_log", lambda *_: written.append(1))
    SpoolWriter.open(tmp_path, synced=True).close()
    assert written == []
    SpoolWriter.open(tmp_path).close()
    assert written == [1]


def test_of_a_long_log_both_ends_are_written_again() -> None:
    assert _parts(7) == [(0, 7)]
    assert _parts(2 * PART_MAX_BYTES) == [(0, 2 * PART_MAX_BYTES)]
    size = 10 * PART_MAX_BYTES
    assert _parts(size) == [(0, PART_MAX_BYTES), (size - PART_MAX_BYTES, size)]


def test_no_connection_can_append_while_the_log_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(tmp_path, "pubsub", OPEN + CHANGE)
    monkeypatch.setattr("spool.locks.PATIENCE_S", 0.0)
    other = SinkState.open(tmp_path, "pubsub")
    seen = []

    def appending(descriptor: int, size: int, offset: int) -> bytes:
        with pytest.raises(StorageFaultError, match="locked"):
            other.set_status("retrying", "")
        seen.append(offset)
        return real(descriptor, size, offset)

    real = os.pread
    monkeypatch.setattr(os, "pread", appending)
    SinkState.open(tmp_path, "pubsub").close()
    assert seen
    other.set_status("retrying", "")
    other.close()
