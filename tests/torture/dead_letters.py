"""A service that refuses many readings, a small budget of dead letters, and kills in between.

Each round publishes readings of which a third is refused, kills forwarders at random moments, and
waits until both sinks are on hold. Then the limit is raised, the forwarders are started again, and
in the end every reading is delivered or a dead letter, and none is both or neither.
"""

import json
import random
import time

from tests.harness import FORWARDERS, IMPATIENT, Rig, assert_in_order, assert_once, wait_until
from tests.harness.checks import assert_adds_up, assert_all_received
from tests.torture.report import Report

READINGS = 900
"""In a round: three batches, of which two fill what is left of the budget."""

BATCH_ROWS = 300

FIRST_LIMIT_BYTES = 64 * 1024
STEP_BYTES = 48 * 1024
LETTER_BYTES = 450
"""More than one takes."""

SYSTEMS_ROUNDS = 4
"""Then a new system."""

SOON_S = 30.0
METHODS = ("storage", "insert_all")
FULL = "the budget of dead letters is used up"


def is_poison(number: float) -> bool:
    """Return whether the services refuse the reading with this value."""
    return int(number) % 3 == 0


def run(rounds: int, seed: int) -> Report:
    """Fill the budget ``rounds`` times; see the module."""
    report = Report("dead_letters", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    while report.rounds < rounds:
        method = METHODS[report.rounds // SYSTEMS_ROUNDS % len(METHODS)]
        limit = {
            "DEAD_LETTER_MAX_BYTES": str(FIRST_LIMIT_BYTES),
            "MAX_DRAIN_RATE": str(BATCH_ROWS),
        }
        with Rig(
            forwarder=IMPATIENT, broker_options=None, BIGQUERY_WRITE_METHOD=method, **limit
        ) as rig:
            rig.cloud.pubsub.faults.poison = lambda data: is_poison(json.loads(data)["value"])
            rig.cloud.poison_bigquery(lambda row: is_poison(float(str(row["value"]))))
            rig.start()
            for _ in range(min(SYSTEMS_ROUNDS, rounds - report.rounds)):
                _round(rig, dice, report)
    return report


def _round(rig: Rig, dice: random.Random, report: Report) -> None:
    report.rounds += 1
    try:
        _fill(rig, dice, report)
        _raise_limit(rig, report)
        rig.wait_until_delivered()
        _reckon(rig, report)
    except AssertionError as error:
        report.violations.append(f"round {report.rounds}: {error}")
        raise


def _fill(rig: Rig, dice: random.Random, report: Report) -> None:
    """Publish until both sinks are on hold, with kills at random moments."""
    rig.publish(READINGS)
    for _ in range(dice.randrange(3)):
        time.sleep(dice.uniform(0.0, 0.4))  # a random moment is what is wanted
        _restart(rig, dice.choice(FORWARDERS), kill=True)
        report.counts["kills while it fills"] += 1
    rig.wait_until_spooled()
    for sink in rig.sinks:
        wait_until(lambda sink=sink: _held(rig, sink), SOON_S, f"{sink} is on hold")  # type: ignore[misc]
        _check_passed(rig, sink)
        report.counts["holds"] += 1
    name = dice.choice(FORWARDERS)
    _restart(rig, name, kill=True)
    report.counts["kills on hold"] += 1
    program = rig.programs[name]
    program.wait_for_log(FULL, SOON_S)


def _held(rig: Rig, sink: str) -> bool:
    backlog = rig.books.backlog(sink)
    return backlog["state"] == "on hold" and FULL in backlog["detail"]


def _restart(rig: Rig, name: str, *, kill: bool) -> None:
    program = rig.programs[name]
    if kill:
        program.kill()
    else:
        code, _ = program.stop()
        assert code == 0, f"{name} ended with {code}"
    program.start()


def _check_passed(rig: Rig, sink: str) -> None:
    """Check, of a sink on hold, that its cursor has passed nothing that is neither."""
    ((cursor,),) = rig.books.rows(sink, "SELECT seq FROM cursor")
    kept = {seq for (seq,) in rig.books.rows(sink, "SELECT seq FROM dead_letter")}
    there = {one.seq for one in rig.cloud.received(sink)}
    neither = set(range(1, cursor + 1)) - kept - there
    assert not neither, f"{sink}: the cursor passed {sorted(neither)[:10]}, which are nowhere"
    pending = rig.books.figures().sinks[sink].pending
    assert pending > 0, f"{sink} is on hold with nothing to deliver"


def _raise_limit(rig: Rig, report: Report) -> None:
    """Do what the status advises."""
    for sink in rig.sinks:
        ((used,),) = rig.books.rows(sink, "SELECT kept_bytes FROM dead_letter_usage")
        # Room for what is left of this round, and too little for the next.
        left = rig.books.figures().sinks[sink].pending // 3 + 1
        name = f"forwarder-{sink}"
        rig.programs[name].environment["DEAD_LETTER_MAX_BYTES"] = str(
            used + left * LETTER_BYTES + STEP_BYTES
        )
        _restart(rig, name, kill=False)
    report.counts["limits raised"] += 1


def _reckon(rig: Rig, report: Report) -> None:
    samples = rig.publisher.samples
    refused = {s.number for s in samples if is_poison(s.number)}
    figures = assert_adds_up(rig.books, rig.sinks)
    assert figures.spooled == len(samples), figures
    for sink in rig.sinks:
        received = rig.cloud.received(sink)
        assert_all_received(samples, received, but=refused)
        if sink == "bigquery" and rig.variables["BIGQUERY_WRITE_METHOD"] == "storage":
            assert_once(received)
        assert_in_order(
            sorted(received, key=lambda one: one.seq) if sink == "bigquery" else received
        )
        kept = [int(value) for (value,) in rig.books.rows(sink, "SELECT value FROM dead_letter")]
        assert sorted(kept) == sorted(refused), f"{sink}: other dead letters than were refused"
        assert figures.sinks[sink].dead_lettered == len(refused)
        ((count, size, counted, counted_bytes),) = rig.books.rows(
            sink,
            "SELECT count(*), sum(d.kept_bytes), u.kept, u.kept_bytes "
            "FROM dead_letter AS d, dead_letter_usage AS u",
        )
        assert (count, size) == (counted, counted_bytes), f"{sink}: the usage is counted wrong"
        lost = len(samples) - len(refused) - len({one.event_id for one in received})
        report.counts[f"{sink} lost"] += max(0, lost)
    assert rig.cloud.pubsub.violations == []
    assert rig.cloud.write_api.violations == []
