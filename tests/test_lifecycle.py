"""The lock of a role, the wish to stop, and the watchdog, in real processes."""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lifecycle import (
    AlreadyRunningError,
    InstanceLock,
    StopRequest,
    Watchdog,
)

ROOT = Path(__file__).parent.parent
DEADLINE_S = 20.0


class Session:
    """Starts scripts that import the package, and ends what a test leaves behind."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, script: str, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


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


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    made = StopRequest()
    yield made
    made.close()


def took_s(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


HOLD_LOCK = """
import pathlib, sys
from lifecycle import InstanceLock
lock = InstanceLock(pathlib.Path(sys.argv[1]), "collector")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_of_a_role_is_refused_by_the_firsts_number(
    tmp_path: Path, session: Session
) -> None:
    process = session.start(HOLD_LOCK, str(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(AlreadyRunningError, match=f"process {process.pid}.*kill {process.pid}"):
        InstanceLock(tmp_path, "collector").acquire()
    InstanceLock(tmp_path, "forwarder-pubsub").acquire()
    process.kill()
    process.wait()
    InstanceLock(tmp_path, "collector").acquire()


def test_a_lock_file_that_was_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "collector.lock").write_text("999999999\nold and longer than the new one\n")
    lock = InstanceLock(tmp_path, "collector")
    lock.acquire()
    assert (tmp_path / "collector.lock").read_text() == f"{os.getpid()}\n"


def test_a_stop_is_asked_for_once_and_the_first_reason_is_kept(stop: StopRequest) -> None:
    assert not stop.requested
    stop.request("first")
    stop.request("second")
    assert (stop.requested, stop.reason) == (True, "first")
    assert took_s(lambda: stop.wait(30)) < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait_at_once(stop: StopRequest, number: signal.Signals) -> None:
    stop.install(on_overdue=lambda: None)
    threading.Timer(0.1, os.kill, [os.getpid(), number]).start()
    assert took_s(lambda: stop.wait(30)) < 5
    assert (stop.requested, stop.reason, stop.from_outside) == (True, number.name, True)


def test_a_signal_before_the_wait_is_not_missed(stop: StopRequest) -> None:
    stop.install(on_overdue=lambda: None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert took_s(lambda: stop.wait(30)) < 5


def test_a_wake_up_from_another_thread_ends_a_wait_without_a_stop(stop: StopRequest) -> None:
    threading.Timer(0.1, stop.wake).start()
    assert took_s(lambda: stop.wait(30)) < 5
    assert not stop.requested
    assert took_s(lambda: stop.wait(0.2)) >= 0.19


def test_a_wake_up_can_be_selected_on_and_is_forgotten_when_drained(stop: StopRequest) -> None:
    stop.wake()
    assert select.select([stop], [], [], 0)[0] == [stop]
    stop.drain()
    assert select.select([stop], [], [], 0)[0] == []


def test_any_number_of_wake_ups_never_blocks_who_wakes(stop: StopRequest) -> None:
    for _ in range(200_000):
        stop.wake()
    stop.drain()
    assert took_s(lambda: stop.wait(0.1)) >= 0.09


def test_waiting_for_no_time_returns_at_once(stop: StopRequest) -> None:
    assert not stop.wait(0)
    assert not stop.wait(-1)


def test_a_wish_of_the_programs_own_is_not_one_from_outside(stop: StopRequest) -> None:
    stop.request("the writer thread failed")
    assert not stop.from_outside
    assert took_s(lambda: stop.sleep(0.1)) < 5


def test_a_wake_up_after_the_end_is_no_error() -> None:
    made = StopRequest()
    made.close()
    made.wake()


OVERDUE = """
import os, signal, threading, time
from lifecycle import ExitCode, StopRequest, leave
stop = StopRequest()
stop.install(lambda: leave(ExitCode.CLEAN), 0.3)
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
{stuck}
print("never")
"""


@pytest.mark.parametrize(
    "stuck",
    [
        "threading.Event().wait()",
        "import socket; near, far = socket.socketpair(); near.recv(1)",
        "time.sleep(60)",
    ],
)
def test_a_program_that_does_not_end_after_a_signal_is_ended_in_time(
    session: Session, stuck: str
) -> None:
    process = session.start(OVERDUE.format(stuck=stuck))
    assert process.communicate(timeout=DEADLINE_S) == ("", "")
    assert process.returncode == 0


ORPHAN = """
import os, sys, time
from lifecycle import StopRequest
if os.fork() == 0:
    stop = StopRequest(supervised=True)
    print("up", flush=True)
    ended = stop.wait(0.01)
    while not stop.wait(0.05):
        pass
    print(stop.reason, stop.from_outside, flush=True)
    os._exit(0)
sys.stdin.readline()
os._exit(0)
"""


def test_a_supervisor_that_is_gone_is_a_reason_to_stop(session: Session) -> None:
    process = session.start(ORPHAN)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "up\n"
    process.stdin.write("die\n")
    process.stdin.flush()
    assert process.stdout.readline() == "the supervisor is gone True\n"


STUCK = """
import sys, time
from lifecycle import Watchdog
watchdog = Watchdog(["network", "writer"], float(sys.argv[1]))
watchdog.beat("network")
watchdog.beat("writer")
def stuck_here():
    {stuck}
stuck_here()
"""


@pytest.mark.parametrize(
    "stuck",
    [
        "time.sleep(60)",
        # one C call that never lets go of the interpreter lock
        "sum(range(10**12))",
        "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
        "import threading; threading.Lock().acquire() and threading.Event().wait(60)",
        # one of two loops goes on turning
        "[(watchdog.beat('network'), time.sleep(0.01)) for _ in range(6000)]",
        # and is allowed long work again and again
        "[(watchdog.beat('network'), watchdog.allow(0.1), time.sleep(0.01)) for _ in range(6000)]",
    ],
)
def test_a_stuck_process_ends_itself_and_prints_its_stacks(session: Session, stuck: str) -> None:
    began = time.monotonic()
    process = session.start(STUCK.format(stuck=stuck), "0.5")
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert time.monotonic() - began < DEADLINE_S
    assert process.returncode == 1
    assert "Timeout" in errors
    assert "stuck_here" in errors


def test_a_process_that_turns_or_has_disarmed_lives(session: Session) -> None:
    script = """
import time
import lifecycle.watchdog
from lifecycle import Watchdog
lifecycle.watchdog.REARM_INTERVAL_S = 0.05
watchdog = Watchdog(["a", "b"], 0.5)
for _ in range(20):
    watchdog.beat("a"); watchdog.beat("b"); time.sleep(0.05)
watchdog.stop()
time.sleep(1)
print("alive")
"""
    process = session.start(script)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert (output, errors, process.returncode) == ("alive\n", "", 0)


def test_the_watchdog_is_armed_only_once_all_loops_turn_and_then_at_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    armed: list[float] = []
    now = 100.0
    monkeypatch.setattr(
        "faulthandler.dump_traceback_later", lambda timeout_s, **_: armed.append(timeout_s)
    )
    watchdog = Watchdog(["a", "b"], 7.0, clock=lambda: now)
    for _ in range(5):
        watchdog.beat("a")
    assert armed == []
    watchdog.beat("b")
    assert armed == [7.0]
    for _ in range(100):
        watchdog.beat("a")
        watchdog.beat("b")
    assert armed == [7.0]
    now += 5.0
    watchdog.beat("a")
    assert armed == [7.0, 7.0]
