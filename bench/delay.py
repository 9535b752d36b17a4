"""The trade-off that COMMIT_DELAY_MS decides: bytes, syncs and processor time against latency.

At 200 readings a second of eight sites, one by one. The last line is a build whose commits are not
synced: what the durability itself costs. It is not offered, and loses acknowledged readings.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.calm import all_cpu, latencies
from bench.latency import DELAY_VARIABLE
from bench.paced import Figures, Load, sluice, syncs_per_s
from bench.processes import ROOT, BenchError
from bench.report import Sheet, figure
from bench.rig import Rig

DELAYS_MS = (0, 5, 50, 100, 200, 500)
RATE, SITES = 200, 8
HEADS = (
    DELAY_VARIABLE,
    "bytes per byte",
    "GB a day",
    "syncs/s (all)",
    "CPU % (all)",
    "Pub/Sub p50/p99 ms",
    "row p50/p99 ms",
    "Pub/Sub has, cursor has not noted (readings, at most)",
)
_SYNCED = "PRAGMA synchronous=FULL"
_UNSYNCED = "PRAGMA synchronous=NORMAL"
_PROGRAMS = ("collector", "forwarder", "lifecycle", "spool")


class _Unnoted:
    """How many readings Pub/Sub has that the forwarder's file does not say it has.

    A kill at that moment repeats as many. Looked at some times a second, so it is a sample; a
    lower bound, because the subscriber has a message later than the service.
    """

    def __init__(self) -> None:
        self.most = 0
        self._next_s = 0.0

    def look(self, setup: Rig, received: int) -> None:
        """Compare, if it is time."""
        if time.monotonic() >= self._next_s:
            self.most = max(self.most, received - setup.sink_counter("pubsub"))
            self._next_s = time.monotonic() + 0.05


@contextmanager
def _unsynced() -> Iterator[Path]:
    """Give out a copy of the programs whose commits do not wait for the disk.

    Checkpoints do: a power cut loses readings, and damages nothing.
    """
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as name:
        code = Path(name)
        for program in _PROGRAMS:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / program, code / program, ignore=ignored)
        connection = code / "spool" / "connection.py"
        source = connection.read_text(encoding="utf-8")
        if _SYNCED not in source:
            raise BenchError(f"{_SYNCED} is no longer in spool/connection.py")
        connection.write_text(source.replace(_SYNCED, _UNSYNCED), encoding="utf-8")
        yield code


def rows(rounds: int, _count: int) -> list[Sheet]:
    """Return the table."""
    load = Load.of(RATE, SITES)
    with _unsynced() as unsynced:
        builds = {str(delay): (ROOT, delay) for delay in DELAYS_MS}
        builds["0, no sync (not offered)"] = (unsynced, 0)
        runs: dict[str, list[tuple[Figures, int]]] = {name: [] for name in builds}
        for number in range(rounds):
            turn = number % len(builds)
            for name in [*builds][turn:] + [*builds][:turn]:
                code, delay = builds[name]
                unnoted = _Unnoted()
                figures = sluice(load, code, unnoted.look, **{DELAY_VARIABLE: str(delay)})
                runs[name].append((figures, unnoted.most))
        syncs = {
            name: syncs_per_s(load, code, **{DELAY_VARIABLE: str(delay)})
            for name, (code, delay) in builds.items()
        }
    lines = [
        [
            name,
            figure([sum(f.written.values()) for f, _ in made]),
            figure([f.gb_a_day for f, _ in made]),
            figure([sum(syncs[name].values())]),
            figure([all_cpu(f) for f, _ in made]),
            latencies([f.pubsub_ms for f, _ in made]),
            latencies([f.bigquery_ms for f, _ in made]),
            f"{max(most for _, most in made):,}",
        ]
        for name, made in runs.items()
    ]
    return [
        Sheet(
            "delay",
            f"{RATE} readings/s one by one, {SITES} sites; medians of {rounds} round(s), window "
            f"{load.window_s:.0f} s; all three processes",
            list(HEADS),
            lines,
        )
    ]
