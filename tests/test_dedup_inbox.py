"""The window knows the last ids and no more; the inbox is bounded and keeps the order."""

import threading
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import collector.inbox
from collector.dedup import DedupWindow
from collector.inbox import Delivered, Inbox
from collector.packets import Message
from spool import event_id


def identity(number: int) -> bytes:
    return event_id(b"t", b"%d" % number)


@given(size=st.integers(0, 8), ids=st.lists(st.integers(0, 12), max_size=80))
def test_the_window_is_the_last_so_many_different_ids(size: int, ids: list[int]) -> None:
    window = DedupWindow(size)
    kept: list[int] = []
    for number in ids:
        new = window.add(identity(number))
        assert new == (number not in kept)
        if new and size:
            kept = [*kept, number][-size:]
        assert len(window) == len(kept)


@settings(max_examples=20)
@given(size=st.integers(100, 400), seed=st.integers(0, 2**32))
def test_a_window_of_many_buckets_forgets_in_the_order_of_arrival(size: int, seed: int) -> None:
    ids = [identity(seed + n) for n in range(2 * size)]
    window = DedupWindow(size)
    assert all(window.add(one) for one in ids)
    assert [window.add(one) for one in ids[-size:]] == [False] * size
    assert len(window) == size
    assert window.add(ids[0])
    assert window.add(ids[size])  # the oldest had to go for it
    assert not window.add(ids[size + 2])


def test_the_usual_window_takes_a_tenth_of_what_a_set_takes() -> None:
    tracemalloc.start()
    window = DedupWindow(100_000, (identity(n) for n in range(150_000)))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(window) == 100_000
    assert taken < 3_500_000


def test_a_window_that_is_filled_from_the_spool_knows_the_newest() -> None:
    window = DedupWindow(3, [identity(n) for n in range(10)])
    assert [window.add(identity(n)) for n in (9, 8, 7, 6)] == [False, False, False, True]


def test_a_window_of_size_zero_knows_nothing() -> None:
    window = DedupWindow(0, [identity(1)])
    assert window.add(identity(1))
    assert window.add(identity(1))
    assert len(window) == 0


def delivered(first: int, count: int = 1, size: int = 10) -> Delivered:
    items = [
        Message(b"t", b"%d" % (first + i), 1, retained=False, mid=1, size=1) for i in range(count)
    ]
    return Delivered(1, 0, items, size)


def firsts(items: list[Delivered]) -> list[int]:
    return [int(item.messages[0].payload) for item in items]


def is_full(inbox: Inbox) -> bool:
    return inbox.full


def is_finished(inbox: Inbox) -> bool:
    return inbox.finished


class Room:
    """Counts how often the inbox said that there is room."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def test_what_is_taken_comes_in_order_and_up_to_the_limit() -> None:
    inbox = Inbox(Room())
    for n in range(5):
        inbox.put(delivered(n * 10, 10))
    assert firsts(inbox.take(25, 0)) == [0, 10]
    assert firsts(inbox.take(10, 0)) == [20]
    assert firsts(inbox.take(5, 0)) == [30]  # one item comes however large it is
    assert firsts(inbox.take(100, 0)) == [40]
    assert inbox.take(100, 0) == []


def test_a_full_inbox_says_so_and_calls_once_when_half_of_it_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collector.inbox, "INBOX_MAX_MESSAGES", 10)
    room = Room()
    inbox = Inbox(room)
    for n in range(10):
        assert not is_full(inbox)
        inbox.put(delivered(n))
    assert is_full(inbox)
    for _ in range(4):
        inbox.take(1, 0)
        assert room.calls == 0
    inbox.take(1, 0)
    assert room.calls == 1
    inbox.take(100, 0)
    assert room.calls == 1
    assert not is_full(inbox)


def test_the_inbox_is_bounded_in_bytes_and_empties_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector.inbox, "INBOX_MAX_BYTES", 100)
    room = Room()
    inbox = Inbox(room)
    inbox.put(delivered(1, size=99))
    assert not is_full(inbox)
    inbox.put(delivered(2, size=1))
    assert is_full(inbox)
    inbox.take(100, 0)
    assert room.calls == 1
    assert not is_full(inbox)


def test_nobody_is_woken_who_did_not_find_it_full() -> None:
    room = Room()
    inbox = Inbox(room)
    inbox.put(delivered(1))
    inbox.take(10, 0)
    assert room.calls == 0


def test_taking_waits_for_something_and_wakes_at_once() -> None:
    inbox = Inbox(Room())
    began = time.monotonic()
    threading.Timer(0.1, inbox.put, [delivered(1)]).start()
    assert firsts(inbox.take(10, 30)) == [1]
    assert time.monotonic() - began < 10
    assert inbox.take(10, 0.01) == []


def test_a_closed_inbox_is_emptied_and_then_finished() -> None:
    inbox = Inbox(Room())
    inbox.put(delivered(1))
    assert not is_finished(inbox)
    inbox.close()
    assert not is_finished(inbox)
    assert firsts(inbox.take(10, 30)) == [1]
    assert is_finished(inbox)
    assert inbox.take(10, 30) == []


def test_closing_wakes_who_waits() -> None:
    inbox = Inbox(Room())
    began = time.monotonic()
    threading.Timer(0.1, inbox.close).start()
    assert inbox.take(10, 30) == []
    assert time.monotonic() - began < 10


def test_nothing_is_lost_or_reordered_between_two_threads() -> None:
    room = threading.Event()
    inbox = Inbox(room.set)
    total = 50_000

    def produce() -> None:
        for n in range(0, total, 50):
            while is_full(inbox):
                room.wait(10)
                room.clear()
            inbox.put(delivered(n, 50))
        inbox.close()

    thread = threading.Thread(target=produce)
    thread.start()
    got: list[int] = []
    while not is_finished(inbox):
        for item in inbox.take(700, 1.0):
            got += [int(m.payload) for m in item.messages]
    thread.join()
    assert got == list(range(total))
