"""Whether a sink could deliver is found out without a reading, and no reading waits for it."""

import threading
from collections.abc import Callable, Sequence

import pytest

from forwarder.backoff import HOLD_RETRY_S
from forwarder.idlecheck import CHECK_EACH_S, IdleCheck
from forwarder.sink import Delivery, Fault, FaultKind
from spool import Reading
from tests.harness import wait_until

HOLD = Fault(FaultKind.HOLD, "no key", "make one")
DOWN = Fault(FaultKind.TRANSIENT, "the network is down")


class CheckedSink:
    """Whose check answers as it is told, when it is let."""

    name = "pubsub"
    max_rows = 1
    max_bytes = 1
    gather_s = 0.0

    def __init__(self) -> None:
        self.outcome: Fault | Exception | None = None
        self.let = threading.Event()
        self.let.set()
        self.begun = self.ended = 0

    def check(self) -> Fault | None:
        self.begun += 1
        assert self.let.wait(10)
        self.ended += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        raise AssertionError(rows)

    def close(self) -> None:
        """Hold nothing."""


class Desk:
    """The check with a clock of its own."""

    def __init__(self) -> None:
        self.sink = CheckedSink()
        self.now_s = 1_000.0
        self.said: list[tuple[str, str]] = []
        self.check = IdleCheck(
            self.sink,
            lambda state, detail: self.said.append((state, detail)),
            lambda: self.said.append(("delivering", "")),
            lambda: self.now_s,
        )

    def once(self) -> None:
        """Let one check begin, end and be told."""
        before = self.sink.ended
        self.check.look()
        wait_until(lambda: self.sink.ended > before, 10, "the check has ended")
        self.settle()

    def settle(self) -> None:
        wait_until(self._looked, 10, "its outcome is taken")

    def _looked(self) -> bool:
        self.check.look()
        return not self.check._running  # noqa: SLF001 - whether the outcome was taken


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.mark.parametrize(("fault", "state"), [(HOLD, "on hold"), (DOWN, "retrying")])
def test_what_is_missing_is_told_at_start_and_each_minute_until_it_is_there(
    desk: Desk, fault: Fault, state: str
) -> None:
    desk.sink.outcome = fault
    desk.once()
    assert desk.said == [(state, str(fault))]
    desk.check.look()
    assert desk.sink.begun == 1
    desk.now_s += HOLD_RETRY_S
    desk.sink.outcome = None
    desk.once()
    assert desk.said[-1] == ("delivering", "")
    desk.now_s += CHECK_EACH_S - 1
    desk.check.look()
    assert desk.sink.begun == 2
    desk.now_s += 1
    desk.once()
    assert desk.sink.begun == 3
    assert len(desk.said) == 2, "all was well before"


def test_a_fault_that_lasts_is_logged_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        desk.sink.outcome = Fault(FaultKind.HOLD, f"no key at try {number}")
        desk.once()
        desk.now_s += HOLD_RETRY_S
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert desk.said[-1][1] == "no key at try 4"


def test_a_check_that_hangs_delays_nothing_and_has_no_second_one(desk: Desk) -> None:
    desk.sink.let.clear()
    for _ in range(5):
        desk.check.look()
        desk.now_s += CHECK_EACH_S
    wait_until(lambda: desk.sink.begun == 1, 10, "it has begun")
    assert desk.sink.begun == 1
    assert desk.said == []
    desk.sink.let.set()
    desk.settle()


def test_what_a_delivery_tells_counts_more_than_an_earlier_check(desk: Desk) -> None:
    desk.sink.outcome = HOLD
    desk.sink.let.clear()
    desk.check.look()
    desk.check.delivered()
    desk.sink.let.set()
    wait_until(lambda: desk.sink.ended == 1, 10, "the check has ended")
    desk.settle()
    assert desk.said == []
    desk.check.look()
    assert desk.sink.begun == 1, "a delivery is a check"


def test_a_bug_in_a_check_ends_the_process(desk: Desk) -> None:
    desk.sink.outcome = ZeroDivisionError("a bug")
    desk.check.look()
    look: Callable[[], None] = desk.settle
    with pytest.raises(ZeroDivisionError):
        look()
