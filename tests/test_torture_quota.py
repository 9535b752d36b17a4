"""Hours of refusals and services that answer half, with the real sinks and a simulated clock."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from forwarder.backoff import BACKOFF_MAX_S
from forwarder.drain import Drain
from forwarder.pubsub import PublishResponse, PubSubSink
from forwarder.registry import BUILDERS
from forwarder.sink import Delivery
from lifecycle import Watchdog, load_settings
from spool import Reading, SinkState, SpoolWriter, claim_environment
from tests.harness import Cloud
from tests.test_drain import SITES, FakeStop
from tests.test_spool_writer import look, new_reading

HOUR_S = 3600.0
ROWS = 900
WAYS = ("pubsub", "storage", "insert_all", "storage_default")


class Gate:
    """A spool, and one real sink before a fake service."""

    def __init__(self, directory: Path, way: str) -> None:
        self.cloud = Cloud().start()
        self.sink = "pubsub" if way == "pubsub" else "bigquery"
        self.way = way
        self.directory = directory
        self.writer = SpoolWriter.open(directory)
        claim_environment(self.writer, "DEV", [])
        self.state = SinkState.open(directory, self.sink)
        self.writer.append(
            [new_reading(n + 1, site=SITES[n % len(SITES)]) for n in range(ROWS)], [], {}
        )
        variables = {"APP_ENV": "DEV", **self.cloud.environment()}
        if way != "pubsub":
            variables["BIGQUERY_WRITE_METHOD"] = way
        self.deliverer = BUILDERS[self.sink](load_settings(variables, "gate"), self.state)
        self.tries = 0
        deliver = self.deliverer.deliver

        def counted(rows: Sequence[Reading]) -> Delivery:
            self.tries += 1
            return deliver(rows)

        self.deliverer.deliver = counted  # type: ignore[method-assign]

    def drained(self) -> bool:
        return self.state.position(self.writer.epoch) == ROWS

    def drain(self, at_each_wait: Callable[[float], object]) -> FakeStop:
        """Drain to the end; ``at_each_wait`` is told how late it is."""

        def until() -> bool:
            at_each_wait(stop.now_s)
            return self.drained()

        stop = FakeStop(until)
        Drain(
            directory=self.directory,
            sink=self.deliverer,
            state=self.state,
            app_env="DEV",
            max_rate=0,
            stop=stop,
            watchdog=Watchdog(["a loop that never turns"], 1.0),
            jitter=lambda: 0.5,
            clock=lambda: stop.now_s,
        ).run()
        return stop

    def refuse(self, status: int, reason: str, code: grpc.StatusCode) -> None:
        """Have every request refused from now on."""
        self.cloud.pubsub.faults.abort(code, reason, times=None, calls={"*"})
        self.cloud.refuse_bigquery(status, reason, code)

    def mend(self) -> None:
        self.cloud.pubsub.faults.clear()
        self.cloud.mend_bigquery()

    def seqs(self) -> list[int]:
        return [one.seq for one in self.cloud.received(self.sink)]

    def close(self) -> None:
        self.deliverer.close()
        self.state.close()
        self.writer.close()
        self.mend()
        self.cloud.stop()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keep a day's log lines out of the report of a failure."""
    caplog.set_level(logging.CRITICAL, "forwarder")


@pytest.fixture(params=WAYS)
def gate(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path, request.param)
    yield made
    made.close()


def assert_all_there(gate: Gate) -> None:
    counters = gate.state.counters()
    assert counters.get("delivered") == ROWS
    assert counters.get("dead_lettered", 0) == 0
    seqs = gate.seqs()
    assert set(seqs) == set(range(1, ROWS + 1))
    if gate.way in {"storage", "storage_default"}:
        assert seqs == sorted(set(seqs)), "in order, and each once"
    assert not look(gate.state.path, "SELECT seq FROM dead_letter")


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [
        (403, "quotaExceeded", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (429, "tooManyRequests", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (502, "badGateway", grpc.StatusCode.UNKNOWN),
    ],
)
def test_an_hour_of_refusals_is_waited_out_with_patience_and_loses_nothing(
    gate: Gate, status: int, reason: str, code: grpc.StatusCode
) -> None:
    gate.refuse(status, reason, code)
    states = set()

    def at_each_wait(now_s: float) -> None:
        states.update(look(gate.state.path, "SELECT state FROM status"))
        if now_s >= HOUR_S:
            gate.mend()

    stop = gate.drain(at_each_wait)
    assert stop.now_s < HOUR_S + 2 * BACKOFF_MAX_S, "it goes on soon after the end"
    # Neither given up nor hammered on: about one a half minute, once the backoff is at its end.
    assert HOUR_S / BACKOFF_MAX_S <= gate.tries <= 10 + HOUR_S / (BACKOFF_MAX_S / 2)
    assert states - {("delivering",)} == {("retrying",)}
    assert_all_there(gate)


def test_hours_without_permission_is_a_hold_and_loses_nothing(gate: Gate) -> None:
    gate.refuse(403, "accessDenied", grpc.StatusCode.PERMISSION_DENIED)
    states = set()

    def at_each_wait(now_s: float) -> None:
        states.update(look(gate.state.path, "SELECT state FROM status"))
        if now_s >= 5 * HOUR_S:
            gate.mend()

    gate.drain(at_each_wait)
    assert states - {("delivering",)} == {("on hold",)}
    assert_all_there(gate)


def test_a_schema_that_refuses_every_row_is_a_hold_and_makes_no_dead_letter(gate: Gate) -> None:
    gate.cloud.pubsub.faults.poison = lambda _: True
    gate.cloud.poison_bigquery(lambda _: True)
    states = set()
    details = set()

    def at_each_wait(now_s: float) -> None:
        for state, detail in look(gate.state.path, "SELECT state, detail FROM status"):
            states.add(state)
            details.add(str(detail))
        if now_s >= HOUR_S / 6:
            gate.mend()

    gate.drain(at_each_wait)
    assert states - {"delivering"} == {"on hold"}
    assert any("every row is refused" in detail for detail in details)
    assert_all_there(gate)


@pytest.mark.parametrize("told", [0, 0.5, 2])
def test_fewer_or_more_ids_than_messages_are_no_success(tmp_path: Path, told: float) -> None:
    gate = Gate(tmp_path, "pubsub")
    sink = gate.deliverer
    assert isinstance(sink, PubSubSink)
    answers = 0

    def half(raw: bytes) -> Any:  # noqa: ANN401 - protobuf's classes have no types
        nonlocal answers
        answers += 1
        whole = PublishResponse.FromString(raw)
        if answers <= 10:
            ids = list(whole.message_ids)
            del whole.message_ids[:]
            whole.message_ids.extend((ids * 2)[: round(told * len(ids))])
        return whole

    sink._connect()  # noqa: SLF001 - the one place where its channel is to be had
    assert sink._connection  # noqa: SLF001 - the same
    sink._publish = sink._connection.channel.unary_unary(  # noqa: SLF001 - the same
        "/google.pubsub.v1.Publisher/Publish",
        request_serializer=None,
        response_deserializer=half,
    )
    details = set()
    gate.drain(lambda _: details.update(look(gate.state.path, "SELECT detail FROM status")))
    assert answers > 10
    assert any("message ids came for 300 messages" in str(detail) for (detail,) in details)
    assert_all_there(gate)
    # Of each site what came first came in order; the repetitions are the subscribers' to drop.
    for site in SITES:
        seqs = [r.seq for r in gate.cloud.received("pubsub") if r.site == site]
        firsts = list(dict.fromkeys(seqs))
        assert firsts == sorted(firsts)
    gate.close()
