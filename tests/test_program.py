"""From settings to exit code: what the supervisor sees of a program, however it ends."""

import errno
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lifecycle.program
from lifecycle import VERSION, ExitCode, Program, Settings, StopRequest, run
from lifecycle.refusal import examine, read_refusal
from tests.test_lifecycle import DEADLINE_S, HOLD_LOCK, Session, took_s


@pytest.fixture
def session() -> Iterator[Session]:
    opened = Session()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    signals = {number: signal.getsignal(number) for number in numbers}
    mask = os.umask(0o022)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.umask(mask)
    for number, handler in signals.items():
        signal.signal(number, handler)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising


class OursError(Exception):
    """An error class that the program has a code for."""


class SpecialError(OursError):
    """A narrower one."""


def run_body(
    directory: Path, body: Callable[[Settings, StopRequest], None], **variables: str
) -> ExitCode:
    environ = {"APP_ENV": "LOCAL", "SPOOL_DIR": str(directory / "spool")} | variables
    codes: dict[type[Exception], ExitCode] = {
        SpecialError: ExitCode.CONFIG,
        OursError: ExitCode.STORAGE,
    }
    return run(Program("role", body, codes), environ)


def raising(error: Exception) -> Callable[[Settings, StopRequest], None]:
    def body(_: Settings, __: StopRequest) -> None:
        raise error

    return body


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle.program, "STORAGE_FAULT_MIN_UPTIME_S", 0.0)


@pytest.mark.usefixtures("hurried")
def test_each_end_has_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fine(_: Settings, stop: StopRequest) -> None:
        stop.request("SIGTERM")

    assert run_body(tmp_path / "a", fine) is ExitCode.CLEAN
    assert run_body(tmp_path / "b", raising(OursError("disk"))) is ExitCode.STORAGE
    assert run_body(tmp_path / "c", raising(SpecialError("env"))) is ExitCode.CONFIG
    assert run_body(tmp_path / "d", raising(ValueError("oops"))) is ExitCode.BUG
    # A system call that failed on a file of the spool is no bug; one that failed elsewhere is.
    for own, path, code in (
        ("e", "e/spool/x", ExitCode.STORAGE),
        ("f", "elsewhere", ExitCode.BUG),
    ):
        failed = OSError(errno.EIO, "Input/output error", str(tmp_path / path))
        assert run_body(tmp_path / own, raising(failed)) is code
    output = capsys.readouterr().out
    assert (
        f'"message": "started", "role": "role", "logger": "lifecycle", "version": "{VERSION}"'
        in (output)
    )
    assert "stopped: SIGTERM" in output
    assert "ends: disk" in output
    assert "ValueError: oops" in output
    assert [int(code) for code in ExitCode] == [0, 70, 75, 78]


def test_wrong_settings_are_reported_one_by_one_and_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began: list[bool] = []
    code = run_body(tmp_path, lambda *_: began.append(True), APP_ENV="PROD", MQTT_PORT="x")
    assert code is ExitCode.CONFIG
    assert began == []
    assert not (tmp_path / "spool").exists()
    output = capsys.readouterr().out
    assert "MQTT_PORT" in output
    assert "supervisorctl restart all" in output
    assert output.count("\n") > 3


def test_a_missing_environment_file_is_wrong_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone.env")
    assert run_body(tmp_path, lambda *_: None, SLUICE_ENV_FILE=gone) is ExitCode.CONFIG
    assert gone in capsys.readouterr().out


def test_a_refusal_within_the_program_is_noted_and_is_not_repeated_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that takes longer than startsecs would otherwise be repeated for ever."""
    monkeypatch.setattr("lifecycle.refusal.SLOW_START_S", 0.0)
    bodies: list[bool] = []

    class RefusedError(Exception):
        """Ends with 78."""

    def body(*_: object) -> None:
        bodies.append(True)
        raise RefusedError("APP_ENV is PRD, the spool is of DEV")

    program = Program("role", body, {RefusedError: ExitCode.CONFIG})
    settings = tmp_path / "env"
    settings.write_text(f"APP_ENV=LOCAL\nINSTANCE_ID=gate\nSPOOL_DIR={tmp_path / 'first'}\n")

    def start() -> ExitCode:
        return run(program, {"SLUICE_ENV_FILE": str(settings), "SLUICE_RUN_DIR": str(tmp_path)})

    assert [start() for _ in range(3)] == [ExitCode.CONFIG] * 3
    assert len(bodies) == 1
    assert capsys.readouterr().out.count("APP_ENV is PRD, the spool is of DEV") == 3
    # Another directory, because a test is one process and still holds the first one's lock.
    settings.write_text(f"APP_ENV=LOCAL\nINSTANCE_ID=gate\nSPOOL_DIR={tmp_path / 'second'}\n")
    assert start() is ExitCode.CONFIG
    assert len(bodies) == 2
    note = read_refusal(str(tmp_path), "role")
    assert note is not None
    assert note.fingerprint == examine({"SLUICE_ENV_FILE": str(settings)}, "").fingerprint


@pytest.mark.usefixtures("hurried")
def test_a_directory_that_cannot_be_used_and_a_held_lock_are_storage_faults(
    tmp_path: Path, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spool").write_text("a file")
    assert run_body(tmp_path, lambda *_: None) is ExitCode.STORAGE
    assert "ls -ld" in capsys.readouterr().out
    (tmp_path / "spool").unlink()
    (tmp_path / "spool").mkdir()
    process = session.start(HOLD_LOCK.replace('"collector"', '"role"'), str(tmp_path / "spool"))
    assert process.stdout is not None
    process.stdout.readline()
    assert run_body(tmp_path, lambda *_: None) is ExitCode.STORAGE
    assert f"kill {process.pid}" in capsys.readouterr().out


def test_the_directory_is_made_for_the_group_and_for_nobody_else(tmp_path: Path) -> None:
    run_body(tmp_path, lambda *_: None)
    assert (tmp_path / "spool").stat().st_mode & 0o7777 == 0o2750


@pytest.mark.parametrize("by_own_thread", [False, True])
def test_a_storage_fault_stays_up_long_enough_for_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_own_thread: bool
) -> None:
    assert lifecycle.program.STORAGE_FAULT_MIN_UPTIME_S >= 5.0
    monkeypatch.setattr(lifecycle.program, "STORAGE_FAULT_MIN_UPTIME_S", 0.7)

    def body(_: Settings, stop: StopRequest) -> None:
        if by_own_thread:
            stop.request("the writer thread failed")
        for _number in range(10):
            stop.wake()
        raise OursError("disk")

    assert took_s(lambda: run_body(tmp_path, body)) >= 0.69


def test_a_signal_cuts_the_stay_of_a_storage_fault_short(tmp_path: Path) -> None:
    def body(_: Settings, __: StopRequest) -> None:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        raise OursError("disk")

    assert took_s(lambda: run_body(tmp_path, body)) < 4


def test_leaving_keeps_the_logs_files_for_who_may_only_read(
    tmp_path: Path, session: Session
) -> None:
    script = """
import pathlib, sys
from lifecycle import ExitCode, leave
from spool import SpoolWriter
writer = SpoolWriter.open(pathlib.Path(sys.argv[1]))
print("out"); sys.stderr.write("err")
leave(ExitCode.STORAGE)
"""
    process = session.start(script, str(tmp_path))
    assert process.communicate(timeout=DEADLINE_S) == ("out\n", "err")
    assert process.returncode == 75
    assert {path.name for path in tmp_path.iterdir()} == {
        "doorbell",
        "spool.db",
        "spool.db-wal",
        "spool.db-shm",
    }


def test_a_program_that_ends_in_time_leaves_no_timer_behind(tmp_path: Path) -> None:
    def body(_: Settings, stop: StopRequest) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.wait(30)

    assert run_body(tmp_path, body) is ExitCode.CLEAN
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
