"""Damaged files: what can be saved is, what cannot is counted and told, and it goes on at once.

Each case lets a system run, stops or kills it, damages one file as a bad disk, a bad copy or a
bad hand would, and starts it again under traffic.
"""

import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lifecycle import SINKS
from spool.writer import PAGE_BYTES
from tests.harness import COLLECTOR, IMPATIENT, PROGRAMS, Packet, Received, Rig, wait_until
from tests.harness.books import Figures
from tests.torture.ledger import Lawful, reckon
from tests.torture.report import Report
from tests.torture.wiretap import WireTap

READINGS = 400
PENDING = 300
"""Taken while the services were away, so that the damage meets what nobody has yet."""

PADDING_BYTES = 700
ROWS_PER_PAGE = PAGE_BYTES // PADDING_BYTES
RECEIVING_AGAIN_S = 30.0
"""Seconds, on a machine that is busy with other things; a start alone takes two of them, and damage
that shows while it runs takes three starts."""

SETTLE_TIMEOUT_S = 60.0
_LEAF_OF_A_TABLE = 0x0D


@dataclass(frozen=True, slots=True)
class Damage:
    """What is done to one file, and what must come of it."""

    hurt: Callable[[Path, random.Random], int]
    """Damages the file; returns how many readings the damage may cost at most."""
    file: str
    aside: bool | None
    """Whether the file must be set aside; None where it may be."""
    killed: bool = False
    """Whether the programs are killed, so that the write-ahead log is not merged."""
    repeats: frozenset[str] = frozenset({"pubsub"})
    said: str = ""
    """What stands in the owner's log."""


def _flip_in_payload(path: Path, dice: random.Random) -> int:
    data = bytearray(path.read_bytes())
    places = [match.start() for match in re.finditer(rb"x{600}", data)]
    data[dice.choice(places[-PENDING // 2 :]) + dice.randrange(600)] ^= 1 << dice.randrange(7)
    path.write_bytes(data)
    return 0  # a dead letter, with its reason


def _garbage_page(path: Path, dice: random.Random) -> int:
    """Hit readings that nobody has yet: the others may never be read again."""
    pages = _leaves(path)
    for page in dice.sample(pages[-(len(pages) * PENDING // (READINGS + PENDING)) + 1 :], 2):
        _overwrite(path, page * PAGE_BYTES, dice.randbytes(PAGE_BYTES))
    return 2 * ROWS_PER_PAGE


def _truncate(path: Path, dice: random.Random) -> int:
    pages = _leaves(path)
    with path.open("r+b") as file:
        file.truncate(pages[dice.randrange(len(pages) // 2, len(pages))] * PAGE_BYTES)
    return READINGS + PENDING


def _garbage_header(path: Path, dice: random.Random) -> int:
    _overwrite(path, 0, dice.randbytes(100))
    return 0  # each page of readings is whole


def _garbage_before_the_readings(path: Path, dice: random.Random) -> int:
    """Header, schema, meta, counters, and the top of the readings' tree."""
    _overwrite(path, 0, dice.randbytes(_leaves(path)[0] * PAGE_BYTES))
    return 0


def _garbage_everywhere(path: Path, dice: random.Random) -> int:
    _overwrite(path, 0, dice.randbytes(path.stat().st_size))
    return READINGS + PENDING


def _garbage_behind_the_header(path: Path, dice: random.Random) -> int:
    first = int.from_bytes(path.read_bytes()[16:18], "big")  # the file's own size of pages
    _overwrite(path, first, dice.randbytes(path.stat().st_size - first))
    return READINGS + PENDING


def _empty(path: Path, _: random.Random) -> int:
    path.write_bytes(b"")
    return READINGS + PENDING


def _remove(path: Path, _: random.Random) -> int:
    path.unlink()
    return READINGS + PENDING  # but for what the log has


def _foreign(path: Path, _: random.Random) -> int:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (a)")
        other.commit()
    return READINGS + PENDING


def _remove_index(path: Path, _: random.Random) -> int:
    path.with_name(f"{path.name}-shm").unlink()
    return 0


def _truncate_log(path: Path, dice: random.Random) -> int:
    log = path.with_name(f"{path.name}-wal")
    with log.open("r+b") as file:
        file.truncate(dice.randrange(32, max(33, log.stat().st_size)))
    return READINGS + PENDING


_SPOOL_ASIDE = "the damaged spool was set aside"
_SINK_ASIDE = "a new file takes the place of"
_BOTH = frozenset(SINKS)

DAMAGES: dict[str, Damage] = {
    "a bit flipped in a payload": Damage(_flip_in_payload, "spool", aside=False),
    "garbage pages": Damage(_garbage_page, "spool", aside=True, said=_SPOOL_ASIDE),
    "cut short": Damage(_truncate, "spool", aside=True, said=_SPOOL_ASIDE),
    "garbage in the header": Damage(_garbage_header, "spool", aside=True, said=_SPOOL_ASIDE),
    "garbage before the readings": Damage(
        _garbage_before_the_readings, "spool", aside=True, said=_SPOOL_ASIDE
    ),
    "another program's database": Damage(_foreign, "spool", aside=True, said=_SPOOL_ASIDE),
    "emptied": Damage(_empty, "spool", aside=False, said="spool.db was not there"),
    "emptied beside its log": Damage(_empty, "spool", aside=True, killed=True, said=_SPOOL_ASIDE),
    "gone beside its log": Damage(_remove, "spool", aside=True, killed=True, said=_SPOOL_ASIDE),
    "without its index": Damage(_remove_index, "spool", aside=False, killed=True),
    **{
        f"{sink}: {name}": Damage(hurt, sink, aside=True, repeats=_BOTH, said=_SINK_ASIDE)
        for sink in SINKS
        for name, hurt in (
            ("garbage in the header", _garbage_header),
            ("garbage behind the header", _garbage_behind_the_header),
            ("garbage everywhere", _garbage_everywhere),
            ("another program's database", _foreign),
        )
    },
    # Only the collector's snapshot tells an emptied file from one that was never begun.
    **{f"{sink}: emptied": Damage(_empty, sink, aside=None, repeats=_BOTH) for sink in SINKS},
    **{
        f"{sink}: without its index": Damage(_remove_index, sink, aside=False, killed=True)
        for sink in SINKS
    },
    **{
        f"{sink}: its log cut short": Damage(
            _truncate_log, sink, aside=False, killed=True, repeats=_BOTH
        )
        for sink in SINKS
    },
}


def run(rounds: int, seed: int, *, until: float = float("inf")) -> Report:
    """Damage a file ``rounds`` times, each time in a system of its own.

    Args:
        rounds: How many.
        seed: Of which damage, and where.
        until: time.monotonic() at which to end early.
    """
    report = Report("corruption", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    names: list[str] = []
    while report.rounds < rounds and time.monotonic() < until and not report.violations:
        names = names or dice.sample(list(DAMAGES), len(DAMAGES))
        suffer(names.pop(), dice, report)
    return report


def suffer(name: str, dice: random.Random, report: Report) -> None:
    """Let one system suffer the damage ``name``, and note in ``report`` what came of it."""
    damage = DAMAGES[name]
    report.rounds += 1
    report.counts[name] += 1
    with _system() as (rig, tap):
        before = _damaged(rig, damage, dice)
        may_cost = damage.hurt(rig.spool_dir / f"{damage.file}.db", dice)
        try:
            _go_on(rig, damage)
        except AssertionError as failure:
            report.violations.append(f"{name}: {failure}")
            report.violations += [f"{log}: {text}" for log, text in rig.logs()]
            return
        of_spool = damage.file == "spool" and _epoch(rig) != before[0]
        anew = {
            sink: _anew_from(rig.cloud.received(sink), arrived)
            for sink, arrived in before[2].items()
        }
        lawful = Lawful(
            lost=may_cost if damage.file == "spool" else 0,
            repeats=damage.repeats | (_BOTH if of_spool else frozenset()),
            order_by="seq",
            earlier=_with_later(before[1], before[2], anew) if of_spool else None,
            received_before=anew if of_spool else {},
        )
        ledger = reckon(rig, tap, lawful)
        report.violations += [f"{name}: {text}" for text in ledger.violations]
        if ledger.violations:
            report.violations += [f"{log}: {text}" for log, text in rig.logs()]
        for sink, one in ledger.sinks.items():
            report.counts[f"{sink} lost to damage"] += one.lost
            report.counts[f"{sink} repeated"] += one.repeated
            report.counts[f"{sink} dead-lettered"] += one.dead_lettered
        report.counts["salvaged"] += rig.books.counter("salvaged")


def _anew_from(received: Sequence[Received], arrived: int) -> int:
    """Return the place of the first reading of the new spool, behind the ``arrived`` ones of then.

    The collector looks twice before it sets a spool aside, and meanwhile the forwarders go on
    with it: behind their cursors, and so with higher numbers than the new one begins with.
    """
    places = range(arrived, len(received))
    return next((place for place in places if received[place].seq <= READINGS), arrived)


def _with_later(figures: Figures, arrived: dict[str, int], anew: dict[str, int]) -> Figures:
    """Return the old spool's books with what was delivered from it after the damage as well."""
    sinks = {
        sink: replace(one, delivered=one.delivered + anew[sink] - arrived[sink])
        for sink, one in figures.sinks.items()
    }
    return replace(figures, sinks=sinks)


@contextmanager
def _system() -> Iterator[tuple[Rig, WireTap]]:
    with WireTap() as tap, Rig(forwarder=IMPATIENT, MQTT_PORT=str(tap.port)) as rig:
        tap.upstream = rig.broker.port
        yield rig, tap


def _packets(rig: Rig, count: int) -> list[Packet]:
    padding = b',"padding":"' + b"x" * PADDING_BYTES + b'"}'
    return [
        Packet(s.topic.encode(), s.payload[:-1] + padding, sample=s)
        for s in rig.plant.samples(count)
    ]


def _epoch(rig: Rig) -> str:
    ((epoch,),) = rig.books.rows("spool", "SELECT value FROM meta WHERE key = 'epoch'")
    return str(epoch)


def _damaged(rig: Rig, damage: Damage, dice: random.Random) -> tuple[str, Figures, dict[str, int]]:
    """Bring the system to the moment of the damage; return epoch, books, arrivals of then."""
    rig.start()
    rig.publisher.publish(_packets(rig, READINGS))
    rig.wait_until_delivered()
    rig.cloud.stop()
    rig.publisher.publish(_packets(rig, PENDING))
    rig.wait_until_spooled()
    programs = [rig.programs[name] for name in PROGRAMS]
    dice.shuffle(programs)
    for program in programs:
        if damage.killed:
            program.kill()
        else:
            program.stop()
    arrived = {sink: len(rig.cloud.received(sink)) for sink in rig.sinks}
    before = _epoch(rig), rig.books.figures(), arrived
    if not damage.killed:
        _merge_log(rig.spool_dir / f"{damage.file}.db")
    rig.cloud.start()
    return before


def _go_on(rig: Rig, damage: Damage) -> None:
    """Start everything; check that it receives at once, and what it says and keeps."""
    owner = COLLECTOR if damage.file == "spool" else f"forwarder-{damage.file}"
    for name in PROGRAMS:
        rig.programs[name].start()
    rig.publisher.publish(_packets(rig, READINGS))
    number = rig.publisher.samples[-1].number
    # Not before: whoever looks into an emptied file makes SQLite delete the log beside it.
    wait_until(
        lambda: _restarted(rig) and damage.said in rig.programs[owner].log.read_text("utf-8"),
        RECEIVING_AGAIN_S,
        f"{owner} says {damage.said!r}",
    )
    query = f"SELECT 1 FROM reading_row WHERE value = {number}"  # noqa: S608 - a number of ours
    wait_until(
        lambda: _restarted(rig) and _readable(lambda: rig.books.rows("spool", query)),
        RECEIVING_AGAIN_S,
        "the collector receives again",
    )
    wait_until(
        lambda: _restarted(rig) and _readable(lambda: _drained(rig)),
        SETTLE_TIMEOUT_S,
        "everything is delivered",
    )
    text = rig.programs[owner].log.read_text(errors="replace")
    if damage.said:
        (line,) = [line for line in text.splitlines() if damage.said in line][:1]
        assert '"CRITICAL"' in line, f"no alarm: {line}"
    aside = list(rig.spool_dir.glob(f"{damage.file}.db.damaged-*"))
    assert damage.aside in {None, bool(aside)}, f"set aside: {aside}"
    others = set(rig.spool_dir.glob("*.damaged-*")) - set(aside)
    assert not others, f"set aside without need: {others}"


def _restarted(rig: Rig) -> bool:
    """Start again what has ended, as supervisord does; for use as a condition."""
    for name in PROGRAMS:
        program = rig.programs[name]
        if not program.running:
            assert program.wait() in {0, 75}, f"{name} ended with {program.wait()}"
            program.start()
    return True


def _readable(look: Callable[[], object]) -> bool:
    """Return whether ``look`` finds what it looks for; not while the file is still damaged."""
    try:
        return bool(look())
    except sqlite3.DatabaseError:
        return False


def _drained(rig: Rig) -> bool:
    salvage = rig.books.rows("spool", "SELECT value FROM meta WHERE key = 'salvage'")
    return (not salvage or salvage[0][0] == "") and all(
        s.pending == 0 for s in rig.books.figures().sinks.values()
    )


def _merge_log(path: Path) -> None:
    """Bring the write-ahead log into the database: what stands in the log hides any damage."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _leaves(path: Path) -> list[int]:
    """Return the numbers of the pages that hold readings, in the order of the file."""
    data = path.read_bytes()
    return [
        n
        for n in range(1, len(data) // PAGE_BYTES)
        if data[n * PAGE_BYTES] == _LEAF_OF_A_TABLE
        and b'"padding":"xxxx' in data[n * PAGE_BYTES : (n + 1) * PAGE_BYTES]
    ]


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
