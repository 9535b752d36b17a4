"""Row 5: the whole chain, from MQTT to both services, at the rate that it can sustain.

The publisher is let through only as fast as the slower service receives: never more than
IN_FLIGHT readings are between it and there. So no backlog can grow, and what comes through in
a given time is what the chain sustains. The single-file script has no backlog but the broker's
queue; its rate is that at which it works.
"""

import time
from dataclasses import dataclass

from bench.processes import BenchError, Process, pause
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for
from bench.servers import TABLE_REF
from bench.system import TOPIC, Services, System

IN_FLIGHT = 20_000
LOOK_EVERY_S = 0.03
RUN_TIMEOUT_S = 900.0
SCRIPT_SHARE = 50
"""The script gets one part in this many of the readings; it would take too long otherwise."""


@dataclass(frozen=True)
class Run:
    """One run of the chain."""

    per_s: float
    cpu_us: float
    rss_mb: float
    shares: dict[str, float]
    """Processor time per message of each process, in microseconds."""


def _let_through(system: System, publisher: Process, count: int) -> int:
    """Let readings go as they are delivered; return the most that were on their way."""
    most = allowed = 0
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while (delivered := system.delivered()) < count:
        most = max(most, min(allowed, count) - delivered)
        if delivered + IN_FLIGHT > allowed and allowed < count:
            allowed = delivered + IN_FLIGHT
            publisher.say(str(allowed))
        if time.monotonic() > deadline:
            raise BenchError(f"{delivered} of {count} were delivered in {RUN_TIMEOUT_S:.0f} s")
        pause(LOOK_EVERY_S)
    return most


def chain(count: int) -> Run:
    """Run the broker, the collector, both forwarders and both services."""
    with rig() as setup:
        system = System.start(setup)
        publisher = setup.publisher(count, gated=True)
        fakes = {
            "fake pubsub": system.services.pubsub.process,
            "fake bigquery": system.services.bigquery.process,
        }
        everything = {**system.processes, **fakes}
        before = {name: p.usage().cpu_s for name, p in everything.items()}
        begun = time.perf_counter()
        most = _let_through(system, publisher, count)
        seconds = time.perf_counter() - begun
        system.check(count)
        if most > IN_FLIGHT:
            raise BenchError(f"{most} were on their way, more than {IN_FLIGHT}: not sustained")
        shares = {
            name: (p.usage().cpu_s - before[name]) * 1e6 / count for name, p in everything.items()
        }
        ours = system.processes
        return Run(
            count / seconds,
            sum(shares[name] for name in ours),
            sum(p.usage().rss_bytes for p in ours.values()) / 1e6,
            shares,
        )


def script(count: int) -> float:
    """Run the single-file script over the same; return messages per second."""
    with rig() as setup:
        services = Services.start(setup)
        setup.broker()
        process = start_script(setup, services)
        publisher = setup.publisher(count)
        begun = time.perf_counter()
        publisher.say("go")
        wait_for(
            lambda: min(services.received()) >= count,
            f"the script has passed on {count}",
            RUN_TIMEOUT_S,
            LOOK_EVERY_S,
        )
        seconds = time.perf_counter() - begun
        if services.received() != (count, count):
            raise BenchError(f"{services.received()} of {count} arrived")
        if "BigQuery:" in process.output():
            raise BenchError(f"the script's rows were refused: {process.output()[-1000:]}")
        return count / seconds


def start_script(setup: Rig, services: Services) -> Process:
    """Start the single-file script; return once it has subscribed."""
    environ = {
        **services.environ(),
        "MQTT_BROKER": "127.0.0.1",
        "MQTT_PORT": str(setup.broker_port),
    }
    process = setup.start(
        Process.python("script", ["bench.single_file_script"], setup.directory, environ)
    )
    process.wait_output("subscribed", START_TIMEOUT_S)
    return process


def rows(rounds: int, count: int) -> list[Row]:
    """Return row 5."""
    few = max(1_000, count // SCRIPT_SHARE)
    row = Row(
        "chain",
        f"from MQTT to both services, {count:,} readings, sustained: never more than "
        f"{IN_FLIGHT:,} on their way ÷ the single-file script, {few:,} readings",
        "msg/s",
        ">= 10",
        notes=[f"servers: in-repo fakes ({TOPIC}, {TABLE_REF}); every reading counted at both"],
    )
    for _ in range(rounds):
        run = chain(count)
        row.ours.append(run.per_s)
        row.reference.append(script(few))
        row.cpu_us.append(run.cpu_us)
        row.rss_mb.append(run.rss_mb)
        shares = ", ".join(f"{name} {share:.1f}" for name, share in run.shares.items())
        row.notes.append(f"CPU µs a message: {shares}")
    return [row]
