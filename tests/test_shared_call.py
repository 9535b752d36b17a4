"""A call that cannot be interrupted: who waits for it, for how long, and what he gets."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import forwarder.sharedcall
from forwarder.sharedcall import SharedCall


class Far:
    """Something to call that answers when it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = threading.Event()
        self.may_answer = threading.Event()

    def __call__(self) -> int:
        self.calls += 1
        number = self.calls
        self.begun.set()
        assert self.may_answer.wait(10.0)
        return number


def failing(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_each_call_is_made_anew_once_the_last_one_is_over() -> None:
    far, shared = Far(), SharedCall[int]("it")
    far.may_answer.set()
    assert [shared.result(far, 10.0) for _ in range(3)] == [1, 2, 3]


def test_who_asks_meanwhile_begins_no_other_call() -> None:
    far, shared = Far(), SharedCall[int]("it")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shared.result, far, 10.0)
        assert far.begun.wait(10.0)
        with pytest.raises(TimeoutError):
            shared.result(far, 0.01)
        far.may_answer.set()
        assert (first.result(), far.calls) == (1, 1)


def test_who_gives_up_leaves_the_call_to_the_next_and_starts_no_thread() -> None:
    far, shared = Far(), SharedCall[int]("the answer")
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(TimeoutError, match="the answer: no answer within 0 s"):
            shared.result(far, 0.01)
    assert (far.calls, threading.active_count()) == (1, before + 1)
    far.may_answer.set()
    assert shared.result(far, 10.0) in {1, 2}


def end_of_calls() -> None:
    """Wait until no call is running."""
    deadline = time.monotonic() + 10.0
    while any(thread.name == "it" for thread in threading.enumerate()):
        assert time.monotonic() < deadline


def late(shared: SharedCall[int], far: Far) -> None:
    """Have a call end after everybody has given up."""
    with pytest.raises(TimeoutError):
        shared.result(far, 0.01)
    far.may_answer.set()
    end_of_calls()


def test_a_success_that_nobody_waited_for_is_the_next_ones_and_his_alone() -> None:
    far, shared = Far(), SharedCall[int]("it")
    late(shared, far)
    assert [shared.result(far, 10.0) for _ in range(3)] == [1, 2, 3]


def test_a_success_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder.sharedcall, "KEPT_S", 0.0)
    far, shared = Far(), SharedCall[int]("it")
    late(shared, far)
    assert shared.result(far, 10.0) == 2


def test_who_wants_a_fresh_answer_gets_none_of_before() -> None:
    far, shared = Far(), SharedCall[int]("it")
    late(shared, far)
    assert shared.result(far, 10.0, fresh=True) == 2
    far.may_answer.clear()
    far.begun.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(shared.result, far, 10.0)
        assert far.begun.wait(10.0)
        with pytest.raises(TimeoutError):
            shared.result(far, 0.01, fresh=True)
        assert far.calls == 3, "one at a time"
        far.may_answer.set()
        assert running.result() == 3
    assert shared.result(far, 10.0, fresh=True) == 4


def test_what_was_kept_is_outdated_by_a_later_call() -> None:
    far, shared = Far(), SharedCall[int]("it")
    late(shared, far)
    slow = Far()
    with pytest.raises(TimeoutError):  # a later one, which nobody waits for, and which fails
        shared.result(lambda: slow() and 1 // 0, 0.01, fresh=True)
    slow.may_answer.set()
    end_of_calls()
    assert shared.result(far, 10.0) == 2


def test_a_thread_that_cannot_be_started_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far, shared = Far(), SharedCall[int]("it")
    far.may_answer.set()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            shared.result(far, 0.01)
    assert shared.result(far, 1.0) == 1


def test_a_failure_that_nobody_waited_for_is_not_kept() -> None:
    far, shared = Far(), SharedCall[int]("it")
    with pytest.raises(ValueError, match="no"):
        shared.result(failing(ValueError("no")), 10.0)
    far.may_answer.set()
    assert shared.result(far, 10.0) == 1


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("its own"), SystemExit(3)])
def test_what_the_call_raises_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        SharedCall[int]("it").result(failing(error), 10.0)
    assert caught.value is error
