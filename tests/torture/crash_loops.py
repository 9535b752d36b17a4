"""Crash loops under a real supervisord: what passes is survived, and exit code 78 does not loop.

Programs are killed as soon as they appear, until supervisord has given them up; their Python goes
away; their settings are wrong for a while. Each time everything must run again without an
operator, with nothing lost.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.harness import PROGRAMS, Rig, Supervisor, wait_until
from tests.torture.report import Report

RESTARTER = "restarter"
EVERYTHING = (*PROGRAMS, RESTARTER)
GIVE_UP_TIMEOUT_S = 90.0
"""supervisord waits 1 + 2 + 3 + 4 + 5 s between its tries; the rest is the machine's."""
RECOVERY_TIMEOUT_S = 60.0
TICK_S = 5.0
"""How often the restarter looks (TICK_5)."""
READINGS = 50
LOG_DISK_BYTES = 16 * 1024 * 1024

Fault = Callable[[Rig, Supervisor, Report], None]


def children(supervisor: Supervisor) -> dict[str, int]:
    """Return name and process id of what supervisord has started; faster than asking it."""
    found: dict[str, int] = {}
    task = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children")
    for pid in map(int, task.read_text(encoding="ascii").split()):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"-m" in words:
                module, *rest = (w.decode() for w in words[words.index(b"-m") + 1 :] if w)
                name = "-".join([module, *rest]) if module != "lifecycle" else RESTARTER
                found[name] = pid
    return found


def log_of(rig: Rig, name: str) -> str:
    """Return what a program, or supervisord, has written."""
    path = rig.directory / "log" / f"{name}.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def count(rig: Rig, event: str, name: str) -> int:
    """Return how often supervisord has logged ``event`` for a program."""
    return len(re.findall(rf"{event}:? '?{name}'?[ ,]", log_of(rig, "supervisord")))


def _settings(rig: Rig) -> Path:
    return rig.directory / "etc" / "sluice.env"


@contextlib.contextmanager
def _changed(path: Path, text: str) -> Iterator[None]:
    before = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    yield
    path.write_text(before, encoding="utf-8")


def kill_loop(rig: Rig, supervisor: Supervisor, report: Report) -> None:
    """Kill everything as soon as it appears, until supervisord has given up every program."""
    given_up = {name: count(rig, "gave up", name) for name in PROGRAMS}
    kills: Counter[str] = Counter()

    def all_given_up() -> bool:
        for name, pid in children(supervisor).items():
            if count(rig, "gave up", name) == given_up.get(name, 0):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                kills[name] += 1
        return all(count(rig, "gave up", n) > before for n, before in given_up.items())

    wait_until(all_given_up, GIVE_UP_TIMEOUT_S, "supervisord has given up every program")
    report.counts["kills"] += kills.total()


def missing_python(rig: Rig, supervisor: Supervisor, report: Report) -> None:
    """Take the Python environment away, and with it everything that runs, until all is given up."""
    venv, away = rig.directory / "venv", rig.directory / "venv.away"
    given_up = {name: count(rig, "gave up", name) for name in PROGRAMS}
    venv.rename(away)
    for pid in children(supervisor).values():
        os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: all(count(rig, "gave up", n) > before for n, before in given_up.items()),
        GIVE_UP_TIMEOUT_S,
        "supervisord has given up every program",
    )
    away.rename(venv)
    report.counts["python missing"] += 1


def full_log_disk(rig: Rig, supervisor: Supervisor, report: Report) -> None:
    """Kill everything twice while neither supervisord nor a program can write a line of log."""
    if not (rig.directory / "log").is_mount():
        return  # only where it has a file system of its own: never fill the machine's
    with _filled(rig.directory / "log" / "fill"):
        for _ in range(2):
            before = children(supervisor)
            for pid in before.values():
                os.kill(pid, signal.SIGKILL)
            wait_until(
                lambda seen=before: all(  # type: ignore[misc]
                    children(supervisor).get(name, pid) != pid for name, pid in seen.items()
                ),
                RECOVERY_TIMEOUT_S,
                "supervisord has started everything again without its log",
            )
        _recover(rig, supervisor)
    report.counts["log disk full"] += 1


@contextlib.contextmanager
def _filled(path: Path) -> Iterator[None]:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    path.unlink()


@contextlib.contextmanager
def _small_log_disk(rig: Rig) -> Iterator[None]:
    """Give the logs a file system of their own, where this user may mount one."""
    log = rig.directory / "log"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={LOG_DISK_BYTES}", "tmpfs", str(log)]
    mounted = os.getuid() == 0 and subprocess.run(mount, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(log)], check=True)


def wrong_settings(rig: Rig, supervisor: Supervisor, report: Report) -> None:
    """Put a wrong value into the settings file; correct it once nothing is tried any more."""
    with _changed(_settings(rig), _settings(rig).read_text() + "\nMQTT_PORT=none\n"):
        _refused(rig, supervisor, report)


def missing_password(rig: Rig, supervisor: Supervisor, report: Report) -> None:
    """Let the settings name a file that is not there; the file comes, the settings stay."""
    password = rig.directory / f"password-{report.rounds}"
    with _settings(rig).open("a", encoding="utf-8") as file:
        file.write(f"\nMQTT_USERNAME=gate\nMQTT_PASSWORD_FILE={password}\n")
    _refused(rig, supervisor, report)
    password.write_text("secret", encoding="utf-8")


def _refused(rig: Rig, supervisor: Supervisor, report: Report) -> None:
    """Restart all; every program must end up FATAL and must not be tried again and again."""
    told = {name: _tellings(rig, name) for name in PROGRAMS}
    for pid in [pid for name, pid in children(supervisor).items() if name != RESTARTER]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: all(_tellings(rig, name) > before for name, before in told.items()),
        GIVE_UP_TIMEOUT_S,
        "the restarter has found every program refused",
    )
    before = {name: count(rig, "spawned", name) for name in PROGRAMS}
    # The claim is that nothing happens, although the restarter looks at least once.
    time.sleep(TICK_S + 1.0)
    after = {name: count(rig, "spawned", name) for name in PROGRAMS}
    if after != before:
        report.violations.append(f"exit code 78 is tried again: {before} became {after}")
    states = supervisor.states()
    if {states.get(name) for name in PROGRAMS} != {"FATAL"}:
        report.violations.append(f"exit code 78 does not show as FATAL: {states}")
    report.counts["refused"] += 1


def _tellings(rig: Rig, name: str) -> int:
    text = log_of(rig, RESTARTER)
    return len(re.findall(rf'program stays FATAL.*"program": "{name}"', text))


FAULTS: dict[str, Fault] = {
    "kill loop": kill_loop,
    "missing python": missing_python,
    **({"full log disk": full_log_disk} if os.getuid() == 0 else {}),
    "wrong settings": wrong_settings,
    "missing password": missing_password,
}


def run(rounds: int, seed: int, *, only: str = "") -> Report:
    """Let ``rounds`` faults pass, each followed by readings that must reach both services.

    Args:
        rounds: How many.
        seed: Of which.
        only: This fault alone.
    """
    report = Report("crash_loops", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    deck: list[str] = []
    with Rig() as rig:
        rig.broker.start()
        supervisor = Supervisor(rig)
        with _small_log_disk(rig), supervisor.supervising(wait=False):
            while report.rounds < rounds and not report.violations:
                deck = deck or ([only] if only else dice.sample(list(FAULTS), len(FAULTS)))
                name = deck.pop()
                report.rounds += 1
                report.counts[name] += 1
                try:
                    FAULTS[name](rig, supervisor, report)
                    _recover(rig, supervisor)
                except AssertionError as failure:
                    report.violations.append(f"{name}, round {report.rounds}: {failure}")
                    report.violations += [f"{log}: {text}" for log, text in rig.logs()]
    return report


def _recover(rig: Rig, supervisor: Supervisor) -> None:
    wait_until(
        lambda: {*children(supervisor)} >= {*EVERYTHING},
        RECOVERY_TIMEOUT_S,
        "every program was started again",
    )
    supervisor.wait_until_running()
    rig.wait_for_session()
    rig.publish(READINGS)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()
