"""Readings that come one by one share a commit; nobody waits long, and nobody waits in vain."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from collector.gather import ENOUGH_MESSAGES, GATHER_S, IN_VAIN_MAX, LEFT_OUT, Gathering
from collector.inbox import Delivered, Inbox
from collector.packets import Message
from spool import Reading
from tests.test_drain import Bench, ScriptedSink


class Clock:
    """One that stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def delivered(count: int = 1) -> Delivered:
    one = Message(b"FCTS/FAE/S1/SolvExtract/T", b"{}", 1, retained=False, mid=1, size=2)
    return Delivered(1, 0, [one] * count, 10 * count)


def test_a_commit_begins_no_sooner_than_so_long_after_the_last_one_began() -> None:
    clock = Clock()
    gathering = Gathering(clock)
    assert gathering.wait_s() == 0.0
    gathering.begins()
    clock.now_s += GATHER_S / 4
    assert gathering.wait_s() == pytest.approx(GATHER_S * 3 / 4)
    clock.now_s += GATHER_S
    assert gathering.wait_s() == 0.0


def test_waiting_in_vain_is_given_up_for_a_while_and_tried_again() -> None:
    clock = Clock()
    gathering = Gathering(clock)

    def turn(*, in_vain: bool) -> bool:
        gathering.begins()
        if waited := gathering.wait_s() > 0:
            gathering.waited(in_vain=in_vain)
        return waited

    for _ in range(IN_VAIN_MAX - 1):
        assert turn(in_vain=True)
    assert turn(in_vain=False)  # one that brought something, and the count begins anew
    assert all(turn(in_vain=True) for _ in range(IN_VAIN_MAX))
    assert not any(turn(in_vain=True) for _ in range(LEFT_OUT))
    assert turn(in_vain=True)


class Recorded(Gathering):
    """Wants so long a wait each time; keeps whether the waits brought something."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.asked_s = wait_s
        self.in_vain: list[bool] = []
        self.begun = 0

    def wait_s(self) -> float:
        return self.asked_s

    def waited(self, *, in_vain: bool) -> None:
        self.in_vain.append(in_vain)

    def begins(self) -> None:
        self.begun += 1


LONG_S = 60.0
"""A wait that ends by its time, and not by what should end it, fails by the test's time limit."""


def taken_while(gathering: Recorded, first: int, then: list[int]) -> tuple[list[Delivered], Inbox]:
    """Take from an inbox with ``first`` messages, into which ``then`` come while it waits."""
    inbox = Inbox(lambda: None, gathering)
    inbox.put(delivered(first))
    taken: list[Delivered] = []
    thread = threading.Thread(target=lambda: taken.extend(inbox.take(5_000, 0.0)))
    thread.start()
    for count in then:
        inbox.put(delivered(count))
    thread.join()
    return taken, inbox


def test_enough_messages_end_the_wait() -> None:
    gathering = Recorded(LONG_S)
    taken, _ = taken_while(gathering, 1, [1] * (ENOUGH_MESSAGES - 1))
    assert sum(len(item.messages) for item in taken) >= ENOUGH_MESSAGES
    assert gathering.begun == 1


def test_enough_messages_do_not_wait_at_all() -> None:
    gathering = Recorded(LONG_S)
    taken, _ = taken_while(gathering, ENOUGH_MESSAGES, [])
    assert sum(len(item.messages) for item in taken) == ENOUGH_MESSAGES
    assert gathering.in_vain == []


def test_the_end_of_the_collector_ends_the_wait() -> None:
    gathering = Recorded(LONG_S)
    inbox = Inbox(lambda: None, gathering)
    inbox.put(delivered())
    taken: list[Delivered] = []
    thread = threading.Thread(target=lambda: taken.extend(inbox.take(5_000, 0.0)))
    thread.start()
    inbox.close()
    thread.join()
    assert len(taken) == 1
    inbox.put(delivered())
    assert len(inbox.take(5_000, 0.0)) == 1  # and what still comes does not wait at all


@pytest.mark.parametrize("company", [0, 3])
def test_the_wait_ends_by_its_time_and_tells_whether_it_brought_anything(company: int) -> None:
    gathering = Recorded(0.3)
    begun = time.monotonic()
    taken, _ = taken_while(gathering, 1, [1] * company)
    if gathering.in_vain:  # the company may have come before it began to wait
        assert time.monotonic() - begun >= gathering.asked_s
        assert gathering.in_vain == [company == 0] or sum(len(i.messages) for i in taken) == 4
    assert sum(len(item.messages) for item in taken) == company + 1


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
