"""A flood of bad messages is told of at once, and then once a minute with its count."""

import logging
from collections.abc import Iterator

import pytest

from lifecycle import RateLimitedLog
from lifecycle.rate_limited_log import INTERVAL_S, KEYS_MAX
from tests.collector_parts import Clock, Logbook, logbook

LOGGER = "lifecycle.test-rate-limited-log"


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook(LOGGER) as opened:
        yield opened


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def notices(book: Logbook, clock: Clock) -> RateLimitedLog:
    assert not book.records
    return RateLimitedLog(logging.getLogger(LOGGER), clock)


def test_the_first_of_a_kind_is_told_at_once_with_its_fields(
    book: Logbook, notices: RateLimitedLog
) -> None:
    notices.warn("k", "a message was rejected", topic="t", payload_bytes=3)
    assert book.lines() == ["a message was rejected"]
    assert book.levels("") == ["WARNING"]
    assert book.values("") == [{"topic": "t", "payload_bytes": 3}]


def test_the_same_within_the_interval_is_counted_and_not_told(
    book: Logbook, notices: RateLimitedLog, clock: Clock
) -> None:
    notices.warn("k", "first")
    for _ in range(10_000):
        notices.warn("k", "again")
    clock.now_s += INTERVAL_S - 0.001
    notices.warn("k", "again")
    notices.flush()
    assert book.lines() == ["first"]


def test_the_next_one_after_the_interval_says_how_many_there_were(
    book: Logbook, notices: RateLimitedLog, clock: Clock
) -> None:
    for _ in range(8):
        notices.warn("k", "it", n=1)
    clock.now_s += INTERVAL_S
    notices.warn("k", "it", n=2)
    assert book.values("it") == [{"n": 1}, {"n": 2, "more_since_last_line": 7}]
    # That line began a new interval, and what it told is not told again.
    notices.warn("k", "it", n=3)
    clock.now_s += INTERVAL_S
    notices.warn("k", "it", n=4)
    assert book.values("it")[2:] == [{"n": 4, "more_since_last_line": 1}]


def test_what_was_held_back_is_told_although_nothing_more_comes(
    book: Logbook, notices: RateLimitedLog, clock: Clock
) -> None:
    for _ in range(3):
        notices.warn("rejected not_json", "it")
    clock.now_s += INTERVAL_S
    notices.flush()
    assert book.lines() == ["it", "the same again: rejected not_json"]
    assert book.values("the same again") == [{"more_since_last_line": 2}]
    clock.now_s += INTERVAL_S
    notices.flush()
    assert len(book.records) == 2, "it was told; there is nothing more"


def test_the_line_of_a_flush_begins_an_interval_too(
    book: Logbook, notices: RateLimitedLog, clock: Clock
) -> None:
    notices.warn("k", "it")
    notices.warn("k", "it")
    clock.now_s += INTERVAL_S
    notices.flush()
    notices.warn("k", "it")
    assert len(book.records) == 2
    clock.now_s += INTERVAL_S
    notices.flush()
    assert book.values("the same again") == [{"more_since_last_line": 1}] * 2


def test_one_kind_does_not_hold_back_another(
    book: Logbook, notices: RateLimitedLog, clock: Clock
) -> None:
    notices.warn("a", "of kind a")
    clock.now_s += INTERVAL_S / 2
    notices.warn("b", "of kind b")
    notices.warn("a", "of kind a")
    notices.warn("b", "of kind b")
    assert book.lines() == ["of kind a", "of kind b"]
    clock.now_s += INTERVAL_S / 2
    notices.flush()
    assert book.lines("the same again") == ["the same again: a"]


def test_an_endless_number_of_kinds_is_one_kind_in_the_end(
    book: Logbook, notices: RateLimitedLog, clock: Clock
) -> None:
    for number in range(KEYS_MAX):
        notices.warn(f"kind {number}", f"line {number}")
    assert len(book.records) == KEYS_MAX
    for number in range(1000):
        notices.warn(f"new kind {number}", "beyond")
    assert book.lines("beyond") == ["beyond"]
    clock.now_s += INTERVAL_S
    notices.flush()
    assert book.lines("the same again") == ["the same again: other"]
    assert book.values("the same again") == [{"more_since_last_line": 999}]
    # A kind that was known before is still told apart.
    notices.warn("kind 0", "line 0")
    assert len(book.lines("line 0")) == 2
