"""One reading that a service refuses for its own sake is one dead letter, and stops nobody."""

import json

import pytest

from tests.harness import IMPATIENT, Rig, assert_adds_up, assert_all_received, assert_in_order

READINGS = 10_000
POISON = 4_321.0
TIMEOUT_S = 60.0


@pytest.mark.parametrize(
    ("sink", "method", "reason", "words"),
    [
        ("pubsub", "storage", "invalid_argument", "failed schema validation"),
        ("bigquery", "storage", "invalid", "poisoned, as planned"),
        ("bigquery", "storage_default", "invalid", "poisoned, as planned"),
        ("bigquery", "insert_all", "invalid", "The row was refused."),
    ],
)
def test_one_poison_row_among_ten_thousand_is_one_dead_letter(
    sink: str, method: str, reason: str, words: str
) -> None:
    with Rig(forwarder=IMPATIENT, BIGQUERY_WRITE_METHOD=method) as rig:
        if sink == "pubsub":
            rig.cloud.pubsub.faults.poison = lambda data: json.loads(data)["value"] == POISON
        else:
            rig.cloud.poison_bigquery(lambda row: row["value"] == POISON)
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered(timeout_s=TIMEOUT_S)
        figures = assert_adds_up(rig.books, rig.sinks)
        assert figures.spooled == READINGS
        received = rig.cloud.received(sink)
        assert len(received) == READINGS - 1
        numbers = {one.number for one in received}
        assert numbers == {s.number for s in rig.publisher.samples} - {int(POISON)}
        # A table has no order but that of its column seq.
        in_order = received if sink == "pubsub" else sorted(received, key=lambda one: one.seq)
        assert_in_order(in_order)
        (letter,) = rig.books.as_operator("SELECT * FROM dead_letters", sink)
        (poison,) = [s for s in rig.publisher.samples if s.number == POISON]
        assert (letter["topic"], letter["payload"]) == (poison.topic, poison.payload.decode())
        assert letter["reason"] == reason
        assert words in letter["detail"], "the service's own words are kept"
        (other,) = set(rig.sinks) - {sink}
        assert rig.books.rows(other, "SELECT 1 FROM dead_letters") == []
        assert len(rig.cloud.received(other)) == READINGS


def test_several_poison_rows_in_a_row_cost_only_themselves() -> None:
    with Rig() as rig:
        numbers = set(range(200, 210))
        rig.cloud.pubsub.faults.poison = lambda data: json.loads(data)["value"] in numbers
        rig.cloud.poison_bigquery(lambda row: row["value"] in numbers)
        rig.start()
        rig.publish(500)
        rig.wait_until_delivered()
        figures = assert_adds_up(rig.books, rig.sinks)
        for sink in rig.sinks:
            assert figures.sinks[sink].dead_lettered == len(numbers)
            assert_all_received(rig.publisher.samples, rig.cloud.received(sink), but=numbers)
