"""Locks, the wish to stop, the watchdog and exit codes, with real processes where it counts."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from lifecycle import (
    AlreadyRunningError,
    ExitCode,
    InstanceLock,
    Program,
    Settings,
    StopRequest,
    run,
)
from lifecycle.program import STORAGE_FAULT_MIN_UPTIME_S

LONG_S = 20.0


class _StorageError(Exception):
    pass


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_lock_refuses_a_second_process_and_names_the_first(tmp_path: Path) -> None:
    lock = InstanceLock(tmp_path, "collector")
    lock.acquire()
    code = (
        "import sys; from pathlib import Path; from lifecycle import *\n"
        "try: InstanceLock(Path(sys.argv[1]), 'collector').acquire()\n"
        "except AlreadyRunningError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert f"process {os.getpid()}" in result.stdout
    InstanceLock(tmp_path, "forwarder-pubsub").acquire()
    with pytest.raises(AlreadyRunningError):
        InstanceLock(tmp_path, "collector").acquire()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from lifecycle import *\n"
        "InstanceLock(Path(sys.argv[1]), 'x').acquire(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    InstanceLock(tmp_path, "x").acquire()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait_at_once(number: signal.Signals) -> None:
    code = (
        "import os, signal, time; from lifecycle import *\n"
        "stop = StopRequest(); stop.install(lambda: None)\n"
        "import threading\n"
        f"threading.Timer(0.1, os.kill, (os.getpid(), {int(number)})).start()\n"
        "begun = time.monotonic(); assert stop.wait(30); assert stop.from_outside\n"
        "assert time.monotonic() - begun < 10; print(stop.reason)\n"
    )
    assert python(code).stdout.strip() == number.name


def test_a_thread_can_wake_the_wait_without_stopping_it() -> None:
    stop = StopRequest()
    threading.Timer(0.05, stop.wake).start()
    begun = time.monotonic()
    assert stop.wait(LONG_S) is False
    assert time.monotonic() - begun < LONG_S / 2
    stop.request("a reason")
    stop.request("a later one")
    assert stop.wait(LONG_S) is True
    assert stop.reason == "a reason"
    stop.close()
    stop.wake()


def test_many_wake_ups_block_nobody() -> None:
    stop = StopRequest()
    for _ in range(100_000):
        stop.wake()
    stop.wait(0)
    assert not stop.requested
    stop.close()


def test_a_supervised_program_ends_when_its_supervisor_is_gone(tmp_path: Path) -> None:
    mark = tmp_path / "reason"
    child = (
        "import sys; from pathlib import Path; from lifecycle import *\n"
        "stop = StopRequest(supervised=True); print('up', flush=True)\n"
        "while not stop.wait(0.05): pass\n"
        "Path(sys.argv[1]).write_text(stop.reason)\n"
    )
    parent = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]],"
        " stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", parent, child, str(mark)], check=False)
    deadline = time.monotonic() + LONG_S
    while not (mark.exists() and mark.read_text(encoding="ascii")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert mark.read_text(encoding="ascii") == "the supervisor is gone"


STUCK = """
import sys, time
from lifecycle import Watchdog
dog = Watchdog(["network", "writer"], 0.5, clock=lambda: 0.0)
dog.beat("network"); dog.beat("writer")
def stuck_here():
    {body}
stuck_here()
print("survived")
"""


def test_a_stuck_process_ends_and_shows_its_stacks() -> None:
    # Regular expressions of this kind hold the interpreter lock for longer than a lifetime.
    result = python(STUCK.format(body="import re; re.match('(a+)+$', 'a' * 60 + 'b')"))
    assert result.returncode == 1
    assert "stuck_here" in result.stderr
    assert "survived" not in result.stdout


def test_a_loop_that_stands_still_is_not_covered_by_the_other() -> None:
    body = (
        "global now; now = 0.0\n"
        "    dog._clock = lambda: time.monotonic() * 1000\n"
        "    while True: dog.beat('network'); time.sleep(0.01)"
    )
    assert python(STUCK.format(body=body)).returncode == 1


def program(body: Callable[[Settings, StopRequest], None]) -> Program:
    return Program("test", body, {_StorageError: ExitCode.STORAGE})


def environment(tmp_path: Path) -> dict[str, str]:
    # A directory of its own each time: a lock is held until its process ends.
    return {"APP_ENV": "LOCAL", "SPOOL_DIR": str(tmp_path / uuid.uuid4().hex)}


def failing(error: Exception) -> Callable[[Settings, StopRequest], None]:
    def body(_settings: Settings, _stop: StopRequest) -> None:
        raise error

    return body


def test_exit_codes_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(program(lambda *_: None), environment(tmp_path)) is ExitCode.CLEAN
    assert run(program(failing(ZeroDivisionError("x"))), environment(tmp_path)) is ExitCode.BUG
    assert run(program(lambda *_: None), {"APP_ENV": "X"}) is ExitCode.CONFIG
    assert run(program(lambda *_: None), {"SLUICE_ENV_FILE": "/no"}) is ExitCode.CONFIG
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_storage_fault_stays_up_long_enough_never_to_be_fatal(tmp_path: Path) -> None:
    begun = time.monotonic()
    code = run(program(failing(_StorageError("the disk"))), environment(tmp_path))
    assert code is ExitCode.STORAGE
    assert time.monotonic() - begun >= STORAGE_FAULT_MIN_UPTIME_S - 0.5


def test_the_spool_directory_is_closed_to_strangers(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert run(program(lambda *_: None), environment(tmp_path)) is ExitCode.CLEAN
    finally:
        os.umask(before)
    (spool_dir,) = tmp_path.iterdir()
    assert spool_dir.stat().st_mode & 0o7777 == 0o2750
    assert (spool_dir / "test.lock").stat().st_mode & 0o777 == 0o640


def test_a_program_that_does_not_end_is_ended_in_time() -> None:
    code = (
        "import os, signal, threading; from lifecycle import *\n"
        "stop = StopRequest(); stop.install(lambda: leave(ExitCode.CLEAN), 0.3)\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "threading.Event().wait(); print('never')\n"
    )
    begun = time.monotonic()
    result = python(code)
    assert (result.returncode, result.stdout) == (0, "")
    assert time.monotonic() - begun < LONG_S
