"""Readings that come one by one share a commit, and no broker's window stands still for that."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from collector.gather import (
    ENOUGH_MESSAGES,
    PATIENCE_LEAST_S,
    STRETCHED_S,
    SURE,
    TRIAL_EVERY_S,
    Gathering,
)
from collector.inbox import INBOX_MAX_BYTES, Delivered, Inbox
from collector.packets import Message
from spool import Reading
from tests.test_drain import Bench, ScriptedSink

DELAY_S = 0.2


class Clock:
    """One that stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def delivered(count: int = 1, *, qos: int = 1, size: int = 10, generation: int = 1) -> Delivered:
    one = Message(b"FCTS/FAE/S1/SolvExtract/T", b"{}", qos, retained=False, mid=1, size=2)
    return Delivered(generation, 0, [one] * count, size * count)


class Desk:
    """A gathering whose time a test moves, and the collector's turn around it."""

    def __init__(self, delay_s: float = DELAY_S) -> None:
        self.clock = Clock()
        self.gathering = Gathering(delay_s, self.clock)
        self.waiting = 0

    def arrive(self, messages: int = 1, gap_s: float = 0.0) -> None:
        for _ in range(messages):
            self.clock.now_s += gap_s
            self.waiting += 1
            self.gathering.arrived(1, 1)

    def wait(self) -> float:
        """Pass the time until the commit begins while nothing comes; return how long it took."""
        begun_s = self.clock.now_s
        while (left_s := self.gathering.left_s(self.waiting)) > 0:
            self.clock.now_s += left_s + 1e-9
        self.gathering.begins(self.waiting)
        return self.clock.now_s - begun_s

    def commit(self) -> float:
        took_s = self.wait()
        self.gathering.acknowledged(self.waiting)
        self.waiting = 0
        return took_s

    def learn(self, window: int) -> None:
        """Be a broker that sends so many and no more."""
        while not self.gathering.window:
            self.arrive(window, 0.001)
            self.commit()
        assert self.gathering.window == window


def test_a_commit_begins_no_sooner_than_the_delay_after_the_last_one_began() -> None:
    desk = Desk()
    desk.arrive()
    assert desk.commit() == 0.0, "a reading that comes alone"
    begun_s = desk.clock.now_s
    desk.arrive(8, DELAY_S / 8 - 0.001)
    assert desk.gathering.left_s(desk.waiting) == pytest.approx(0.008)
    desk.commit()
    assert desk.clock.now_s == pytest.approx(begun_s + DELAY_S)
    desk.clock.now_s += DELAY_S
    desk.arrive()
    assert desk.commit() == 0.0


def test_without_a_delay_nothing_waits() -> None:
    desk = Desk(0.0)
    for _ in range(10):
        desk.arrive()
        assert desk.commit() == 0.0


def test_stretched_commits_have_another_delay_and_the_same_rules() -> None:
    desk = Desk()
    desk.gathering.stretched = True
    assert desk.gathering.delay_s == STRETCHED_S
    desk.learn(20)
    desk.arrive(19, 0.001)
    assert desk.gathering.left_s(19) > 0
    desk.arrive()
    assert desk.gathering.left_s(20) == 0.0
    desk.gathering.stretched = False
    assert desk.gathering.delay_s == DELAY_S
    assert Gathering(1.0).delay_s == 1.0


def test_enough_messages_wait_for_nothing() -> None:
    desk = Desk()
    desk.arrive()
    desk.commit()
    desk.arrive(ENOUGH_MESSAGES - 1)
    assert desk.gathering.left_s(desk.waiting) > 0
    assert not desk.gathering.enough(desk.waiting)
    desk.arrive()
    assert desk.gathering.enough(desk.waiting)
    assert desk.commit() == 0.0


def test_a_window_is_learned_from_waits_that_end_in_silence() -> None:
    desk = Desk()
    for turn in range(SURE):
        desk.arrive(20, 0.001)
        took_s = desk.commit()
        assert took_s < DELAY_S / 2, turn
        if desk.gathering.window:
            break
    assert desk.gathering.window == 20
    desk.arrive(19)
    assert desk.gathering.left_s(19) > 0
    desk.arrive()
    assert desk.gathering.interrupts(20), "the commit begins while it waits"
    assert desk.commit() == 0.0


def test_waits_of_changing_size_are_no_window() -> None:
    desk = Desk()
    for turn in range(4 * SURE):
        desk.arrive(10 + turn % 2, 0.001)
        desk.commit()
        assert desk.gathering.window == 0


def test_more_outstanding_than_the_window_refutes_it() -> None:
    desk = Desk()
    desk.learn(20)
    desk.arrive(ENOUGH_MESSAGES)
    assert desk.gathering.window == 0
    assert desk.commit() == 0.0
    # Mosquitto 2.0.11 does that now and then: the next silence at the same number is enough.
    desk.arrive(20, 0.001)
    assert desk.commit() < DELAY_S / 2
    assert desk.gathering.window == 20


def test_what_comes_while_a_full_window_is_committed_refutes_it() -> None:
    desk = Desk()
    desk.learn(20)
    desk.arrive(20)
    assert desk.wait() == 0.0
    desk.arrive()  # before any acknowledgement
    assert desk.gathering.window == 0


def test_a_trial_shows_that_bursts_of_one_size_were_no_window() -> None:
    desk = Desk()
    desk.learn(10)
    desk.clock.now_s += TRIAL_EVERY_S
    desk.arrive()
    desk.commit()
    desk.arrive(10, 0.005)
    assert desk.gathering.left_s(10) > 0.04, "a trial"
    desk.arrive(10, 0.005)
    assert desk.gathering.window == 0
    desk.commit()
    desk.arrive(10, 0.001)
    # Below what was outstanding lately, a silence is the sensors'.
    assert desk.commit() > 0.1


def test_a_trial_in_vain_is_short_and_comes_seldom() -> None:
    desk = Desk(1.0)
    desk.learn(20)
    trials = []
    begun_s = desk.clock.now_s
    while desk.clock.now_s < begun_s + 60.0:
        desk.arrive(20, 0.001)  # 1,000 a second
        took_s = desk.commit()
        if took_s:
            trials.append(took_s)
        assert desk.gathering.window == 20
    assert 5 <= len(trials) <= 12
    assert max(trials) < 0.06, "50 messages in the broker's queue"


def test_another_connection_begins_anew() -> None:
    desk = Desk()
    desk.learn(20)
    desk.gathering.arrived(2, 1)
    assert desk.gathering.window == 0
    assert desk.gathering.left_s(1) == pytest.approx(PATIENCE_LEAST_S)


def test_messages_of_qos_0_wait_for_the_delay_and_count_for_no_window() -> None:
    desk = Desk()
    desk.arrive()
    desk.commit()
    desk.gathering.arrived(1, 0)
    assert desk.gathering.left_s(1) == pytest.approx(DELAY_S)
    assert not desk.gathering.interrupts(1)
    desk.learn(5)
    desk.arrive(4)
    desk.gathering.arrived(1, 0)
    assert not desk.gathering.enough(5)


def test_the_patience_follows_the_gaps_also_while_a_wait_is_under_way() -> None:
    desk = Desk(1.0)
    desk.arrive(3, 0.1)
    desk.commit()
    desk.arrive(1, 0.1)
    assert desk.gathering.left_s(1) > 0.1
    desk.arrive(9, 0.0001)
    assert desk.gathering.interrupts(10), "the wait under way is longer than is right now"
    assert desk.gathering.left_s(10) < 0.05
    assert not desk.gathering.interrupts(10)


# --- the inbox


class Recorded(Gathering):
    """Wants so long a wait each time; counts the commits."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(wait_s)
        self.asked_s = wait_s
        self.asked = threading.Event()
        self.begun = 0

    def left_s(self, messages: int) -> float:
        self.asked.set()
        return 0.0 if self.enough(messages) else self.asked_s

    def begins(self, messages: int) -> None:
        self.begun += 1
        super().begins(messages)


LONG_S = 60.0
"""A wait that ends by its time, and not by what should end it, fails by the test's time limit."""


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(lambda inbox: inbox.put(delivered(ENOUGH_MESSAGES)), id="enough"),
        pytest.param(lambda inbox: inbox.put(delivered(1, size=INBOX_MAX_BYTES // 2)), id="bytes"),
        pytest.param(lambda inbox: inbox.close(), id="end"),
    ],
)
def test_what_ends_a_wait_of_the_inbox(ends: Callable[[Inbox], None]) -> None:
    gathering = Recorded(LONG_S)
    inbox = Inbox(lambda: None, gathering)
    inbox.put(delivered())
    taken: list[Delivered] = []
    thread = threading.Thread(target=lambda: taken.extend(inbox.take(5_000, 0.0)))
    thread.start()
    assert gathering.asked.wait(LONG_S)
    inbox.put(delivered())  # which does not
    ends(inbox)
    thread.join()
    assert len(taken) >= 2
    assert gathering.begun == 1
    inbox.close()
    inbox.put(delivered())
    assert len(inbox.take(5_000, 0.0)) == 1, "what comes after the end does not wait at all"


def test_the_inbox_counts_what_is_acknowledged_and_no_qos_0() -> None:
    desk = Desk()
    inbox = Inbox(lambda: None, desk.gathering)
    desk.learn(20)
    inbox.put(delivered(19))
    inbox.put(delivered(5, qos=0))
    assert not desk.gathering.enough(24)
    inbox.acknowledged(1)
    inbox.put(delivered(1))
    assert not desk.gathering.enough(25)
    inbox.put(delivered(1))
    assert desk.gathering.enough(26)
    inbox.put(delivered(1))
    assert desk.gathering.window == 0


def test_an_empty_inbox_begins_nothing() -> None:
    gathering = Recorded(LONG_S)
    inbox = Inbox(lambda: None, gathering)
    assert inbox.take(5_000, 0.0) == []
    assert gathering.begun == 0


@pytest.mark.parametrize(
    ("service_s", "expected_s"),
    [
        pytest.param(0.1, 0.15, id="the next batch gathers for the rest of the time"),
        pytest.param(0.4, 0.0, id="what came while the service was slow has waited long enough"),
    ],
)
def test_a_forwarder_gathers_as_long_as_its_sink_says(
    tmp_path: Path, service_s: float, expected_s: float
) -> None:
    bench = Bench(tmp_path, rows=2)

    def takes_long(_: int, __: Sequence[Reading]) -> None:
        bench.stop.now_s += service_s

    sink = ScriptedSink(takes_long)
    sink.gather_s = 0.25
    stop = bench.drain(sink)
    assert stop.waits[0] == pytest.approx(expected_s)
    assert len(sink.calls) == 1
    bench.close()
