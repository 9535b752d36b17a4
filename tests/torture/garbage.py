"""Small spools and much garbage: rejected messages may take no room from readings.

In every round a system with a small SPOOL_MAX_BYTES gets more garbage than it could ever hold, of
every size, with long topics, between good readings that are delivered: all of these are taken and
delivered, none is dropped, and what the ring gives up is counted.
"""

import random

from tests.harness import COLLECTOR, Packet, Rig, wait_until
from tests.torture.report import Report

SPOOLS = ("256KiB", "512KiB", "1MiB", "8MiB")
POLICIES = ("block", "drop-oldest")
GARBAGE_BYTES = 12 * 1024 * 1024
LARGEST_BYTES = 64 * 1024
STEP = 60
TIMEOUT_S = 60.0
_TOPIC_CHARS = 60_000


def run(size: int, seed: int) -> Report:
    """Run ``size`` rounds."""
    report = Report("garbage", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    for number in range(size):
        spool = SPOOLS[number % len(SPOOLS)]
        policy = dice.choice(POLICIES)
        with Rig(SPOOL_MAX_BYTES=spool, SPOOL_FULL_POLICY=policy, LOG_LEVEL="ERROR") as rig:
            rig.broker.start()
            rig.programs[COLLECTOR].start()
            for name in rig.programs:
                if name != COLLECTOR:
                    rig.programs[name].start()
            rig.wait_for_session()
            try:
                _round(rig, dice, report)
            except AssertionError as failure:
                report.violations.append(f"{spool}, {policy}: {failure}")
        report.rounds += 1
    return report


def _round(rig: Rig, dice: random.Random, report: Report) -> None:
    sent = good = 0
    while sent < GARBAGE_BYTES:
        packets = [_garbage(dice) for _ in range(STEP)]
        sent += sum(len(p.payload) + len(p.topic) for p in packets)
        # Few at a time: what is undelivered must fit by itself.
        readings = rig.plant.packets(dice.randrange(1, 30))
        good += len(readings)
        packets += readings
        rig.publisher.publish(packets)
        rig.wait_until_spooled(TIMEOUT_S)
    wait_until(
        lambda: all(rig.books.figures().sinks[s].pending == 0 for s in rig.sinks),
        TIMEOUT_S,
        "all is delivered",
    )
    rig.assert_nothing_lost()
    figures = rig.books.figures()
    kept = rig.books.rows("spool", "SELECT count(*) FROM rejected_row")[0][0]
    dropped = rig.books.counter("rejected_dropped")
    assert figures.spooled == good
    assert rig.books.counter("dropped") == 0, "a reading was dropped for garbage"
    assert figures.rejected == kept + dropped, (figures.rejected, kept, dropped)
    assert "the spool is full" not in rig.programs[COLLECTOR].log_text
    report.counts["garbage"] += figures.rejected
    report.counts["readings"] += good
    report.counts["given up"] += dropped


def _garbage(dice: random.Random) -> Packet:
    payload = dice.randbytes(dice.choice((10, 3_000, LARGEST_BYTES, dice.randrange(LARGEST_BYTES))))
    topic = "FCTS/FAE/A/SolvExtract/T"
    if not dice.randrange(20):
        topic = "FCTS/FAE/" + "ü" * (dice.randrange(_TOPIC_CHARS) // 2) + "/SolvExtract/T"
    return Packet(topic.encode(), b"\xff" + payload)
