"""Thousands of ordering keys, of which some are refused, hang, or have readings at fault.

The forwarder is a real process, before a real spool and a fake that speaks gRPC. While keys are
in trouble, all readings of the other keys have to arrive; in the end everything has.
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from spool import SpoolWriter, claim_environment
from tests.fakes import FakePubSub
from tests.harness import IMPATIENT, Books, Program, wait_until
from tests.harness.cloud import PROJECT, TOPIC, TOPIC_PATH
from tests.test_spool_writer import new_reading
from tests.torture.report import Report

KEYS = 3_000
ROWS = 3_000
"""Readings of a round; a few hot keys have a third of them."""

HOT = 8
BAD_VALUE = -666.0
SOON_S = 60.0
MEMORY_MAX_KIB = 150_000
BATCH_MAX_ROWS = 16_000
"""A kill repeats at most one batch."""

TROUBLES = ("one refused", "many refused", "hanging", "bad readings", "killed", "stopped", "outage")


@dataclass
class Gate:
    """A spool, a forwarder and the service before it."""

    directory: Path
    fake: FakePubSub
    writer: SpoolWriter
    forwarder: Program
    dice: random.Random
    sites: list[str]
    site_of: dict[int, str] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    troubled: set[str] = field(default_factory=set)
    kills: int = 0
    memory_kib: int = 0

    def append(self, bad: int = 0) -> None:
        """Have a round's readings spooled, so many of them at fault themselves."""
        first = self.writer.last_seq() + 1
        hot = self.sites[:HOT]
        rows = []
        for seq in range(first, first + ROWS):
            site = self.dice.choice(hot if self.dice.random() < 1 / 3 else self.sites)
            self.site_of[seq] = site
            value = 1.5
            if len(self.bad) < bad and self.dice.random() < 0.05:
                self.bad.add(seq)
                value = BAD_VALUE
            rows.append(new_reading(seq, site=site, value=value))
        self.writer.append(rows, [], {})

    def arrived(self) -> list[int]:
        """Return the seq of every message, in order of arrival."""
        return [int(m.attributes["seq"]) for m in self.fake.messages(TOPIC_PATH)]

    def healthy(self) -> set[int]:
        """Return the readings that nothing may hold up."""
        return {s for s, site in self.site_of.items() if site not in self.troubled} - self.bad

    def wait_for_the_healthy(self) -> None:
        """Wait until every reading of a key that is not in trouble has arrived."""
        wanted = self.healthy()

        def there() -> bool:
            # Counting is cheap, and looking at every message is not.
            return self.fake.count >= len(wanted) and wanted <= set(self.arrived())

        wait_until(there, SOON_S, "the other keys' readings")

    def books(self) -> tuple[int, int, int]:
        """Return the cursor, what the counters say that it passed, and the dead letters."""
        books = Books(self.directory)
        ((cursor,),) = books.rows("pubsub", "SELECT coalesce(max(seq), 0) FROM cursor") or [(0,)]
        counts = dict(books.rows("pubsub", "SELECT name, value FROM counter"))
        names = ("delivered", "logged", "dead_lettered", "dropped")
        return int(cursor), sum(counts.get(n, 0) for n in names), counts.get("dead_lettered", 0)

    def note_memory(self) -> None:
        """Remember the most that the forwarder ever had."""
        if self.forwarder.running:
            self.memory_kib = max(self.memory_kib, self.forwarder.memory_kib("VmHWM"))


@contextmanager
def gate(keys: int, dice: random.Random) -> Iterator[Gate]:
    """Run a forwarder until the context ends."""
    with (
        tempfile.TemporaryDirectory(prefix="sluice-") as name,
        FakePubSub(topics=[TOPIC_PATH]) as fake,
    ):
        directory = Path(name)
        writer = SpoolWriter.open(directory)
        claim_environment(writer, "DEV", [])
        variables = {
            "APP_ENV": "DEV",
            "INSTANCE_ID": "gate",
            "SPOOL_DIR": name,
            "GCP_PROJECT_ID": PROJECT,
            "PUBSUB_TOPIC": TOPIC,
            "BIGQUERY_ENABLED": "false",
            "PUBSUB_EMULATOR_HOST": fake.address,
        }
        forwarder = Program(
            "forwarder-pubsub",
            [sys.executable, "-m", IMPATIENT, "pubsub"],
            variables,
            directory / "forwarder.log",
        )
        sites = [f"SITE-{number:05d}" for number in range(keys)]
        forwarder.start()
        try:
            yield Gate(directory, fake, writer, forwarder, dice, sites)
        finally:
            fake.faults.clear()
            forwarder.kill()
            writer.close()


def trouble(system: Gate, kind: str) -> None:
    """Bring one trouble about; the keys that it holds up are noted."""
    dice, faults = system.dice, system.fake.faults
    if kind in {"one refused", "many refused"}:
        count = 1 if kind == "one refused" else dice.randrange(2, len(system.sites) // 4)
        for site in {dice.choice(system.sites[:HOT]), *dice.sample(system.sites, count - 1)}:
            system.troubled.add(site)
            faults.refuse_key(site, grpc.StatusCode.UNAVAILABLE, "not this key")
    elif kind == "hanging":
        site = dice.choice(system.sites)
        system.troubled.add(site)
        faults.hang_key(site)
    elif kind == "killed":
        time.sleep(dice.uniform(0.0, 0.3))
        system.note_memory()
        system.forwarder.kill()
        system.kills += 1
        system.forwarder.start()
    elif kind == "stopped":
        system.forwarder.wait_for_log("draining")
        system.note_memory()
        assert system.forwarder.stop()[0] == 0
        system.forwarder.start()
    elif kind == "outage":
        faults.abort(grpc.StatusCode.UNAVAILABLE, "away", times=dice.randrange(1, 2_000))


def run(rounds: int, seed: int, keys: int = KEYS) -> Report:
    """Go through ``rounds`` troubles, of some keys or of all.

    Args:
        rounds: How many; the keys in trouble are well again after every third.
        seed: Of everything that is random.
        keys: How many keys there are.
    """
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    report = Report("many_keys", seed)
    with gate(keys, dice) as system:
        system.fake.faults.poison = lambda data: b'"value":-666' in data
        order = [*TROUBLES]
        dice.shuffle(order)
        for number in range(rounds):
            kind = order[number % len(order)]
            trouble(system, kind)
            bad = len(system.bad) + (20 if kind == "bad readings" else 0)
            system.append(bad)
            system.wait_for_the_healthy()
            cursor, passed, _ = system.books()
            if cursor != passed:
                report.violations.append(f"the cursor is at {cursor}, and {passed} are counted")
            system.note_memory()
            report.rounds += 1
            report.counts[kind] += 1
            if number % 3 == 2:
                system.fake.faults.keys.clear()
                system.fake.faults.release()
                system.troubled.clear()
        system.fake.faults.keys.clear()
        system.fake.faults.release()
        last = system.writer.last_seq()
        wait_until(lambda: system.books()[0] == last, SOON_S, "everything is settled")
        judge(system, report)
    return report


def judge(system: Gate, report: Report) -> None:
    """Hold the end to the promise."""
    arrived = system.arrived()
    lost = set(system.site_of) - system.bad - set(arrived)
    repeated = len(arrived) - len(set(arrived))
    if lost:
        report.violations.append(f"{len(lost)} are lost: {sorted(lost)[:5]}")
    firsts: dict[str, list[int]] = {}
    for seq in dict.fromkeys(arrived):
        firsts.setdefault(system.site_of[seq], []).append(seq)
    report.violations += [
        f"{site} is out of order" for site, seqs in firsts.items() if seqs != sorted(seqs)
    ]
    cursor, passed, dead = system.books()
    if (passed, dead) != (cursor, len(system.bad)):
        report.violations.append(f"{cursor} passed, {passed} counted, {dead} dead letters")
    if repeated > system.kills * BATCH_MAX_ROWS:
        report.violations.append(f"{repeated} repeated after {system.kills} kills")
    if system.memory_kib > MEMORY_MAX_KIB:
        report.violations.append(f"{system.memory_kib} KiB of memory")
    if system.fake.violations:
        report.violations.append(f"in flight twice: {system.fake.violations[:3]}")
    report.counts["readings"] += len(system.site_of)
    report.counts["lost"] += len(lost)
    report.counts["repeated"] += repeated
    report.counts["memory_kib"] = system.memory_kib
