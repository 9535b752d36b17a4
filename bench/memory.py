"""Row 10: resident memory, without backlog, while one grows, and while it is drained.

"Without backlog" is a system that has been warmed up: more readings than the collector's
window of known ids have gone through at full speed, so that what then is there is what a
process needs, and not what it has yet to allocate.
"""

from bench.processes import BenchError, pause
from bench.report import Row
from bench.rig import Rig, rig, wait_for
from bench.system import SINKS, System

BACKLOG_FACTOR = 5
"""Readings of backlog per ``--count``: a million at the default of 200,000."""

WARM_UP_READINGS = 120_000
"""Above DEDUP_WINDOW."""

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
        for name, (empty, outage, drain) in _one_run(WARM_UP_READINGS, backlog).items():
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
                    f"{name}: highest with up to {backlog:,} readings of backlog ÷ without",
                    "MB",
                    "<= 1.05",
                ),
            )
            top.ours.append(max(empty, outage, drain))
            more.ours.append(max(outage, drain))
            more.reference.append(empty)
            more.notes.append(
                f"MB without backlog {empty:.1f}, while it grows {outage:.1f}, drained {drain:.1f}"
            )
    return [*highest.values(), *growth.values()]


def _one_run(warm_up: int, backlog: int) -> dict[str, tuple[float, float, float]]:
    with rig() as setup:
        system = System.start(setup)
        _publish(setup, warm_up, 0)
        phases = [_Peaks(system) for _ in range(3)]
        empty, outage, drain = phases
        empty.until("", SINKS, warm_up)
        # Its own peak is left out: what counts is what stays once nothing waits any more.
        empty.mb = dict.fromkeys(system.processes, 0.0)
        empty.during(SETTLE_S)
        system.services.leave()
        _publish(setup, backlog, warm_up)
        outage.until("received", (), warm_up + backlog)
        outage.during(OUTAGE_S)
        if system.delivered() != warm_up:
            raise BenchError("something was delivered although the services were away")
        system.services.come_back()
        drain.until("", SINKS, warm_up + backlog)
        system.check(warm_up + backlog, exactly=False)
        return {
            name: (empty.mb[name], outage.mb[name], drain.mb[name]) for name in system.processes
        }


def _publish(setup: Rig, count: int, first: int) -> None:
    publisher = setup.publisher(count, first)
    publisher.say("go")
