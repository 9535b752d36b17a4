"""Row 9: what the system costs while nothing happens."""

from bench.processes import pause
from bench.report import Row
from bench.rig import rig
from bench.system import System

SETTLE_S = 6.0
"""After the last traffic: a forwarder looks more often while there is some."""

MEASURE_S = 25.0
WARM_UP_READINGS = 2_000
RUN_TIMEOUT_S = 60.0


def rows(rounds: int, _count: int) -> list[Row]:
    """Return row 9, one per process."""
    made: dict[str, Row] = {}
    for _ in range(rounds):
        for name, share in _one_run().items():
            row = made.setdefault(
                name,
                Row(
                    f"idle-{name}",
                    f"{name}: processor time without traffic, over {MEASURE_S:.0f} s",
                    "% of a core",
                    "<= 0.5",
                ),
            )
            row.ours.append(share[0])
            row.rss_mb.append(share[1])
    return list(made.values())


def _one_run() -> dict[str, tuple[float, float]]:
    with rig() as setup:
        system = System.start(setup)
        # Connections are open and caches warm, as on a quiet night and not as after a start.
        publisher = setup.publisher(WARM_UP_READINGS)
        publisher.say("go")
        system.wait_delivered(WARM_UP_READINGS, RUN_TIMEOUT_S)
        system.check(WARM_UP_READINGS)
        pause(SETTLE_S)
        before = {name: p.cpu_ns() for name, p in system.processes.items()}
        pause(MEASURE_S)
        return {
            name: (
                (p.cpu_ns() - before[name]) / 1e9 / MEASURE_S * 100,
                p.usage().rss_bytes / 1e6,
            )
            for name, p in system.processes.items()
        }
