"""The power-cut suite: record a run, cut the power anywhere in it, see whether the promise holds.

``python -m tests.torture.powercut --images N --seed S`` runs it and prints the report.
"""

import argparse
import dataclasses
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness import COMMIT_DELAYS_MS
from tests.torture.broken import MUTATIONS, OFTEN
from tests.torture.images import Disk
from tests.torture.recording import Recording, record
from tests.torture.revival import revive
from tests.torture.syscalls import Kind
from tests.torture.verdict import Violation, Wrong, judge
from tests.torture.witness import Truth, acknowledged

DATABASES = ("spool.db", "pubsub.db", "bigquery.db")
MESSAGES = 1_600
IMAGES_A_RECORDING = 500
IMAGES_A_REVIVAL = 30
"""One in so many images is given to the real processes, too."""

SECOND_CUTS_A_REVIVAL = 10
"""So many times the power is cut again while the real processes recover."""

_SHOWN = 20
_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory, for files of a second


@dataclass(slots=True)
class Report:
    """What a run has shown.

    Attributes:
        seed: Runs it again.
        images: How many were opened.
        revived: How many of them were given to the real processes.
        second: How many images there were besides of second cuts, while those recovered.
        unrecorded: How many of those there is no second cut of, because the clock was set.
        revived_twice: How many of those were given to the real processes in their turn.
        messages: How many were published for them.
        acked: How many PUBACKs were seen for them.
        writes: By the file: how many writes their recordings have.
        pruned: How many rows left the spool in their recordings.
        delays: By COMMIT_DELAY_MS: how many images there were of recordings with it.
        cuts: By the kind of what came last before the cut: how many.
        violations: Of each image that broke a rule: its number and what it broke.
        kept: Where the files of those images are.
        seconds: How long it took.
    """

    seed: int
    images: int = 0
    revived: int = 0
    unrecorded: int = 0
    second: int = 0
    revived_twice: int = 0
    messages: int = 0
    acked: int = 0
    writes: Counter[str] = field(default_factory=Counter)
    pruned: int = 0
    delays: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    violations: list[tuple[int, Violation]] = field(default_factory=list)
    kept: Path | None = None
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        """What a table of sums is made of."""
        return Counter(
            {
                "images": self.images,
                "images of a second cut": self.second,
                "run to their end": self.revived + self.revived_twice,
                "messages": self.messages,
                "PUBACKs": self.acked,
                "lost": self._broken(Wrong.LOST),
                "repeated in BigQuery": self._broken(Wrong.REPEATED),
            }
        )

    def _broken(self, wrong: Wrong) -> int:
        return sum(violation.wrong is wrong for _, violation in self.violations)

    def __str__(self) -> str:
        """Return the report as text."""
        tried = f"{self.images} images of runs with {self.messages} messages"
        ended = f"{self.revived} run to their end by the real processes"
        again = (
            f"{self.second} images of a second cut meanwhile, {self.revived_twice} run to theirs"
        )
        result = f"{len(self.violations)} violations, {self.seconds:.0f} s"
        lines = [
            f"power cuts: seed {self.seed}: {tried}, {ended}, {again}, {result}",
            f"{self.acked} PUBACKs; writes: {dict(self.writes.most_common())}",
            f"cut after: {dict(self.cuts.most_common())}",
            f"COMMIT_DELAY_MS: {dict(self.delays.most_common())}; {self.pruned} rows were pruned",
        ]
        if self.kept is not None:
            lines.append(f"the images that broke a rule are in {self.kept}")
        lines += [f"image {n}: {v.wrong.name}: {v.detail}" for n, v in self.violations[:_SHOWN]]
        return "\n".join(lines)


def run(images: int, seed: int) -> Report:
    """Try ``images`` images of recordings of the product as it is.

    Args:
        images: How many, in all.
        seed: Decides what is cut, kept, torn and killed; not the timing of a recording, which
            is why images that break a rule are kept.

    Raises:
        NoStraceError: strace is missing or may not trace.
    """
    report = Report(seed)
    # Even, so that both ways are tried: the product as it is, and with checkpoints and pruning
    # often; and readings that gather, and such that do not. Which goes with which depends on the
    # seed; in a longer run each goes with each.
    recordings = 2 * math.ceil(images / (2 * IMAGES_A_RECORDING))
    for number in range(recordings):
        chance = random.Random(f"{seed} {number}")  # noqa: S311 - no secret
        wanted = math.ceil((images - report.images) / (recordings - number))
        often, delay = number % 2, (number + number // 2 + seed) % len(COMMIT_DELAYS_MS)
        try_recording(
            report,
            wanted,
            chance,
            change=OFTEN if often else "",
            commit_delay_ms=COMMIT_DELAYS_MS[delay],
        )
    return report


def try_recording(  # noqa: PLR0913 - all of them say what is recorded
    report: Report,
    images: int,
    chance: random.Random,
    *,
    messages: int = MESSAGES,
    change: str = "",
    commit_delay_ms: str = COMMIT_DELAYS_MS[-1],
) -> None:
    """Make one recording and try ``images`` of it; add what comes of it to ``report``.

    Args:
        report: Added to.
        images: How many.
        chance: Decides everything that is left to chance.
        messages: How many are published.
        change: One of :mod:`tests.torture.broken`: of a mutation nothing is killed, and no image
            revived or kept.
        commit_delay_ms: How long the readings gather.
    """
    began = time.monotonic()
    mutated = change in MUTATIONS
    with tempfile.TemporaryDirectory(prefix="sluice-cut-") as scratch:
        recording = record(
            Path(scratch),
            messages,
            chance,
            change=change,
            commit_delay_ms=commit_delay_ms,
            calm=mutated,
        )
    report.messages += len(recording.packets)
    report.pruned += recording.pruned
    report.acked += sum(1 for _ in acknowledged(recording.events))
    written = (Path(e.path).name for e in recording.events if e.kind is Kind.WRITE)
    report.writes += Counter(name for name in written if name.startswith(DATABASES))
    for cut, files in images_of(recording, _cuts(recording, images, chance), chance):
        last = recording.events[cut - 1]
        report.cuts[last.kind.value] += 1
        report.delays[commit_delay_ms] += 1
        truth = recording.witness.truth(last.at)
        found = judged(files, truth)
        if not mutated and report.images % IMAGES_A_REVIVAL == IMAGES_A_REVIVAL // 2:
            found += _revive(report, files, truth, recording, chance)
        if found and not mutated:
            _keep(report, files)
        report.violations += [(report.images, violation) for violation in found]
        report.images += 1
    report.seconds += time.monotonic() - began


def images_of(
    recording: Recording,
    cuts: Sequence[int],
    chance: random.Random,
    files: dict[str, bytes] | None = None,
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Yield an image for each cut, with the cut.

    Args:
        recording: Of what.
        cuts: After how many events, rising.
        chance: Decides what of the unsynced is kept.
        files: What was there when the recording began.
    """
    disk = Disk(recording.directory, DATABASES, files)
    done = 0
    for cut in cuts:
        while done < cut:
            disk.apply(recording.events[done])
            done += 1
        yield cut, disk.cut(chance)


def judged(files: dict[str, bytes], truth: Truth) -> list[Violation]:
    """Return what is wrong with an image."""
    with _image(files) as directory:
        return judge(directory, truth)


def _revive(
    report: Report,
    files: dict[str, bytes],
    truth: Truth,
    recording: Recording,
    chance: random.Random,
) -> list[Violation]:
    """Give the image to the real processes, and cut the power again while they recover."""
    with tempfile.TemporaryDirectory(prefix="sluice-cut-") as scratch:
        revival = revive(files, truth, recording, Path(scratch))
    report.revived += 1
    found = revival.violations
    if revival.recording is None:
        report.unrecorded += not found
        return found
    second = revival.recording
    for cut, left in images_of(
        second, second_cuts(second, SECOND_CUTS_A_REVIVAL, chance), chance, files
    ):
        last = second.events[cut - 1]
        now = second.witness.truth(last.at)
        wrong = judged(left, now)
        if report.second % IMAGES_A_REVIVAL == 0:
            with tempfile.TemporaryDirectory(prefix="sluice-cut-") as scratch:
                wrong += revive(left, now, second, Path(scratch)).violations
            report.revived_twice += 1
        report.second += 1
        if wrong:
            _keep(report, left, f"second-{report.second}")
        found += [
            dataclasses.replace(v, detail=f"second cut, after event {cut}: {v.detail}")
            for v in wrong
        ]
    return found


def second_cuts(recording: Recording, images: int, chance: random.Random) -> Sequence[int]:
    """Return after how many events of a recovery to cut, rising.

    Half of them before the first message comes: while files are opened, logs are recovered and
    migrations looked for. The others as in any run.
    """
    opening = _opening(recording)
    early = [chance.randint(1, opening) for _ in range(images // 2)]
    return sorted([*early, *_cuts(recording, images - len(early), chance)])


def _opening(recording: Recording) -> int:
    """Return how many events there are until the broker answers for the first time."""
    kinds = [event.kind for event in recording.events]
    return max(1, kinds.index(Kind.RECEIVE) if Kind.RECEIVE in kinds else len(kinds))


def _cuts(recording: Recording, images: int, chance: random.Random) -> Sequence[int]:
    """Return after how many events to cut, rising: anywhere, and as often where it matters.

    That is right behind what was said to the broker, and right before and right behind the end of a
    sync, where readings are on the disk and not yet acknowledged; and one in ten while the files
    are made.
    """
    events = recording.events
    delicate = [n + 1 for n, event in enumerate(events) if event.kind is Kind.SEND]
    ends = [n for n, event in enumerate(events) if event.kind is Kind.SYNC_ENDS and n]
    delicate += [*ends, *(n + 1 for n in ends)]
    opening = _opening(recording)

    def cut() -> int:
        kind = chance.random()
        if kind < 0.1:
            return chance.randint(1, opening)
        return chance.choice(delicate) if kind < 0.55 else chance.randint(1, len(events))

    return sorted(cut() for _ in range(images))


@contextmanager
def _image(files: dict[str, bytes]) -> Iterator[Path]:
    """Give out a directory with the files; in memory, where opening them costs no syncs."""
    where = _MEMORY if _MEMORY.is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="sluice-image-", dir=where))
    try:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        yield directory
    finally:
        shutil.rmtree(directory)


def _keep(report: Report, files: dict[str, bytes], name: str = "") -> None:
    """Put an image aside: a recording's timing is never the same again, seed or not."""
    if report.kept is None:
        report.kept = Path(tempfile.mkdtemp(prefix="sluice-failed-images-"))
    directory = report.kept / (name or f"image-{report.images}")
    directory.mkdir()
    for file, content in files.items():
        (directory / file).write_bytes(content)


def main() -> int:
    """Run it as the command line says; return whether something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES_A_RECORDING)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))  # noqa: S311 - no secret
    arguments = parser.parse_args()
    report = run(arguments.images, arguments.seed)
    sys.stdout.write(f"{report}\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
