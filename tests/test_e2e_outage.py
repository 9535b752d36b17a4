"""The cloud, or the broker, goes away and comes back: readings wait, none is lost."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest

from tests.harness import COLLECTOR, IMPATIENT, Cloud, Rig, assert_adds_up, wait_until

READINGS = 1_000
METHODS = ("storage", "insert_all")
OTHERS = {"pubsub": "bigquery", "bigquery": "pubsub"}
SOON_S = 10.0
"""Far below what a wait behind an outage would take, far above a busy machine's delays."""


@dataclass(frozen=True)
class Outage:
    """One way in which one service can be away."""

    sink: str
    kind: str
    begin: Callable[[Cloud], None]
    end: Callable[[Cloud], object]
    seen: str
    """What the operator then reads in the backlog."""
    seen_insert_all: str = ""
    """The same where BigQuery is written to by insertAll."""

    def __str__(self) -> str:
        """Return the test's name."""
        return f"{self.sink}: {self.kind}"


OUTAGES = (
    Outage(
        "pubsub",
        "connection refused",
        lambda cloud: cloud.pubsub.stop(),
        lambda cloud: cloud.pubsub.start(),
        "UNAVAILABLE",
    ),
    Outage(
        "pubsub",
        "UNAVAILABLE",
        lambda cloud: cloud.pubsub.faults.abort(
            grpc.StatusCode.UNAVAILABLE, "The service is currently unavailable.", times=None
        ),
        lambda cloud: cloud.pubsub.faults.clear(),
        "currently unavailable",
    ),
    Outage(
        "pubsub",
        "hangs without an answer",
        lambda cloud: cloud.pubsub.faults.hang(times=None, calls={"*"}),
        lambda cloud: cloud.pubsub.faults.clear(),
        "DEADLINE_EXCEEDED",
    ),
    Outage(
        "bigquery",
        "connection refused",
        lambda cloud: cloud.stop_bigquery(),
        lambda cloud: cloud.start_bigquery(),
        "UNAVAILABLE",
        "Connection refused",
    ),
    Outage(
        "bigquery",
        "503",
        lambda cloud: cloud.refuse_bigquery(503, "backendError", grpc.StatusCode.UNAVAILABLE),
        lambda cloud: cloud.mend_bigquery(),
        "UNAVAILABLE: backendError",
        "HTTP 503",
    ),
    Outage(
        "bigquery",
        "hangs without an answer",
        lambda cloud: cloud.hang_bigquery(),
        lambda cloud: cloud.mend_bigquery(),
        "DEADLINE_EXCEEDED",
        "timed out",
    ),
)


@pytest.fixture(scope="module", params=METHODS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """One system that goes through all outages, one after the other."""
    with Rig(forwarder=IMPATIENT, BIGQUERY_WRITE_METHOD=request.param) as rig:
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered()
        yield rig


@pytest.mark.parametrize("outage", OUTAGES, ids=str)
def test_readings_wait_for_one_service_and_flow_to_the_other(rig: Rig, outage: Outage) -> None:
    seen = outage.seen
    if outage.seen_insert_all and rig.variables["BIGQUERY_WRITE_METHOD"] == "insert_all":
        seen = outage.seen_insert_all
    outage.begin(rig.cloud)
    try:
        rig.publish(READINGS)
        # The collector keeps taking and acknowledging, the other service keeps getting.
        rig.wait_until_spooled(SOON_S)
        rig.wait_until_delivered(OTHERS[outage.sink], timeout_s=SOON_S)
        wait_until(
            lambda: seen in rig.books.backlog(outage.sink)["detail"],
            SOON_S,
            f"the backlog shows {seen}",
        )
        backlog = rig.books.backlog(outage.sink)
        assert backlog["state"] == "retrying"
        assert backlog["pending"] == READINGS
        assert backlog["lag_s"] > 0
        assert backlog["oldest_received_at"] <= backlog["as_of"]
        assert rig.books.backlog(OTHERS[outage.sink])["state"] == "delivering"
        assert_adds_up(rig.books, rig.sinks)
    finally:
        outage.end(rig.cloud)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()

    def over() -> bool:
        backlog = rig.books.backlog(outage.sink)  # the cursor may lag behind what is delivered
        return (backlog["state"], backlog["pending"]) == ("delivering", 0)

    wait_until(over, SOON_S, "the backlog no longer shows the outage")


def test_both_services_away_from_the_start(rig: Rig) -> None:
    for sink in rig.sinks:
        assert rig.programs[f"forwarder-{sink}"].stop()[0] == 0
    rig.cloud.stop()
    try:
        rig.start("forwarder-pubsub", "forwarder-bigquery")
        rig.publish(READINGS)
        rig.wait_until_spooled(SOON_S)
        for sink in rig.sinks:
            wait_until(
                lambda sink=sink: rig.books.backlog(sink)["state"] == "retrying",  # type: ignore[misc]
                SOON_S,
                f"{sink} retries",
            )
    finally:
        rig.cloud.start()
    rig.wait_until_delivered()
    rig.assert_nothing_lost()


def test_an_answer_that_is_lost_loses_and_doubles_nothing(rig: Rig) -> None:
    rig.cloud.pubsub.faults.lose_answer(times=3)
    rig.cloud.bigquery.faults.lose_answer(times=3)
    rig.cloud.write_api.faults.lose_answer(times=3)
    rig.publish(READINGS)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()
    # The service recognises the second attempt by its offset, or by its insertId; Pub/Sub's
    # subscribers have event_id.
    assert len(rig.cloud.received("bigquery")) == len(rig.publisher.samples)


def test_the_broker_away_at_the_start_and_later() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        collector = rig.programs[COLLECTOR]
        collector.start()
        collector.wait_for_log("cannot reach the broker")
        rig.broker.start()
        rig.wait_for_session()
        rig.publish(READINGS)
        rig.wait_until_spooled()
        assert rig.broker.stop()[0] == 0
        collector.wait_for_log("the connection to the broker was lost")
        rig.broker.start()
        rig.publish(READINGS)
        rig.wait_until_spooled()
        assert collector.running
        assert collector.log_text.count('"message": "started"') == 1
        assert rig.books.counter("spooled") == 2 * READINGS


def test_the_broker_keeps_for_the_collector_what_comes_while_it_is_away() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.start(COLLECTOR)
        rig.publish(READINGS)
        rig.wait_until_spooled()
        assert rig.programs[COLLECTOR].stop()[0] == 0
        rig.publish(READINGS)
        assert rig.broker.stop()[0] == 0
        rig.start(COLLECTOR)
        rig.wait_until_spooled()
        figures = assert_adds_up(rig.books, ())
        assert figures.spooled == 2 * READINGS
        assert '"session_resumed": true' in rig.programs[COLLECTOR].log_text
