"""A disk that cannot read a page once: SQLite calls it corruption; no spool is set aside for it.

The collector's own process, with a fault that strace puts into one read of spool.db.
"""

import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spool import SpoolWriter, spool_path
from tests.harness import Program, wait_until
from tests.test_spool_writer import look, new_reading
from tests.torture import storage_faults

ROWS = 2_000
RUNNING = "cannot reach the broker"
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


def tampered(spool_dir: Path, when: str, log: Path) -> tuple[str, ...]:
    """Return the command whose read of this number fails; strace's notes go to ``log``."""
    return (
        *("strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", "signal=none"),
        *(f"-P{spool_path(spool_dir)}", "-e", "trace=pread64"),
        *("-e", f"inject=pread64:error=EIO:when={when}", *COMMAND),
    )


AT_THE_OPENING, WITHIN_THE_ROWS = "5", "40"
"""Which reads those are."""


@pytest.mark.parametrize("when", [AT_THE_OPENING, WITHIN_THE_ROWS])
def test_a_read_error_that_passes_costs_a_second_look_and_no_spool(
    spool_dir: Path, variables: dict[str, str], tmp_path: Path, when: str
) -> None:
    before = look(spool_path(spool_dir), "SELECT value FROM meta WHERE key='epoch'")
    notes = tmp_path / "strace"
    ended, text = live(tampered(spool_dir, when, notes), variables, tmp_path / "first.log")
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
        command = tampered(spool_dir, f"{WITHIN_THE_ROWS}+", tmp_path / "strace")
        ended, text = live(command, variables, tmp_path / f"{life}.log")
        assert ended == 75, text
    (damaged,) = spool_dir.glob("*.damaged-*Z")
    assert not spool_path(spool_dir).exists()
    live(COMMAND, variables, tmp_path / "third.log", COPIED)
    salvaged = look(spool_path(spool_dir), "SELECT count(*) FROM reading_row")[0][0]
    assert salvaged == ROWS
    assert damaged.exists()
