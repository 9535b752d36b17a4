"""What only a person can mend holds delivery, says how to mend it, and drops nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest

from tests.fakes.rows import Column
from tests.harness import IMPATIENT, Cloud, Rig, assert_adds_up, wait_until
from tests.harness.cloud import TABLE_REF, TOPIC_PATH

METHODS = ("storage", "insert_all")
READINGS = 300
SOON_S = 15.0


@dataclass(frozen=True)
class Hold:
    """One thing that is missing or forbidden."""

    sink: str
    kind: str
    break_it: Callable[[Cloud], object]
    mend_it: Callable[[Cloud], object]
    remedy: str
    """Part of the mending command that the backlog must show."""

    def __str__(self) -> str:
        """Return the test's name."""
        return f"{self.sink}: {self.kind}"


HOLDS = (
    Hold(
        "pubsub",
        "no topic",
        lambda cloud: cloud.pubsub.delete_topic(TOPIC_PATH),
        lambda cloud: cloud.create_topic_again(),
        "gcloud pubsub topics create kpi-events --project=acme-edge",
    ),
    Hold(
        "pubsub",
        "not permitted",
        lambda cloud: cloud.pubsub.faults.abort(
            grpc.StatusCode.PERMISSION_DENIED, "User not authorized.", times=None
        ),
        lambda cloud: cloud.pubsub.faults.clear(),
        "--role=roles/pubsub.publisher",
    ),
    Hold(
        "bigquery",
        "not permitted",
        lambda cloud: cloud.refuse_bigquery(403, "accessDenied", grpc.StatusCode.PERMISSION_DENIED),
        lambda cloud: cloud.mend_bigquery(),
        "--role=roles/bigquery.dataEditor",
    ),
    Hold(
        "bigquery",
        "a needed column is gone",
        lambda cloud: cloud.bigquery.drop_column(TABLE_REF, "pi_tag"),
        lambda cloud: cloud.bigquery.add_column(TABLE_REF, Column("pi_tag", "STRING")),
        "ADD COLUMN pi_tag STRING",
    ),
    Hold(
        "bigquery",
        "a column that we do not have is required",
        lambda cloud: cloud.bigquery.add_column(TABLE_REF, Column("unit", "STRING", "REQUIRED")),
        lambda cloud: cloud.bigquery.drop_column(TABLE_REF, "unit"),
        "ALTER COLUMN unit DROP NOT NULL",
    ),
)


@pytest.fixture(scope="module", params=METHODS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """One system that goes through all holds."""
    with Rig(forwarder=IMPATIENT, BIGQUERY_WRITE_METHOD=request.param) as rig:
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered()
        yield rig


@pytest.mark.parametrize("hold", HOLDS, ids=str)
def test_delivery_holds_says_how_to_mend_it_and_goes_on_by_itself(rig: Rig, hold: Hold) -> None:
    forwarder = rig.programs[f"forwarder-{hold.sink}"]
    pid = forwarder.pid
    hold.break_it(rig.cloud)
    try:
        rig.publish(READINGS)
        wait_until(
            lambda: hold.remedy in rig.books.backlog(hold.sink)["detail"],
            SOON_S,
            f"the backlog shows {hold.remedy}",
        )
        backlog = rig.books.backlog(hold.sink)
        assert backlog["state"] == "on hold"
        assert backlog["pending"] == READINGS
        assert (backlog["dead_letters"], backlog["dropped"]) == (0, 0)
        assert hold.remedy in forwarder.log_text
        assert_adds_up(rig.books, rig.sinks)
    finally:
        hold.mend_it(rig.cloud)
    rig.wait_until_delivered()
    assert forwarder.running, "it goes on by itself"
    assert forwarder.pid == pid, "and not by a restart"
    figures = assert_adds_up(rig.books, rig.sinks)
    assert figures.sinks[hold.sink].dead_lettered == 0
    numbers = {one.number for one in rig.cloud.received(hold.sink)}
    assert numbers >= {sample.number for sample in rig.publisher.samples[-READINGS:]}


def test_a_missing_table_is_a_hold_with_the_ddl_or_is_created_if_told_to() -> None:
    with Rig(forwarder=IMPATIENT, BIGQUERY_TABLE="another") as rig:
        rig.start()
        rig.publish(READINGS)
        wait_until(
            lambda: rig.books.backlog("bigquery")["state"] == "on hold", SOON_S, "it is on hold"
        )
        assert "CREATE TABLE `acme-edge.plant.another`" in rig.books.backlog("bigquery")["detail"]
        forwarder = rig.programs["forwarder-bigquery"]
        assert forwarder.stop()[0] == 0
        forwarder.environment["BIGQUERY_CREATE_TABLE"] = "true"
        forwarder.start()
        rig.wait_until_delivered()
        assert rig.cloud.bigquery.table_count("acme-edge.plant.another") == READINGS


def test_columns_that_the_table_lacks_and_nobody_needs_stay_unwritten() -> None:
    with Rig(PUBSUB_ENABLED="false") as rig:
        for name in ("topic", "payload", "source"):
            rig.cloud.bigquery.drop_column(TABLE_REF, name)
        rig.start("collector", "forwarder-bigquery")
        rig.publish(READINGS)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        assert "payload, source, topic" in rig.programs["forwarder-bigquery"].log_text
