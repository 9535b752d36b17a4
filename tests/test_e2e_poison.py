"""One reading that a service refuses for its own sake is one dead letter, and stops nobody."""

import json

import pytest

from tests.harness import IMPATIENT, Rig, assert_adds_up, assert_in_order

READINGS = 10_000
POISON = 4_321.0
TIMEOUT_S = 60.0


@pytest.mark.parametrize("sink", ["pubsub", "bigquery"])
def test_one_poison_row_among_ten_thousand_is_one_dead_letter(sink: str) -> None:
    with Rig(forwarder=IMPATIENT) as rig:
        if sink == "pubsub":
            rig.cloud.pubsub.faults.poison = lambda data: json.loads(data)["value"] == POISON
        else:
            rig.cloud.bigquery.faults.poison = lambda row: row["value"] == POISON
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered(timeout_s=TIMEOUT_S)
        figures = assert_adds_up(rig.books, rig.sinks)
        assert figures.spooled == READINGS
        received = rig.cloud.received(sink)
        assert len(received) == READINGS - 1
        numbers = {one.number for one in received}
        assert numbers == {s.number for s in rig.publisher.samples} - {int(POISON)}
        if sink == "pubsub":
            assert_in_order(received, by="number")
        dead = rig.books.rows(sink, "SELECT value, reason, detail, site_code FROM dead_letters")
        assert len(dead) == 1
        assert dead[0][0] == POISON
        assert dead[0][2], "the service's own words are kept"
        (other,) = set(rig.sinks) - {sink}
        assert rig.books.rows(other, "SELECT 1 FROM dead_letters") == []
        assert len(rig.cloud.received(other)) == READINGS
