"""Older copies of files that are put back, and clones that run at the same time as their original.

The forwarder is the real process, stopped for the moment in which its files are copied, as a
disk's snapshot does it; the services are the fakes. Whatever a machine holds in the end has to be
in the table. There twice may be what waited in a copy when it was taken, and as many rows as the
machines have counted themselves.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc

from spool import SpoolWriter, claim_environment
from tests.fakes import FakeWriteApi
from tests.harness import IMPATIENT, Program, wait_until
from tests.harness.books import Books
from tests.harness.cloud import Cloud
from tests.test_spool_writer import new_reading
from tests.torture.report import Report

SETTLED_S = 40.0
MOMENT_MAX_S = 0.4
AWAY_S = 0.4
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens in one round."""

    clone: bool
    """Whether the original goes on at the same time as the copy, or is gone when it is put back."""
    before: int
    """How many readings come before the copy."""
    since: int
    """How many the original receives after it."""
    own: int
    """How many the copy receives, of its own."""
    fault: str
    """What befalls the copy's first appends: one of FAULTS."""
    busy: bool
    """Whether the files are copied while the forwarder delivers."""

    @classmethod
    def drawn(cls, dice: random.Random) -> "Plan":
        """Return a random one."""
        sizes = (1, 3, 40, 250, 1_000, 2_500)
        before, since, own = (dice.choice(sizes) for _ in range(3))
        return cls(
            clone=dice.random() < 0.4,
            before=before,
            since=since,
            own=since if dice.random() < 0.4 else own,
            fault=dice.choice(list(FAULTS)),
            busy=dice.random() < 0.5,
        )


def _away(api: FakeWriteApi) -> Callable[[], None]:
    api.stop()
    return api.start  # type: ignore[return-value]


def _nothing() -> None:
    """Need no end."""


def _planned(plan: Callable[[FakeWriteApi], object], api: FakeWriteApi) -> Callable[[], None]:
    plan(api)
    return _nothing


FAULTS: Mapping[str, Callable[[FakeWriteApi], Callable[[], None]]] = {
    "none": lambda _: _nothing,
    "refused connections": _away,
    "a cut": partial(_planned, lambda api: api.faults.cut()),
    "cuts": partial(_planned, lambda api: api.faults.cut(times=3)),
    "a lost answer": partial(_planned, lambda api: api.faults.lose_answer()),
    "lost answers": partial(_planned, lambda api: api.faults.lose_answer(times=2)),
    "unavailable": partial(
        _planned, lambda api: api.faults.abort(grpc.StatusCode.UNAVAILABLE, "away", times=2)
    ),
    "internal, and taken": partial(
        _planned, lambda api: api.faults.refuse("INTERNAL", carried_out=True)
    ),
}
"""Each begins a fault and returns what ends it."""


@dataclass
class Image:
    """A copy of a machine's files."""

    directory: Path
    rows: list[int]
    cursor: int
    repeated: int


class Machine:
    """A spool that this process fills, and a forwarder.

    Args:
        directory: SPOOL_DIR.
        environment: The forwarder's variables.
        command: How to start it.
        image: What the directory is a copy of.
    """

    def __init__(
        self,
        directory: Path,
        environment: Mapping[str, str],
        command: Sequence[str],
        image: Image | None = None,
    ) -> None:
        self.directory = directory
        self.rows = list(image.rows) if image else []
        self._repeated_before = image.repeated if image else 0
        self._writer = SpoolWriter.open(directory)
        if image is None:
            claim_environment(self._writer, "DEV", [])
        variables = {**environment, "SPOOL_DIR": str(directory)}
        log = directory.parent / f"{directory.name}.log"
        self.forwarder = Program(
            directory.name, [sys.executable, *command, "bigquery"], variables, log
        )

    def receive(self, numbers: Sequence[int]) -> None:
        """Spool readings; each has its number as value."""
        now_us = time.time_ns() // 1000
        self.rows += numbers
        rows = [
            new_reading(n, value=float(n), received_us=now_us, timestamp_us=now_us) for n in numbers
        ]
        self._writer.append(rows, [], {})

    @property
    def cursor(self) -> int:
        """The seq through which all is settled."""
        return _number(self.directory, "SELECT seq FROM cursor")

    @property
    def repeated(self) -> int:
        """How many rows it has counted as possibly repeated itself."""
        return _repeated(self.directory) - self._repeated_before

    def wait_until_settled(self) -> None:
        """Wait until all is delivered."""
        wait_until(
            lambda: self.cursor == len(self.rows),
            SETTLED_S,
            f"{self.directory.name}: all {len(self.rows)} are settled\n"
            f"{self.forwarder.last_words()}",
        )

    def copy(self, directory: Path) -> Image:
        """Copy the files at one moment, as a snapshot of the disk does."""
        running = self.forwarder.running
        if running:
            self.forwarder.signal(signal.SIGSTOP)
        # Not by this process: closing a file that it has open in SQLite would lose its locks.
        subprocess.run(["cp", "-a", str(self.directory), str(directory)], check=True)
        if running:
            self.forwarder.signal(signal.SIGCONT)
        return Image(
            directory,
            list(self.rows),
            _number(directory, "SELECT seq FROM cursor"),
            _repeated(directory),
        )

    def close(self) -> None:
        """Switch it off."""
        self.forwarder.kill()
        self._writer.close()


def _number(directory: Path, sql: str) -> int:
    found = Books(directory).rows("bigquery", sql)
    return int(found[0][0]) if found else 0


def _repeated(directory: Path) -> int:
    return _number(directory, "SELECT value FROM counter WHERE name = 'possibly_repeated'")


@dataclass
class Site:
    """The services, and machines in a directory of their own."""

    cloud: Cloud
    directory: Path
    command: Sequence[str]
    machines: list[Machine] = field(default_factory=list)
    numbers: int = 0

    def machine(self, image: Image | None = None) -> Machine:
        """Return a new machine, or one with an image for its disk."""
        directory = image.directory if image else self.directory / f"m{len(self.machines)}"
        directory.mkdir(exist_ok=True)
        environment = {
            "APP_ENV": "DEV",
            "INSTANCE_ID": "gate",
            "PUBSUB_ENABLED": "false",
            **self.cloud.environment(),
        }
        made = Machine(directory, environment, self.command, image)
        self.machines.append(made)
        return made

    def readings(self, count: int) -> list[int]:
        """Return the numbers of new readings."""
        first = self.numbers + 1
        self.numbers += count
        return list(range(first, first + count))


@contextmanager
def site(command: Sequence[str]) -> Iterator[Site]:
    """Let the services serve; end all machines in the end."""
    directory = Path(tempfile.mkdtemp(prefix="sluice-restores-"))
    cloud = Cloud()
    made = Site(cloud, directory, command)
    cloud.start_bigquery()
    try:
        yield made
    finally:
        for machine in made.machines:
            machine.close()
        cloud.write_api.faults.clear()
        cloud.stop_bigquery()
        shutil.rmtree(directory)


def suffer(plan: Plan, dice: random.Random, report: Report, command: Sequence[str] = ()) -> None:
    """Carry a plan out, and note in the report what came of it.

    Raises:
        AssertionError: A machine does not come to its end.
    """
    with site(command or ("-m", IMPATIENT)) as made:
        original = made.machine()
        original.receive(made.readings(plan.before))
        original.forwarder.start()
        if plan.busy:
            time.sleep(dice.uniform(0.0, MOMENT_MAX_S))  # at any moment of its delivery
        else:
            original.wait_until_settled()
        image = original.copy(made.directory / "image")
        original.receive(made.readings(plan.since))
        original.wait_until_settled()
        if not plan.clone:
            original.close()
        copy = made.machine(image)
        copy.receive(made.readings(plan.own))
        end = FAULTS[plan.fault](made.cloud.write_api)
        copy.forwarder.start()
        if plan.clone:
            original.receive(made.readings(plan.since))
        if plan.fault == "refused connections":
            copy.forwarder.wait_for_log("delivery failed")
        end()
        survivors = [original, copy] if plan.clone else [copy]
        for _ in range(2):
            for machine in survivors:
                machine.wait_until_settled()
                machine.receive(made.readings(dice.choice((1, 30))))
        for machine in survivors:
            machine.wait_until_settled()
        _judge(made, survivors, image, report)


def _judge(made: Site, survivors: Sequence[Machine], image: Image, report: Report) -> None:
    times = Counter(one.number for one in made.cloud.received("bigquery"))
    for machine in survivors:
        lost = [number for number in machine.rows if number not in times]
        report.counts["readings"] += len(machine.rows)
        report.counts["lost"] += len(lost)
        if lost:
            name = machine.directory.name
            report.violations.append(f"{name}: {len(lost)} are lost: {lost[:_SHOWN]}")
    waiting = set(image.rows[image.cursor :])
    twice = {n: k - 1 - (n in waiting) for n, k in times.items() if k > 1 + (n in waiting)}
    counted = sum(machine.repeated for machine in made.machines)
    report.counts["repeated"] += sum(k - 1 for k in times.values())
    report.counts["counted as possibly repeated"] += counted
    if sum(twice.values()) > counted:
        report.violations.append(
            f"{sum(twice.values())} are there twice, {counted} are counted: "
            f"{sorted(twice)[:_SHOWN]}"
        )
    report.violations += [str(violation) for violation in made.cloud.write_api.violations]


def run(rounds: int, seed: int) -> Report:
    """Copy, restore and clone machines.

    Args:
        rounds: How many.
        seed: Of what happens; not of the moments.
    """
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    report = Report("restores", seed)
    for _ in range(rounds):
        plan = Plan.drawn(dice)
        known = len(report.violations)
        try:
            suffer(plan, dice, report)
        except AssertionError as error:
            report.violations.append(str(error))
        report.violations[known:] = [f"{plan}: {text}" for text in report.violations[known:]]
        report.rounds += 1
        report.counts["clones" if plan.clone else "restored copies"] += 1
    return report
