"""Storage that fails at the Nth call of its kind, put there by strace.

In every round each of the three programs lives once with a fault of its own. It has to end with
exit code 75, or to ride it out; it may take nothing for corruption that is none; and when it has
been started again without a fault, everything adds up.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import COLLECTOR, PROGRAMS, Packet, Program, Rig, wait_until
from tests.torture.ledger import Lawful, reckon
from tests.torture.report import Report
from tests.torture.wiretap import WireTap

ROUNDS_PER_SYSTEM = 8
"""Then a new one, whose first files are made under faults as well."""

ROUNDS_PER_RECKONING = 4
LIFE_S = 4.0
"""How long a program may take to come to its fault."""

BATCHES, BATCH_READINGS = 4, 40
PADDING_BYTES = 12_000
"""So that a round fills the write-ahead log to its checkpoint at 1,000 pages."""

SETTLE_TIMEOUT_S = 60.0
SLOW_FSYNC_US = 200_000
SLOW_READINGS = 6_000
_INJECTED = "(INJECTED)"
_LAWFUL_CODES = {0, 75}
_RETENTION_HOURS = "0.0003"
"""A second: pruning is part of what is swept."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One tampered system call."""

    call: str
    action: str
    """In strace's words."""
    when: str
    """Which one: ``N``, or ``N+`` for that one and all later ones."""

    def __str__(self) -> str:
        """Return it as strace would be told."""
        return f"{self.call}:{self.action}:when={self.when}"


IN_PART = "in part"
"""The write across a limit of the file's size ends there, and the rest of it fails: as on a disk
that is full. Of the collector alone: the limit is one for all files of a process, and a
forwarder's log may be longer than what it writes to its database."""

_STEP_BYTES = 700
"""So that the limit lies anywhere in a page."""

_LOG_SPARE_BYTES = 64 * 1024
_IN_PART = re.compile(r'^\d+ +pwrite64\(\d+, ""\.*, (\d+), \d+\) += (\d+)$', re.MULTILINE)

_GRID: Mapping[str, tuple[Sequence[str], Sequence[int]]] = {
    # retval=0 is a short write of nothing: strace cannot let a part be written, and a made-up
    # number would be a disk that lies.
    "pwrite64": (
        ("error=EIO", "error=ENOSPC", "error=EINTR", "error=EROFS", "retval=0", IN_PART),
        (1, 2, 5, 12, 30, 80, 200, 600, 1100),
    ),
    "fdatasync": (
        ("error=EIO", "error=ENOSPC", "error=EINTR", "error=EDQUOT"),
        (1, 2, 3, 4, 6, 9, 14),
    ),
    "ftruncate": (("error=EIO", "error=EINTR", "error=EPERM"), (1, 2, 3)),
    "openat": (
        ("error=EMFILE", "error=ENFILE", "error=EACCES", "error=EIO", "error=EROFS"),
        (1, 2, 3, 4, 5, 6),
    ),
    "pread64": (("error=EIO", "error=EINTR"), (1, 2, 4, 9, 25, 60)),
    "fcntl": (("error=EIO", "error=ENOLCK"), (1, 3, 7, 15, 40)),
    # stat(), as the C library makes it.
    "newfstatat": (("error=EIO",), (1, 2, 5, 12, 40)),
}
_QUIET_PLACES = 5
_A_READ_THAT_FAILS = ("pread64", "error=EIO")
"""SQLite reports it as SQLITE_CORRUPT, like a damaged page. A forwarder looks twice; what the
collector sets aside for it is salvaged whole, but under new numbers, so it is left out here."""

_LASTING = {"error=ENOSPC", "error=EIO", "error=EROFS", "error=EMFILE", "error=EACCES"}
_FILES = {
    COLLECTOR: ("spool",),
    "forwarder-pubsub": ("pubsub", "spool"),
    "forwarder-bigquery": ("bigquery", "spool"),
}


def available() -> bool:
    """Return whether system calls can be tampered with here."""
    strace = shutil.which("strace")
    return (
        strace is not None
        and subprocess.run(
            [strace, "-qq", "-o", "/dev/null", "true"], check=False, capture_output=True
        ).returncode
        == 0
    )


def _may_last(call: str, action: str) -> bool:
    """Return whether the fault may stay; a page that can never be read is damage."""
    return action in _LASTING and (call, action) != _A_READ_THAT_FAILS


def deck(dice: random.Random, *, busy: bool) -> Iterator[Fault]:
    """Yield faults without end: in each layer every action once, at a place drawn for it.

    Args:
        dice: Draws.
        busy: Whether the program makes many calls; the later places are for those.
    """
    while True:
        layer = []
        for call, (actions, places) in _GRID.items():
            for action in actions:
                if busy and (call, action) == _A_READ_THAT_FAILS:
                    continue
                if action == IN_PART and not busy:
                    continue
                lasting = "+" if _may_last(call, action) and dice.random() < 0.25 else ""
                place = dice.choice(places[: len(places) if busy else _QUIET_PLACES])
                layer.append(Fault(call, action, f"{place}{lasting}"))
        dice.shuffle(layer)
        yield from layer


def tampering(rig: Rig, role: str, fault: Fault, log: Path) -> list[str]:
    """Return what to put before a program's command so that it meets ``fault``.

    Args:
        rig: Only calls on the program's database files there count.
        role: Which program.
        fault: What happens.
        log: Where strace notes it.
    """
    watched = watching(rig.books.directory, role, fault.call, log)
    if fault.action != IN_PART:
        return [*watched, "-e", f"inject={fault}"]
    own = rig.books.directory / f"{_FILES[role][0]}.db-wal"
    begin = own.stat().st_size if own.exists() else 0
    spare = rig.programs[role].log
    least = (spare.stat().st_size if spare.exists() else 0) + _LOG_SPARE_BYTES
    limit = max(begin, least) + _STEP_BYTES * int(fault.when)
    return [*watched, "prlimit", f"--fsize={limit}"]


def watching(spool_dir: Path, role: str, call: str, log: Path) -> list[str]:
    """Return what to put before a program's command so that its calls are noted.

    Args:
        spool_dir: Only calls on the program's database files there count.
        role: Which program.
        call: Which system call.
        log: Where strace notes it.
    """
    paths = [
        f"-P{spool_dir / name}.db{suffix}"
        for name in _FILES[role]
        for suffix in ("", "-wal", "-shm")
    ]
    # -D: the process that is started, and signalled, is the program; strace stands behind it.
    return [
        *("strace", "-D", "-f", "--seccomp-bpf", "-qq", "-s", "0", "-e", "signal=none"),
        *("-o", str(log), *paths, "-e", f"trace={call}"),
    ]


def taken_in_part(log: Path) -> list[tuple[int, int]]:
    """Return the writes of a log that were not whole: bytes asked for, and bytes written."""
    text = log.read_text(errors="replace") if log.exists() else ""
    writes = ((int(asked), int(taken)) for asked, taken in _IN_PART.findall(text))
    return [(asked, taken) for asked, taken in writes if taken < asked]


def _met(fault: Fault, log: Path) -> bool:
    """Return whether the fault has happened."""
    if fault.action == IN_PART:
        return bool(taken_in_part(log))
    return log.exists() and _INJECTED in log.read_text(errors="replace")


def run(rounds: int, seed: int, *, until: float = float("inf")) -> Report:
    """Sweep the faults: ``rounds`` lives of each program, each with one of its own.

    Args:
        rounds: How many.
        seed: Of which fault comes when.
        until: time.monotonic() at which to end early.
    """
    report = Report("storage faults", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    decks = {
        role: deck(random.Random(dice.random()), busy=role == COLLECTOR)  # noqa: S311
        for role in PROGRAMS
    }
    while report.rounds < rounds and time.monotonic() < until and not report.violations:
        count = min(ROUNDS_PER_SYSTEM, rounds - report.rounds)
        with system() as (rig, tap):
            for number in range(1, count + 1):
                plan = {role: next(decks[role]) for role in PROGRAMS}
                report.violations += live(rig, plan, report)
                report.rounds += 1
                if report.violations or number % ROUNDS_PER_RECKONING == 0 or number == count:
                    report.violations += settle(rig, tap, report)
                if report.violations:
                    report.violations += [f"{name}: {text}" for name, text in rig.logs()]
                    break
    return report


@contextmanager
def system() -> Iterator[tuple[Rig, WireTap]]:
    """Give out a system with its broker up, its wire tapped, and a publisher that is let in."""
    with (
        WireTap() as tap,
        Rig(MQTT_PORT=str(tap.port), SPOOL_RETENTION_HOURS=_RETENTION_HOURS) as rig,
    ):
        tap.upstream = rig.broker.port
        rig.broker.start()
        yield rig, tap


def packets(rig: Rig, count: int) -> list[Packet]:
    """Return the plant's next readings, made large."""
    padding = b',"padding":"' + b"x" * PADDING_BYTES + b'"}'
    return [
        Packet(s.topic.encode(), s.payload[:-1] + padding, sample=s)
        for s in rig.plant.samples(count)
    ]


def command(role: str) -> list[str]:
    """Return how a program is started."""
    module, _, sink = role.partition("-")
    return [sys.executable, "-m", module, *([sink] if sink else [])]


def live(rig: Rig, plan: Mapping[str, Fault], report: Report) -> list[str]:
    """Let each program live once with its fault, under traffic; return what was unlawful."""
    for mark in rig.spool_dir.glob("*.suspected"):
        mark.unlink()  # two read errors are further apart than two lives here
    logs = {role: rig.directory / f"{role}.strace" for role in plan}
    lives: dict[str, Program] = {}
    for role, fault in plan.items():
        logs[role].unlink(missing_ok=True)
        prefix = tampering(rig, role, fault, logs[role])
        lives[role] = rig.programs[role] = Program(
            role, [*prefix, *command(role)], rig.variables, rig.directory / f"{role}.log"
        )
        lives[role].start()
    deadline = time.monotonic() + LIFE_S
    subscribed = rig.books.rows("spool", "SELECT 1 FROM meta WHERE key = 'mqtt_subscription'")
    for _ in range(BATCHES if subscribed else 0):
        rig.publisher.publish(packets(rig, BATCH_READINGS))

    def met(role: str) -> bool:
        return _met(plan[role], logs[role]) or not lives[role].running

    while time.monotonic() < deadline and not all(met(role) for role in plan):
        time.sleep(0.05)
    # The stop comes in any case, with its checkpoint: that too is swept.
    for life in lives.values():
        if life.running:
            life.signal(signal.SIGTERM)
    return [
        text for role, fault in plan.items() for text in _verdict(rig, lives[role], fault, report)
    ]


def _verdict(rig: Rig, life: Program, fault: Fault, report: Report) -> list[str]:
    code = life.wait()
    injected = _met(fault, rig.directory / f"{life.name}.strace")
    report.counts["faults met" if injected else "faults not reached"] += 1
    report.counts[f"{fault.call} {fault.action}"] += injected
    report.counts[f"exit {code}"] += 1
    unlawful = []
    if code not in _LAWFUL_CODES:
        unlawful.append(f"{life.name} ended with {code} by {fault}")
    if code and not injected:
        unlawful.append(f"{life.name} ended with {code} without {fault}")
    damaged = [p.name for p in rig.spool_dir.glob(f"{_FILES[life.name][0]}.db.damaged-*")]
    if damaged:
        unlawful.append(f"{life.name}, {fault}: taken for corruption: {damaged}")
    return unlawful


def start_whole(rig: Rig) -> None:
    """Start all programs as they are, without faults."""
    for role in PROGRAMS:
        if rig.programs[role].running:
            continue
        rig.programs[role] = Program(
            role, command(role), rig.variables, rig.directory / f"{role}.log"
        )
        rig.programs[role].start()
    rig.wait_for_session()


def settle(rig: Rig, tap: WireTap, report: Report) -> list[str]:
    """Let unharmed programs finish; return what does not add up."""
    start_whole(rig)
    rig.publisher.publish(packets(rig, BATCH_READINGS))
    last = rig.publisher.acknowledged[-1].payload
    try:
        wait_until(lambda: last in tap.acknowledged[-2_000:], SETTLE_TIMEOUT_S, "all is taken")
        wait_until(
            lambda: all(s.pending == 0 for s in rig.books.figures().sinks.values()),
            SETTLE_TIMEOUT_S,
            "all is delivered",
        )
    except AssertionError as failure:
        return [f"after the faults, without any: {failure}"]
    codes = {role: rig.programs[role].stop()[0] for role in PROGRAMS}
    ledger = reckon(rig, tap, Lawful(order_by="number"))
    report.counts["reckonings"] += 1
    report.counts["lost by the broker"] += ledger.lost_by_broker
    for sink, one in ledger.sinks.items():
        report.counts[f"{sink} lost"] += one.lost
        report.counts[f"{sink} repeated"] += one.repeated
    wrong = [f"{role} ended with {code}" for role, code in codes.items() if code]
    return ledger.violations + wrong


def slow_disk(rig: Rig) -> tuple[int, int]:
    """Let the collector work on a disk of 200 ms a sync; return readings, and syncs they took."""
    log = rig.directory / "slow.strace"
    fault = Fault("fdatasync", f"delay_exit={SLOW_FSYNC_US}", "1+")
    prefix = tampering(rig, COLLECTOR, fault, log)
    rig.programs[COLLECTOR] = Program(
        COLLECTOR, [*prefix, *command(COLLECTOR)], rig.variables, rig.directory / "collector.log"
    )
    rig.programs[COLLECTOR].start()
    rig.wait_for_session()
    before = log.read_text(errors="replace").count("fdatasync(")
    rig.publish(SLOW_READINGS)
    rig.wait_until_spooled()
    return SLOW_READINGS, log.read_text(errors="replace").count("fdatasync(") - before
