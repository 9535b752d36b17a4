"""Kills, stops and freezes of everything, under load, at random moments.

The system stands under its real supervisord; the broker is started again by this module, as
systemd would.
"""

import itertools
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.harness import (
    COMMIT_DELAYS_MS,
    PROGRAMS,
    Load,
    Packet,
    Program,
    Rig,
    Supervisor,
    wait_until,
)
from tests.harness.cloud import TABLE_REF, TOPIC_PATH
from tests.torture.ledger import Lawful, Ledger, garbage, reckon
from tests.torture.report import Report
from tests.torture.wiretap import WireTap

RATE = 300
CYCLES_PER_SYSTEM = 30
"""Then a new one: the services keep everything in memory. The next one has another
COMMIT_DELAY_MS."""

SOME = 40
RECOVERY_TIMEOUT_S = 60.0
MOMENT_MAX_S = 0.6
FREEZE_MAX_S = 0.8
_GARBAGE_EVERY = 37
_AT_ONCE = "0.0003"
_RETENTIONS = ("24", "24", _AT_ONCE)


@dataclass
class System:
    """One system under a supervisord, its wire tapped."""

    rig: Rig
    supervisor: Supervisor
    tap: WireTap
    published: int = 0
    """The number of the newest reading that is on its way to the broker."""
    prunes_at_once: bool = False
    broker_forgot: bool = False
    """Whether the broker was killed: then it may have lost, and sent again, what it had."""

    def passed(self) -> tuple[int, int, int]:
        """Return how many messages have passed the wire, Pub/Sub, BigQuery."""
        cloud = self.rig.cloud
        return (
            self.tap.count,
            cloud.pubsub.topic_count(TOPIC_PATH),
            cloud.bigquery.table_count(TABLE_REF),
        )

    def pid(self, role: str) -> int:
        """Return the process id that holds the role's lock; 0 if none lives."""
        try:
            pid = int((self.rig.spool_dir / f"{role}.lock").read_text(encoding="ascii") or 0)
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return 0
        return pid if role.partition("-")[0].encode() in command else 0

    def signal(self, role: str, number: signal.Signals) -> bool:
        """Send a signal to a role's process; return whether there was one."""
        pid = self.pid(role)
        if not pid:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True


Strike = Callable[[System, random.Random], None]


def _kill(*roles: str) -> Strike:
    def strike(system: System, _: random.Random) -> None:
        for role in roles:
            system.signal(role, signal.SIGKILL)

    return strike


def _terminate(role: str) -> Strike:
    def strike(system: System, _: random.Random) -> None:
        system.signal(role, signal.SIGTERM)

    return strike


def _freeze(role: str) -> Strike:
    def strike(system: System, dice: random.Random) -> None:
        if system.signal(role, signal.SIGSTOP):
            time.sleep(dice.uniform(0.05, FREEZE_MAX_S))
            system.signal(role, signal.SIGCONT)

    return strike


def _kill_broker(system: System, dice: random.Random) -> None:
    system.broker_forgot = True
    system.rig.broker.kill()
    time.sleep(dice.uniform(0.0, MOMENT_MAX_S))
    system.rig.broker.start()


def _terminate_broker(system: System, _: random.Random) -> None:
    system.rig.broker.stop()
    system.rig.broker.start()


def _freeze_broker(system: System, dice: random.Random) -> None:
    system.rig.broker.signal(signal.SIGSTOP)
    time.sleep(dice.uniform(0.05, FREEZE_MAX_S))
    system.rig.broker.signal(signal.SIGCONT)


def _kill_supervisor(system: System, _: random.Random) -> None:
    system.supervisor.kill()
    # Without waiting: the new one's programs may meet the orphans' locks.
    Program.start(system.supervisor)


def _terminate_supervisor(system: System, _: random.Random) -> None:
    system.supervisor.stop()
    Program.start(system.supervisor)


def _freeze_supervisor(system: System, dice: random.Random) -> None:
    system.supervisor.signal(signal.SIGSTOP)
    system.signal(dice.choice(PROGRAMS), signal.SIGKILL)
    time.sleep(dice.uniform(0.05, FREEZE_MAX_S))
    system.supervisor.signal(signal.SIGCONT)


def _kill_everything(system: System, dice: random.Random) -> None:
    system.broker_forgot = True
    order: list[Callable[[], object]] = [
        system.supervisor.kill,
        system.rig.broker.kill,
        *(partial(system.signal, role, signal.SIGKILL) for role in PROGRAMS),
    ]
    dice.shuffle(order)
    for kill in order:
        kill()
    system.rig.broker.start()
    Program.start(system.supervisor)


STRIKES: dict[str, Strike] = {
    **{f"SIGKILL {role}": _kill(role) for role in PROGRAMS},
    **{f"SIGTERM {role}": _terminate(role) for role in PROGRAMS},
    **{f"SIGSTOP {role}": _freeze(role) for role in PROGRAMS},
    "SIGKILL all programs": _kill(*PROGRAMS),
    "SIGKILL broker": _kill_broker,
    "SIGTERM broker": _terminate_broker,
    "SIGSTOP broker": _freeze_broker,
    "SIGKILL supervisord": _kill_supervisor,
    "SIGTERM supervisord": _terminate_supervisor,
    "SIGSTOP supervisord": _freeze_supervisor,
    "SIGKILL everything": _kill_everything,
}


def run(rounds: int, seed: int, *, until: float = float("inf")) -> Report:
    """Strike ``rounds`` times; every strike must be followed by traffic to both services.

    Args:
        rounds: How many strikes.
        seed: Of which, and when.
        until: time.monotonic() at which to end early.
    """
    report = Report("kills", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    # Each delay gets half of the strikes, however few there are.
    most = min(CYCLES_PER_SYSTEM, math.ceil(rounds / len(COMMIT_DELAYS_MS)))
    delays = itertools.cycle(dice.sample(COMMIT_DELAYS_MS, len(COMMIT_DELAYS_MS)))
    while report.rounds < rounds and time.monotonic() < until and not report.violations:
        cycles = min(most, rounds - report.rounds)
        delay_ms = next(delays)
        with _system(dice.choice(_RETENTIONS), delay_ms) as system:
            _torture(system, cycles, dice, report, until)
        report.counts[f"with COMMIT_DELAY_MS {delay_ms}"] += cycles
    return report


@contextmanager
def _system(retention_hours: str, commit_delay_ms: str) -> Iterator[System]:
    with (
        WireTap() as tap,
        Rig(
            MQTT_PORT=str(tap.port),
            SPOOL_RETENTION_HOURS=retention_hours,
            COMMIT_DELAY_MS=commit_delay_ms,
        ) as rig,
    ):
        tap.upstream = rig.broker.port
        rig.broker.start()
        with Supervisor(rig).supervising() as supervisor:
            yield System(rig, supervisor, tap, prunes_at_once=retention_hours == _AT_ONCE)


def _torture(
    system: System, cycles: int, dice: random.Random, report: Report, until: float
) -> None:
    rig = system.rig

    def packets(count: int) -> list[Packet]:
        made = rig.plant.packets(count)
        system.published += count
        if system.published % _GARBAGE_EVERY < count:
            made.append(garbage(system.published))
        return made

    # Every strike once in each deck: chance alone would leave some out for long.
    deck: list[str] = []
    with Load(rig.publisher, packets, RATE).running():
        _wait_for_traffic(system)
        for _ in range(cycles):
            if time.monotonic() >= until:
                break
            deck = deck or dice.sample(list(STRIKES), len(STRIKES))
            name = deck.pop()
            time.sleep(dice.uniform(0.0, MOMENT_MAX_S))  # it strikes at any moment
            STRIKES[name](system, dice)
            report.rounds += 1
            report.counts[name] += 1
            try:
                _wait_for_traffic(system)
            except AssertionError as failure:
                report.violations.append(f"after {name}, strike {report.rounds}: {failure}")
                report.violations += [f"{log}: {text}" for log, text in rig.logs()]
                return
    ledger = _settled(system)
    report.violations += ledger.violations
    report.counts["messages"] += ledger.sent
    report.counts["acknowledged by the collector"] += ledger.acknowledged
    report.counts["lost by the killed broker"] += ledger.lost_by_broker
    for sink, one in ledger.sinks.items():
        report.counts[f"{sink} lost"] += one.lost
        report.counts[f"{sink} repeated"] += one.repeated
        report.counts[f"{sink} spooled twice"] += one.respooled
        report.counts[f"{sink} reordered"] += one.reordered
        report.counts[f"{sink} dead-lettered"] += one.dead_lettered


def _wait_for_traffic(system: System) -> None:
    """Wait until readings pass the collector, and reach both services, from now on."""
    before = system.passed()
    wait_until(
        lambda: all(now >= then + SOME for then, now in zip(before, system.passed(), strict=True)),
        RECOVERY_TIMEOUT_S,
        "the collector and both services get readings",
    )


def _settled(system: System) -> Ledger:
    """Wait until everything that was taken is delivered, and reckon."""
    rig = system.rig
    # Published to a broker that had its subscriber: so it comes, behind all that went before.
    last = rig.publisher.samples[-1].payload
    wait_until(
        lambda: last in system.tap.acknowledged[-SOME * 100 :],
        RECOVERY_TIMEOUT_S,
        "the collector has the last reading",
    )
    wait_until(
        lambda: all(s.pending == 0 for s in rig.books.figures().sinks.values()),
        RECOVERY_TIMEOUT_S,
        "the spool is drained",
    )
    return reckon(
        rig,
        system.tap,
        Lawful(
            order_by="seq" if system.broker_forgot else "number",
            respooled=system.prunes_at_once,
        ),
    )
