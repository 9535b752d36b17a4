"""Power cuts after a sync that failed: what the kernel dropped then must never be relied on.

A recording is made of the real programs, each of which lives once with an fdatasync that fails
while no other process has its database open, and is started again. The images of it are power cuts
anywhere behind that: the pages of the failed sync may be missing, although every later sync
reported success. Images and verdicts are those of :mod:`tests.torture.powercut`.
"""

import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.harness import COLLECTOR, COMMIT_DELAYS_MS, FORWARDERS, Rig, wait_until
from tests.torture.broken import OF_A_FAILED_SYNC
from tests.torture.powercut import Report, images_of, judged
from tests.torture.recording import Recording, Traced, traced
from tests.torture.syscalls import Kind
from tests.torture.witness import acknowledged

RATE = 200
BACKLOG = 250
"""Messages before the forwarders come, and again behind that."""

IMAGES_A_RECORDING = 200
_COMMITS = {COLLECTOR: (2, 25), FORWARDERS[0]: (2, 6), FORWARDERS[1]: (2, 6)}
"""Of each program, the first sync of a life that may fail, and the last."""

_TIMEOUT_S = 45.0
_AT_FAULT = '"exit_code": 75'


def run(images: int, seed: int) -> Report:
    """Try ``images`` images of recordings with failed syncs.

    Raises:
        NoStraceError: strace is missing or may not trace.
    """
    report = Report(seed)
    number = 0
    while report.images < images:
        chance = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        try_recording(
            report,
            min(IMAGES_A_RECORDING, images - report.images),
            chance,
            commit_delay_ms=COMMIT_DELAYS_MS[(number + seed) % len(COMMIT_DELAYS_MS)],
        )
        number += 1
    return report


def try_recording(
    report: Report,
    images: int,
    chance: random.Random,
    *,
    change: str = "",
    commit_delay_ms: str = COMMIT_DELAYS_MS[-1],
) -> None:
    """Make one recording and try ``images`` of it; add what comes of it to ``report``.

    Args:
        report: Added to.
        images: How many.
        chance: Decides which syncs fail, where it is cut, and what of the unsynced is kept.
        change: One of :mod:`tests.torture.broken`; empty for the product as it is.
        commit_delay_ms: How long the readings gather.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sluice-syncs-") as scratch:
        recording = record(Path(scratch), chance, commit_delay_ms, change=change)
    report.messages += len(recording.packets)
    report.acked += sum(1 for _ in acknowledged(recording.events))
    for cut, files in images_of(recording, _cuts(recording, images, chance), chance):
        last = recording.events[cut - 1]
        report.cuts[last.kind.value] += 1
        report.delays[commit_delay_ms] += 1
        found = judged(files, recording.witness.truth(last.at))
        report.violations += [(report.images, violation) for violation in found]
        report.images += 1
    report.seconds += time.monotonic() - began


def record(
    scratch: Path, chance: random.Random, commit_delay_ms: str, *, change: str = ""
) -> Recording:
    """Run the system through failed syncs until all is delivered.

    Args:
        scratch: Where the logs go.
        chance: Decides which syncs fail.
        commit_delay_ms: How long the readings gather.
        change: One of :mod:`tests.torture.broken`; empty for the product as it is.
    """
    while True:
        with traced(scratch, change, commit_delay_ms=commit_delay_ms) as system:
            _scenario(system, chance, whole=change not in OF_A_FAILED_SYNC)
            recording = system.recording()
        if recording is not None:
            return recording


def _scenario(system: Traced, chance: random.Random, *, whole: bool) -> None:
    rig = system.rig
    rig.start(COLLECTOR)  # makes the files and the session
    _stop(system, COLLECTOR)
    with rig.load(RATE):
        _live_with_a_failed_sync(system, COLLECTOR, chance)
        rig.start(COLLECTOR)
        sent = len(rig.publisher.acknowledged) + BACKLOG
        wait_until(
            lambda: len(rig.publisher.acknowledged) >= sent, _TIMEOUT_S, "there is a backlog"
        )
    rig.wait_until_spooled()
    # It has the sinks' files open, and SQLite's index of their logs with them.
    _stop(system, COLLECTOR)
    spooled = rig.books.counter("spooled")
    for name in FORWARDERS:
        _live_with_a_failed_sync(system, name, chance, spooled)
    rig.start(*FORWARDERS)
    wait_until(lambda: _drained(rig), _TIMEOUT_S, "the backlog is delivered")
    rig.start(COLLECTOR)
    rig.publish(BACKLOG)
    if whole:
        rig.wait_until_delivered()
    system.end()


def _live_with_a_failed_sync(
    system: Traced, name: str, chance: random.Random, enough: int = 0
) -> None:
    """Let a program live until its sync fails.

    Args:
        system: The programs.
        name: Which one.
        chance: Decides which sync fails.
        enough: A forwarder that has delivered so many may have nothing more to sync.
    """
    system.prepare(name, f"fdatasync:error=EIO:when={chance.randint(*_COMMITS[name])}")
    rig = system.rig
    program = rig.programs[name]
    sink = name.removeprefix("forwarder-")
    program.start()
    # Its files are not looked into: a process that has them open keeps SQLite's index of the log.
    wait_until(
        lambda: (
            _AT_FAULT in program.log_text
            or (name != COLLECTOR and len(rig.cloud.received(sink)) >= enough)
        ),
        _TIMEOUT_S,
        f"a sync of {name} fails",
    )
    # It would wait for some seconds before it ends.
    _stop(system, name)
    system.prepare(name)


def _stop(system: Traced, name: str) -> None:
    system.rig.programs[name].signal(signal.SIGTERM)
    system.wait_for_end(name)


def _drained(rig: Rig) -> bool:
    last = rig.books.counter("spooled")
    return all(
        rig.books.rows(sink, f"SELECT 1 FROM cursor WHERE seq >= {last}")  # noqa: S608 - a number
        for sink in rig.sinks
    )


def _cuts(recording: Recording, images: int, chance: random.Random) -> Sequence[int]:
    """Return after how many events to cut, rising: behind the first failed sync.

    Half of them right behind what was said to the broker.
    """
    kinds = [event.kind for event in recording.events]
    failed = kinds.index(Kind.SYNC_FAILS)
    said = [n + 1 for n, kind in enumerate(kinds) if kind is Kind.SEND and n > failed]
    return sorted(
        chance.choice(said) if chance.random() < 0.5 else chance.randint(failed + 1, len(kinds))
        for _ in range(images)
    )
