"""Row 10: resident memory at rest, while a backlog grows, and while it is drained.

What a process needs depends on what it does: a forwarder that drains has a batch in its hands and
one that waits has not, however many rows wait. So a small backlog is compared with a large one:
each grows during an outage and is drained at full speed. The small one has more readings than the
collector's window of known ids and than any batch, so that after it nothing is left that a
process has yet to allocate.
"""

from bench.processes import BenchError, pause
from bench.report import Row
from bench.rig import Rig, rig, wait_for
from bench.system import System
from lifecycle import SINKS

BACKLOG_FACTOR = 5
"""Readings of backlog per ``--count``: a million at the default of 200,000."""

SMALL_BACKLOG = 120_000
"""Above DEDUP_WINDOW, and above the largest batch of any sink."""

LOOK_EVERY_S = 0.2
SETTLE_S = 2.0
OUTAGE_S = 5.0
"""How long the forwarders try in vain, with all of the backlog there, before it is measured."""

RUN_TIMEOUT_S = 900.0
LIMITS_MB = {"collector": 48, "forwarder-pubsub": 120, "forwarder-bigquery": 120}


class _Peaks:
    """The highest resident memory of each process in one phase."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.mb: dict[str, float] = dict.fromkeys(system.processes, 0.0)

    def look(self) -> None:
        for name, process in self._system.processes.items():
            self.mb[name] = max(self.mb[name], process.usage().rss_bytes / 1e6)

    def until(self, setup_counter: str, sinks: tuple[str, ...], count: int) -> None:
        """Look until the collector's counter, or the sinks' deliveries, have come to ``count``."""
        setup = self._system.setup

        def done() -> bool:
            self.look()
            if sinks:
                return all(setup.sink_counter(sink) >= count for sink in sinks)
            return setup.spool_counter(setup_counter) >= count

        wait_for(done, f"{count} are through", RUN_TIMEOUT_S, LOOK_EVERY_S)

    def during(self, seconds: float) -> None:
        """Look for so long."""
        for _ in range(max(1, int(seconds / LOOK_EVERY_S))):
            pause(LOOK_EVERY_S)
            self.look()


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 10: per process the highest figure, and its growth with the backlog."""
    backlog = count * BACKLOG_FACTOR
    highest: dict[str, Row] = {}
    growth: dict[str, Row] = {}
    for _ in range(rounds):
        for name, mb in _one_run(SMALL_BACKLOG, backlog).items():
            top = highest.setdefault(
                name,
                Row(
                    f"memory-{name}",
                    f"{name}: highest resident memory in all phases",
                    "MB",
                    f"<= {LIMITS_MB[name]}",
                ),
            )
            more = growth.setdefault(
                name,
                Row(
                    f"memory-growth-{name}",
                    f"{name}: highest with a backlog that grows to {backlog:,} readings and is "
                    f"drained ÷ with one of {SMALL_BACKLOG:,}",
                    "MB",
                    "<= 1.05",
                ),
            )
            top.ours.append(max(mb.values()))
            more.ours.append(max(mb["large, growing"], mb["large, drained"]))
            more.reference.append(max(mb["small, growing"], mb["small, drained"]))
            more.notes.append(", ".join(f"{phase} {figure:.1f}" for phase, figure in mb.items()))
    return [*highest.values(), *growth.values()]


def _one_run(small: int, large: int) -> dict[str, dict[str, float]]:
    """Return for each process the highest figure of each phase."""
    with rig() as setup:
        system = System.start(setup)
        phases = {}
        phases["small, growing"], phases["small, drained"] = _outage(system, 0, small)
        phases["at rest"] = _Peaks(system)
        phases["at rest"].during(SETTLE_S)
        phases["large, growing"], phases["large, drained"] = _outage(system, small, large)
        system.check(small + large, exactly=False)
        return {
            name: {phase: peaks.mb[name] for phase, peaks in phases.items()}
            for name in system.processes
        }


def _outage(system: System, first: int, count: int) -> tuple[_Peaks, _Peaks]:
    """Have ``count`` readings wait for the services, then drained; return both peaks."""
    growing, drained = _Peaks(system), _Peaks(system)
    system.services.leave()
    _publish(system.setup, count, first)
    growing.until("received", (), first + count)
    growing.during(OUTAGE_S)
    if system.delivered() != first:
        raise BenchError("something was delivered although the services were away")
    system.services.come_back()
    drained.until("", SINKS, first + count)
    return growing, drained


def _publish(setup: Rig, count: int, first: int) -> None:
    publisher = setup.publisher(count, first)
    publisher.say("go")
