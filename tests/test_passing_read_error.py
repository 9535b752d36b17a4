"""A disk that cannot read a page once: SQLite calls it corruption; no spool is set aside for it.

The collector's own process, with a fault that strace puts into one read of spool.db.
"""

import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spool import SinkState, SpoolWriter, sink_path, spool_path
from spool.setaside import LASTING_S, LASTING_STARTS
from tests.harness import Program, wait_until
from tests.test_spool_writer import look, new_reading
from tests.torture import storage_faults

ROWS = 2_000
RUNNING = "cannot reach the broker"
UNREADABLE = "SQLITE_IOERR_CORRUPTFS"
COPIED = "what could be read of the damaged spool is in the new one"
LIFE_TIMEOUT_S = 60.0
COMMAND = (sys.executable, "-m", "collector")

pytestmark = pytest.mark.skipif(
    not storage_faults.available(), reason="strace cannot tamper with system calls here"
)


@pytest.fixture
def spool_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "spool"
    directory.mkdir()
    writer = SpoolWriter.open(directory)
    writer.append([new_reading(n) for n in range(ROWS)], [], {"received": ROWS, "spooled": ROWS})
    writer.set_meta("app_env", "LOCAL")
    writer.checkpoint()
    writer.close()
    return directory


@pytest.fixture
def variables(spool_dir: Path) -> Iterator[dict[str, str]]:
    with socket.socket() as holder:  # taken, and nobody listens: the program runs without a broker
        holder.bind(("127.0.0.1", 0))
        yield {
            "APP_ENV": "LOCAL",
            "SPOOL_DIR": str(spool_dir),
            "MQTT_BROKER": "127.0.0.1",
            "MQTT_PORT": str(holder.getsockname()[1]),
        }


def live(
    command: tuple[str, ...], variables: dict[str, str], log: Path, until: str = RUNNING
) -> tuple[int, str]:
    """Let the collector live until it ends or has said ``until``; return exit code and log."""
    program = Program("collector", command, variables, log)
    program.start()
    wait_until(
        lambda: not program.running or until in log.read_text(errors="replace"),
        LIFE_TIMEOUT_S,
        f"it has ended or says {until!r}",
    )
    if program.running:
        program.signal(signal.SIGTERM)
    return program.wait(), log.read_text(errors="replace")


def tampered(
    path: Path, when: str, log: Path, command: tuple[str, ...] = COMMAND
) -> tuple[str, ...]:
    """Return the command whose read of this number fails; strace's notes go to ``log``."""
    return (
        *("strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", "signal=none"),
        *(f"-P{path}", "-e", "trace=pread64"),
        *("-e", f"inject=pread64:error=EIO:when={when}", *command),
    )


FIRST, AT_THE_OPENING, WITHIN_THE_ROWS = "1", "5", "40"
"""Which reads those are."""


@pytest.mark.parametrize("when", [AT_THE_OPENING, WITHIN_THE_ROWS])
def test_a_read_error_that_passes_costs_a_second_look_and_no_spool(
    spool_dir: Path, variables: dict[str, str], tmp_path: Path, when: str
) -> None:
    before = look(spool_path(spool_dir), "SELECT value FROM meta WHERE key='epoch'")
    notes = tmp_path / "strace"
    ended, text = live(
        tampered(spool_path(spool_dir), when, notes), variables, tmp_path / "first.log"
    )
    assert "(INJECTED)" in notes.read_text()
    assert "SQLITE_CORRUPT" in text
    assert ended == (0 if when == AT_THE_OPENING else 75), text
    ended, text = live(COMMAND, variables, tmp_path / "second.log")
    assert ended == 0
    assert list(spool_dir.glob("*.damaged-*")) == []
    assert look(spool_path(spool_dir), "SELECT value FROM meta WHERE key='epoch'") == before
    assert look(spool_path(spool_dir), "SELECT count(*) FROM reading_row") == [(ROWS,)]


def test_a_page_that_can_never_be_read_is_damage_and_the_rest_is_copied(
    spool_dir: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    for life in range(2):
        command = tampered(spool_path(spool_dir), f"{WITHIN_THE_ROWS}+", tmp_path / "strace")
        ended, text = live(command, variables, tmp_path / f"{life}.log")
        assert ended == 75, text
    (damaged,) = spool_dir.glob("*.damaged-*Z")
    assert not spool_path(spool_dir).exists()
    live(COMMAND, variables, tmp_path / "third.log", COPIED)
    salvaged = look(spool_path(spool_dir), "SELECT count(*) FROM reading_row")[0][0]
    assert salvaged == ROWS
    assert damaged.exists()


def note(path: Path) -> Path:
    """Return where it is counted how often the file could not be read."""
    return path.with_name(f"{path.name}.unreadable")


def nearly_believed(path: Path) -> None:
    """Note that the file could not be read at all starts but one, for long."""
    now_s = time.time()
    note(path).write_text(f"{now_s - LASTING_S} {now_s} {LASTING_STARTS - 1}")


def test_a_first_page_that_cannot_be_read_once_costs_a_restart_and_no_spool(
    spool_dir: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    before = look(spool_path(spool_dir), "SELECT value FROM meta WHERE key='epoch'")
    command = tampered(spool_path(spool_dir), f"{FIRST}+", tmp_path / "strace")
    ended, text = live(command, variables, tmp_path / "first.log")
    assert (ended, UNREADABLE in text) == (75, True), text
    assert "dmesg | tail" in text
    assert note(spool_path(spool_dir)).exists()
    ended, text = live(COMMAND, variables, tmp_path / "second.log")
    assert ended == 0, text
    assert not note(spool_path(spool_dir)).exists()
    assert list(spool_dir.glob("*.damaged-*")) == []
    assert look(spool_path(spool_dir), "SELECT value FROM meta WHERE key='epoch'") == before


def test_a_first_page_that_cannot_be_read_for_long_is_damage_and_the_rest_is_copied(
    spool_dir: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    nearly_believed(spool_path(spool_dir))
    # The fault goes by the file's name, so only the first read: the next file has that name too.
    command = tampered(spool_path(spool_dir), FIRST, tmp_path / "strace")
    ended, text = live(command, variables, tmp_path / "log", COPIED)
    assert ended == 0, text
    assert UNREADABLE in text
    assert len(list(spool_dir.glob("*.damaged-*Z"))) == 1
    assert look(spool_path(spool_dir), "SELECT count(*) FROM reading_row") == [(ROWS,)]
    assert not note(spool_path(spool_dir)).exists()


def test_a_sinks_file_that_cannot_be_read_for_long_is_begun_again(
    spool_dir: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    SinkState.open(spool_dir, "pubsub").close()
    own = sink_path(spool_dir, "pubsub")
    command = (sys.executable, "-m", "forwarder", "pubsub")
    unreadable = tampered(own, FIRST, tmp_path / "strace", command)
    ended, text = live(unreadable, variables, tmp_path / "first.log")
    assert (ended, UNREADABLE in text) == (75, True), text
    assert list(spool_dir.glob("*.damaged-*")) == []
    nearly_believed(own)
    ended, text = live(unreadable, variables, tmp_path / "second.log", "a new file takes the place")
    assert ended == 0, text
    assert len(list(spool_dir.glob("pubsub.db.damaged-*Z"))) == 1
    assert not note(own).exists()
