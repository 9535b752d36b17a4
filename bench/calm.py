"""What a plant pays at its usual rate: readings one by one, at random moments, for a minute.

For each rate and number of sites one line: bytes written to the disk, syncs, wake-ups, processor
time, and how long a reading takes from its PUBLISH to a subscriber of Pub/Sub and to the row in
BigQuery. Where all of it is of eight sites, in the same rounds and with the same servers: the
single-file script and Node-RED (which needs npm) as far as they keep up, and another checkout of
Sluice where SLUICE_BENCH_BEFORE names one.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import node_red
from bench.chain import start_script
from bench.latency import percentile
from bench.paced import (
    Figures,
    Load,
    NotFollowingError,
    measure,
    sluice,
    start_services,
    syncs_per_s,
)
from bench.processes import BenchError
from bench.report import Row, Sheet, figure
from bench.rig import rig

BEFORE_VARIABLE = "SLUICE_BENCH_BEFORE"
"""Names a checkout of Sluice to compare with."""

RATES = (10, 50, 200, 1_000)
SITES = (1, 8)
COMPARED_SITES = 8
SCRIPT_RATE_MAX = 200
"""At 1,000/s the single-file script cannot keep up: each of its inserts waits for an answer."""

OURS, SCRIPT, PEER, BEFORE = "Sluice", "script", "Node-RED", "before"
HEADS = (
    "readings/s",
    "sites",
    "bytes per byte",
    "GB a day",
    "syncs/s",
    "wake-ups/s (collector, Pub/Sub, BigQuery)",
    "CPU % (each)",
    "Pub/Sub p50/p99 ms",
    "row p50/p99 ms",
    "script CPU %, p50/p99 ms",
    "Node-RED CPU %, p50/p99 ms",
)
BEFORE_HEADS = ("before: bytes per byte", "GB a day", "CPU % (each)", "Pub/Sub p50/p99 ms")


def script(load: Load) -> Figures:
    """Run the single-file script."""
    with rig() as setup:
        services = start_services(setup)
        setup.broker()
        return measure(services, {"script": start_script(setup, services)}, load)


def peer(load: Load) -> Figures:
    """Run Node-RED, to Pub/Sub alone."""
    with rig() as setup:
        services = start_services(setup)
        setup.broker()
        processes = {"node-red": node_red.start(setup, services)}
        return measure(services, processes, load, with_rows=False)


@dataclass
class _Case:
    """One rate and number of sites, and what the rounds have shown."""

    load: Load
    systems: dict[str, Callable[[Load], Figures]]
    runs: dict[str, list[Figures]] = field(default_factory=dict)
    behind: set[str] = field(default_factory=set)
    """Those that did not keep up."""
    syncs: dict[str, float] = field(default_factory=dict)

    def round(self, number: int) -> None:
        """Run everything once, another one first in each round.

        Raises:
            BenchError: A run failed; or it is ours that does not keep up.
        """
        names = [name for name in self.systems if name not in self.behind]
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            try:
                self.runs.setdefault(name, []).append(self.systems[name](self.load))
            except NotFollowingError:
                if name == OURS:
                    raise
                self.behind.add(name)

    def line(self, *, before: bool) -> list[str]:
        """Return the case's line of the table."""
        ours = self.runs[OURS]
        cells = [
            f"{self.load.rate:,}",
            str(self.load.sites),
            figure([sum(f.written.values()) for f in ours]),
            figure([f.gb_a_day for f in ours]),
            _parts([self.syncs]),
            _parts([f.wake_ups_per_s for f in ours]),
            _parts([f.cpu_percent for f in ours]),
            latencies([f.pubsub_ms for f in ours]),
            latencies([f.bigquery_ms for f in ours]),
            self._other(SCRIPT),
            self._other(PEER),
        ]
        return [*cells, *self._before()] if before else cells

    def _other(self, name: str) -> str:
        if name in self.behind:
            return "does not keep up"
        runs = self.runs.get(name)
        if not runs:
            return "-"
        return f"{figure([all_cpu(f) for f in runs])}; {latencies([f.pubsub_ms for f in runs])}"

    def _before(self) -> list[str]:
        runs = self.runs.get(BEFORE)
        if not runs:
            return ["-"] * len(BEFORE_HEADS)
        return [
            figure([sum(f.written.values()) for f in runs]),
            figure([f.gb_a_day for f in runs]),
            _parts([f.cpu_percent for f in runs]),
            latencies([f.pubsub_ms for f in runs]),
        ]

    def rows(self) -> list[Row]:
        """Return what is held against a target."""
        if self.load.sites != COMPARED_SITES:
            return []
        name, ours = f"calm-{self.load.rate}", self.runs[OURS]
        what = f"{self.load.rate:,} readings/s one by one, {self.load.sites} sites: "
        written = Row(
            f"{name}-written",
            f"{what}bytes to the disk per byte of payload, all three processes",
            "bytes",
            {50: "<= 30", 200: "<= 12", 1_000: "<= 8"}.get(self.load.rate, ""),
            ours=[sum(f.written.values()) for f in ours],
        )
        made = [written]
        limits = {(50, SCRIPT): "<= 0.25", (200, BEFORE): "<= 0.2", (200, PEER): "<= 0.5"}
        for other in (SCRIPT, BEFORE, PEER):
            if other not in self.runs or other in self.behind:
                continue
            # Node-RED goes to Pub/Sub alone.
            of_ours = _cpu_to_pubsub if other == PEER else all_cpu
            row = Row(
                f"{name}-cpu-{other.lower()}",
                f"{what}processor time of {'two' if other == PEER else 'all three'} processes ÷ "
                f"that of {other}",
                "% of a core",
                limits.get((self.load.rate, other), ""),
                ours=[of_ours(f) for f in ours],
                reference=[all_cpu(f) for f in self.runs[other]],
            )
            made.append(row)
        for share, target in ((0.5, "<= 120"), (0.99, "<= 300")):
            made.append(
                Row(
                    f"{name}-pubsub-p{int(share * 100)}",
                    f"{what}from PUBLISH to the subscriber's receipt",
                    "ms",
                    target if self.load.rate == 200 else "",  # noqa: PLR2004 - as it was set
                    ours=[percentile(f.pubsub_ms, share) for f in ours],
                )
            )
        return made


def all_cpu(figures: Figures) -> float:
    """Return the processor time of all processes, in % of a core."""
    return sum(figures.cpu_percent.values())


def _cpu_to_pubsub(figures: Figures) -> float:
    return figures.cpu_percent["collector"] + figures.cpu_percent["forwarder-pubsub"]


def _parts(runs: Sequence[dict[str, float]]) -> str:
    """Return the medians by process, in the order in which the processes were started."""
    medians = [statistics.median(run[name] for run in runs) for name in runs[0]]
    return ", ".join(f"{value:,.1f}" for value in medians)


def latencies(runs: Sequence[Sequence[float]]) -> str:
    """Return the medians of p50 and p99."""
    return " / ".join(
        f"{statistics.median(percentile(list(run), share) for run in runs):,.0f}"
        for share in (0.5, 0.99)
    )


def rows(rounds: int, _count: int, rates: tuple[int, ...] = RATES) -> list[Row | Sheet]:
    """Return the table of ``rates``, and what is held against targets."""
    before = _before()
    has_peer = node_red.installed()
    cases = []
    for rate in rates:
        for sites in SITES:
            systems: dict[str, Callable[[Load], Figures]] = {OURS: sluice}
            if sites == COMPARED_SITES:
                if before is not None:
                    systems[BEFORE] = partial(sluice, code=before)
                if rate <= SCRIPT_RATE_MAX:
                    systems[SCRIPT] = script
                if has_peer:
                    systems[PEER] = peer
            cases.append(_Case(Load.of(rate, sites), systems))
    for number in range(rounds):
        for case in cases:
            case.round(number)
    for case in cases:
        case.syncs = syncs_per_s(case.load)
    sheet = Sheet(
        "calm",
        f"medians of {rounds} round(s), window {cases[0].load.window_s:.0f} s after a warm-up, "
        "random gaps, readings pruned as soon as both services have them; "
        + (f"Node-RED {node_red.version()}" if has_peer else "Node-RED is not installed")
        + ", to Pub/Sub alone; the script and Node-RED store nothing",
        [*HEADS, *(BEFORE_HEADS if before else ())],
        [case.line(before=before is not None) for case in cases],
    )
    return [sheet, *(row for case in cases for row in case.rows())]


def _before() -> Path | None:
    named = os.environ.get(BEFORE_VARIABLE, "")
    before = Path(named).resolve() if named else None
    if before is not None and not (before / "collector").is_dir():
        raise BenchError(f"{BEFORE_VARIABLE}={named} is no checkout of Sluice")
    return before


CASES = {f"calm-{rate}": partial(rows, rates=(rate,)) for rate in RATES}
"""One rate alone."""
