"""One run of the real system under strace, with everything that is needed to judge its images."""

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.rows import Row
from tests.harness import (
    COLLECTOR,
    COMMIT_DELAYS_MS,
    FORWARDERS,
    PROGRAMS,
    Load,
    Packet,
    Program,
    Rig,
    wait_until,
)
from tests.harness.cloud import TABLE_REF, TOPIC_PATH
from tests.torture import syscalls
from tests.torture.syscalls import Event
from tests.torture.witness import Arrival, Truth, Witness

RATE = 250
RETENTION_HOURS = "0.0003"
"""A second: so that pruning is part of what is recorded."""

SLOW_S = 2.5
"""How long BigQuery leaves appends unanswered that it has taken, for a while."""

_LATENCY_TOLERANCE_S = 0.25
"""The latency counts from the request's coming, which is earlier than when it is noted."""

_GARBAGE_EVERY = 40
_REPEAT_EVERY = 25
_CLOCK_TOLERANCE_S = 0.000_2
_CLOCK_READS = 20
_STRACE_TIMEOUT_S = 20.0
_LOAD_TIMEOUT_S = 60.0
_DRAIN_TIMEOUT_S = 45.0
_TAIL_BYTES = 4_096
_BROKEN = "tests.torture.broken"


class NoStraceError(Exception):
    """System calls cannot be logged here."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded."""

    directory: str
    """SPOOL_DIR."""
    events: Sequence[Event]
    witness: Witness
    packets: Sequence[Packet]
    """What the broker took, in order, repetitions and garbage among it."""
    rows: Sequence[Row]
    """What BigQuery took, in order."""
    streams: Sequence[str]
    """The write streams that were made, in order."""
    table_created_ms: int
    """When the table was made: another time is another table."""
    commit_delay_ms: str
    """How long the readings gathered."""
    pruned: int
    """How many rows had left the spool at the end."""


def record(  # noqa: PLR0913 - all of them say what is recorded
    scratch: Path,
    messages: int,
    chance: random.Random,
    *,
    change: str = "",
    commit_delay_ms: str = COMMIT_DELAYS_MS[-1],
    calm: bool = False,
) -> Recording:
    """Run the system over ``messages`` messages until all is delivered.

    Args:
        scratch: Where the logs go; tens of kilobytes a message.
        messages: How many.
        chance: Decides when something is killed.
        change: One of :mod:`tests.torture.broken`; empty for the product as it is.
        commit_delay_ms: How long the readings gather.
        calm: Whether nothing is killed on the way, nor waited for in the end: a broken build may
            never deliver all.

    Raises:
        NoStraceError: strace is missing or may not trace.
    """
    while True:
        with traced(
            scratch, change, retention_hours=RETENTION_HOURS, commit_delay_ms=commit_delay_ms
        ) as system:
            _Scenario(system).run(messages, chance, calm=calm)
            recording = system.recording()
        if recording is not None:
            return recording


@contextmanager
def traced(
    scratch: Path,
    change: str = "",
    *,
    retention_hours: str = "24",
    commit_delay_ms: str = COMMIT_DELAYS_MS[-1],
) -> Iterator["Traced"]:
    """Give out a system whose programs are under strace; nothing runs yet but the services.

    Args:
        scratch: Where the logs go.
        change: One of :mod:`tests.torture.broken`; empty for the product as it is.
        retention_hours: How long delivered readings are kept.
        commit_delay_ms: How long the readings gather.

    Raises:
        NoStraceError: strace is missing or may not trace.
    """
    binary = shutil.which("strace")
    if binary is None:
        raise NoStraceError("strace is not installed: apt-get install strace")
    trial = subprocess.run(
        [binary, "-f", "--seccomp-bpf", "-A", "-o", "/dev/null", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if trial.returncode:
        raise NoStraceError(f"strace may not trace here: {trial.stderr}")
    logs = {name: scratch / f"{name}.strace" for name in PROGRAMS}
    for log in logs.values():
        log.unlink(missing_ok=True)
    with Rig(SPOOL_RETENTION_HOURS=retention_hours, COMMIT_DELAY_MS=commit_delay_ms) as rig:
        system = Traced(rig, logs, binary, change)
        for name in PROGRAMS:
            system.prepare(name)
        yield system


class Traced:
    """A system under strace, and when its services took what."""

    def __init__(self, rig: Rig, logs: Mapping[str, Path], strace: str, change: str) -> None:
        self.rig = rig
        self._logs = logs
        self._strace = strace
        self._change = change
        self._offset_s = _clock_offset_s()
        self._append_times: list[tuple[float, float]] = []
        self._finalized: dict[str, float] = {}
        self._finalize = rig.cloud.write_api.streams.finalize
        rig.cloud.write_api.faults.after_append = self._note_append
        rig.cloud.write_api.streams.finalize = self._note_finalized  # type: ignore[method-assign]

    @property
    def appends(self) -> int:
        """How many appends BigQuery has taken."""
        return len(self._append_times)

    def _note_finalized(self, name: str) -> int:
        """Finalize a stream; its length confirms the appends whose answers are still to come."""
        length = self._finalize(name)
        self._finalized.setdefault(name, time.time())
        return length

    def _note_append(self, *_: object) -> None:
        now, latency_s = time.time(), self.rig.cloud.write_api.latency_s
        self._append_times.append((now, now + max(0.0, latency_s - _LATENCY_TOLERANCE_S)))

    def prepare(self, name: str, inject: str = "") -> None:
        """Let the program's next life be one under strace.

        Args:
            name: Which program; it does not run.
            inject: A fault, as strace's ``inject=`` takes it; empty for none.
        """
        module, _, sink = name.partition("-")
        broken = [_BROKEN, self._change] if self._change else []
        python = [sys.executable, "-m", *broken, module, *([sink] if sink else [])]
        tracing = syscalls.command(
            self._strace, self._logs[name], sockets=name == COLLECTOR, inject=inject
        )
        log = self.rig.directory / f"{name}.log"
        self.rig.programs[name] = Program(name, [*tracing, *python], self.rig.variables, log)

    def wait_for_end(self, name: str) -> None:
        """Wait until the program is gone, and strace has written the last of it."""
        program = self.rig.programs[name]
        program.wait()
        ended = [str(program.pid), "+++"]
        wait_until(
            lambda: any(ended == words[:3:2] for words in _last_lines(self._logs[name])),
            _STRACE_TIMEOUT_S,
            f"strace has written the end of {name}",
        )

    def end(self) -> None:
        """Stop all programs, and return once they and their logs are at their ends."""
        for program in self.rig.programs.values():
            program.signal(signal.SIGTERM)
        for name in self.rig.programs:
            self.wait_for_end(name)

    def recording(
        self, packets: Sequence[Packet] | None = None, before: Truth | None = None
    ) -> Recording | None:
        """Return what was recorded, once all has ended.

        None if the clock was set meanwhile: the service's times and strace's would not compare.

        Args:
            packets: What the broker took; None for what was published here.
            before: How things stood at the power cut that this is the recovery from.
        """
        if abs(_clock_offset_s() - self._offset_s) > _CLOCK_TOLERANCE_S:
            return None
        rig = self.rig
        arrivals = {
            "pubsub": list(_published(rig, self._offset_s)),
            "bigquery": list(self._appends()),
        }
        events = syscalls.merged(self._logs.values())
        return Recording(
            str(rig.spool_dir),
            events,
            Witness(events, arrivals, before),
            rig.publisher.acknowledged if packets is None else packets,
            rig.cloud.bigquery.rows(TABLE_REF),
            rig.cloud.write_api.streams.names,
            rig.cloud.bigquery.store.table(TABLE_REF).created_ms,
            rig.variables["COMMIT_DELAY_MS"],
            rig.books.counter("pruned"),
        )

    def _appends(self) -> Iterator[Arrival]:
        """Yield what BigQuery took since the beginning."""
        cloud = self.rig.cloud
        readings = [(one.seq, bytes.fromhex(one.event_id)) for one in cloud.received("bigquery")]
        at = len(readings) - sum(append.rows for append in cloud.write_api.appended)
        confirmed = 0.0
        for times, append in zip(self._append_times, cloud.write_api.appended, strict=True):
            end = at + append.rows
            told = min(times[1], self._finalized.get(append.stream, times[1]))
            confirmed = max(confirmed, told)  # answers are in order
            part = readings[at:end]
            yield Arrival(times[0], confirmed, part, append.stream, append.offset or 0)
            at = end


def _clock_offset_s() -> float:
    """Return how far the clock of strace is ahead of the one that Pub/Sub's fake goes by."""
    # Of several, the one that was interrupted the least.
    return min(time.time() - time.monotonic() for _ in range(_CLOCK_READS))


class _Scenario:
    """What happens in a recording."""

    def __init__(self, system: Traced) -> None:
        self._system = system
        self._rig = system.rig
        self._published = 0

    def run(self, messages: int, chance: random.Random, *, calm: bool) -> None:
        """Publish and kill; return once all programs have ended."""
        rig = self._rig
        rig.start()
        with Load(rig.publisher, self._packets, RATE).running() as load:
            _load_to(load, messages // 4)
            if not calm:
                self._again(chance.choice([COLLECTOR, FORWARDERS[0]]), signal.SIGKILL)
            _load_to(load, messages // 2)
            rig.cloud.write_api.latency_s = SLOW_S
            if not calm:
                # With an append unanswered: the next life settles it by the stream's length.
                before = self._system.appends
                wait_until(lambda: self._system.appends > before, _LOAD_TIMEOUT_S, "an append")
                self._again(FORWARDERS[1], signal.SIGKILL)
            _load_to(load, load.count + round(SLOW_S * RATE))
            rig.cloud.write_api.latency_s = 0.0
            if not calm:
                self._again(chance.choice([COLLECTOR, FORWARDERS[0]]), signal.SIGTERM)
            _load_to(load, messages)
        if not calm:
            wait_until(lambda: _delivered(rig), _DRAIN_TIMEOUT_S, "all is delivered")
        self._system.end()

    def _packets(self, count: int) -> list[Packet]:
        """Return readings, and now and then one a second time, and garbage."""
        packets = self._rig.plant.packets(count)
        for packet in packets[:]:
            self._published += 1
            if self._published % _REPEAT_EVERY == 0:
                packets.append(packet)
            if self._published % _GARBAGE_EVERY == 0:
                packets.append(Packet(packet.topic, b"garbage %d" % self._published))
        return packets

    def _again(self, name: str, ending: signal.Signals) -> None:
        self._rig.programs[name].signal(ending)
        self._system.wait_for_end(name)
        self._rig.start(name)


def _delivered(rig: Rig) -> bool:
    figures = rig.books.figures()
    if figures.received < len(rig.publisher.acknowledged):
        return False
    return not any(figures.sinks[sink].pending for sink in rig.sinks)


def _load_to(load: Load, count: int) -> None:
    wait_until(lambda: load.count >= count, _LOAD_TIMEOUT_S, f"{count} messages are published")


def _last_lines(log: Path) -> list[list[str]]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("ascii", "replace").splitlines()
    return [line.split(maxsplit=3) for line in lines]


def _published(rig: Rig, offset_s: float) -> Iterator[Arrival]:
    messages = rig.cloud.pubsub.messages(TOPIC_PATH)
    for at, batch in itertools.groupby(messages, key=lambda message: message.published_at):
        yield Arrival(
            at + offset_s,
            at + offset_s,
            [
                (int(m.attributes["seq"]), bytes.fromhex(json.loads(m.data)["event_id"]))
                for m in batch
            ],
        )
