"""Kills of everything at random moments under load: the short version of the long run."""

import os
import time

import pytest

from tests.harness import COMMIT_DELAYS_MS, SITES, Rig
from tests.harness.cloud import TABLE_REF, TOPIC_PATH
from tests.test_spool_writer import edit
from tests.torture import kills
from tests.torture.ledger import reckon
from tests.torture.wiretap import WireTap

CYCLES = int(os.environ.get("SLUICE_KILLS", "34"))
SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns() % 2**32)))


@pytest.mark.timeout(CYCLES * 15 + 120)
def test_kills_of_everything_lose_nothing_and_the_books_add_up() -> None:
    report = kills.run(CYCLES, SEED)
    print(report)  # noqa: T201 - pytest shows it with a failure
    assert report.violations == []
    assert report.rounds == CYCLES
    for delay_ms in COMMIT_DELAYS_MS:
        assert report.counts[f"with COMMIT_DELAY_MS {delay_ms}"] == CYCLES / 2
    assert report.counts["acknowledged by the collector"] > 0
    if 2 * len(kills.STRIKES) <= CYCLES:
        assert all(report.counts[name] >= 2 for name in kills.STRIKES)


def test_the_ledger_sees_what_is_wrong() -> None:
    """A reading that a service lacks, has twice, or has too early; a counter that is off."""
    with WireTap() as tap, Rig(MQTT_PORT=str(tap.port)) as rig:
        tap.upstream = rig.broker.port
        rig.start()
        rig.publish(10 * len(SITES))
        rig.wait_until_delivered()
        before = reckon(rig, tap)
        assert before.violations == []
        assert before.sent == before.acknowledged == 10 * len(SITES)
        batches = rig.cloud.pubsub.messages(TOPIC_PATH)

        def judged(messages: list[object]) -> str:
            rig.cloud.pubsub.messages = lambda _: messages  # type: ignore[method-assign, assignment, return-value]
            return "\n".join(reckon(rig, tap).violations)

        assert "pubsub: 1 are lost" in judged([*batches[1:]])
        assert "came too late" in judged([*reversed(batches)])
        assert judged([*batches, batches[0]]) == "", "Pub/Sub may repeat"
        rows = rig.cloud.bigquery.rows(TABLE_REF)
        rig.cloud.bigquery.rows = lambda _: [*rows, rows[0]]  # type: ignore[method-assign, assignment]
        assert "bigquery: 1 repeated" in judged([*batches])
        for program in rig.programs.values():
            program.kill()
        edit(rig.spool_dir / "pubsub.db", "UPDATE counter SET value = value - 1")
        assert "pubsub: spooled = delivered" in judged([*batches])
        edit(rig.spool_dir / "spool.db", "UPDATE counter SET value = 1 WHERE name = 'received'")
        assert "received = spooled + duplicates + rejected" in judged([*batches])
