"""What others can cause without end makes few lines, of bounded size, with the right numbers."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collector.inbox import Delivered
from collector.packets import Message
from forwarder.dead_letters import DeadLetterWatch
from forwarder.gaplog import log_gaps
from lifecycle import RateLimitedLog, configure_logging, unlimited
from lifecycle.flood import BURST_LINES, REFILL_S, SUMMARY_INTERVAL_S, BoundedHandler
from lifecycle.logs import TEXT_MAX_CHARS
from lifecycle.rate_limited_log import INTERVAL_S, KEYS_MAX
from spool import DeadLetter, Gap, Level, SinkState
from tests.collector_parts import MIB, Clock, message
from tests.store_desk import desks

FLOOD = 5_000
MANY_BYTES = 64 * 1024
"""Of log for a flood; the rotated logs hold hundreds of times as much."""

LOGGER = "lifecycle.test-log-floods"
log = logging.getLogger(LOGGER)


class Lines(io.StringIO):
    """Where the log goes, and what it says."""

    def objects(self, text: str = "") -> list[dict[str, object]]:
        found = [json.loads(line) for line in self.getvalue().splitlines()]
        return [one for one in found if text in one["message"]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log of this process, as a program has it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = Lines()
    configure_logging("r", stream=stream)
    yield stream
    root.handlers[:], root.level = handlers, level


class Kept(BoundedHandler):
    """Keeps what would be written."""

    def __init__(self, records: list[logging.LogRecord], clock: Clock) -> None:
        super().__init__(io.StringIO(), clock)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


class Desklog:
    """A handler with a clock of its own."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.records: list[logging.LogRecord] = []
        self.handler = Kept(self.records, self.clock)

    def say(self, text: str, **extra: object) -> None:
        record = log.makeRecord(
            LOGGER, logging.INFO, __file__, 1, text, (), None, extra=extra or None
        )
        self.handler.handle(record)

    def say_elsewhere(self, text: str) -> None:
        self.handler.handle(log.makeRecord(LOGGER, logging.INFO, __file__, 2, text, (), None))

    def left_out(self) -> int:
        return sum(r.__dict__.get("fields", {}).get("lines_left_out", 0) for r in self.records)


def test_a_place_says_so_much_at_once_and_then_little_and_counts_the_rest() -> None:
    log_ = Desklog()
    for number in range(FLOOD):
        log_.say(f"invented {number}")
    assert len(log_.records) == BURST_LINES
    log_.clock.now_s += REFILL_S
    log_.say("next")
    assert log_.records[-1].fields == {"lines_left_out": FLOOD - BURST_LINES}  # type: ignore[attr-defined]
    for _ in range(FLOOD):
        log_.say("more")
    assert len(log_.records) == BURST_LINES + 1
    log_.handler.close()
    assert log_.records[-1].getMessage() == "more", "the last one is shown"
    assert len(log_.records) == BURST_LINES + 2
    assert log_.left_out() + BURST_LINES + 1 == 2 * FLOOD + 1, "each is written or counted"


def test_one_place_does_not_silence_another_which_tells_of_it() -> None:
    log_ = Desklog()
    for _ in range(FLOOD):
        log_.say("flood")
    log_.say_elsewhere("other")
    assert log_.records[-1].getMessage() == "other"
    log_.clock.now_s += SUMMARY_INTERVAL_S
    log_.say_elsewhere("other")
    assert [r.getMessage() for r in log_.records[-2:]] == ["flood", "other"]
    assert log_.left_out() == FLOOD - BURST_LINES


def test_what_is_bounded_elsewhere_is_not_limited_here() -> None:
    log_ = Desklog()
    for _ in range(FLOOD):
        log_.say("event", **unlimited(seq=1))
    assert len(log_.records) == FLOOD


def test_a_day_of_flood_is_small() -> None:
    log_ = Desklog()
    for _ in range(86_400):
        log_.say("flood")
        log_.clock.now_s += 1.0
    assert len(log_.records) <= BURST_LINES + 1 + 86_400 / REFILL_S
    written = len(log_.records)
    log_.handler.close()
    assert log_.left_out() + written == 86_400


def test_a_text_of_megabytes_is_cut(lines: Lines) -> None:
    log.warning("x" * 10**6, extra={"fields": {"topic": "t" * 10**6}})
    (line,) = lines.objects()
    for name in ("message", "topic"):
        assert len(str(line[name])) < TEXT_MAX_CHARS + 40
        assert str(line[name]).endswith("... (1000000 characters)")


def with_site(number: int) -> Message:
    return message(number, site=f"INVENTED{number}")


def with_reason(number: int) -> Message:
    payloads = (b"", b"[]", b"nope %d" % number, b"\xff%d" % number, b'{"a": %d}' % number)
    payload = payloads[number % len(payloads)]
    topic = b"FCTS/FAE/S%d/SolvExtract/T" % number if number % 2 else b"invented/%d" % number
    return Message(
        topic * (1 + number % 3 * 50), payload, 0, retained=False, mid=0, size=len(payload)
    )


@pytest.mark.parametrize("make", [with_site, with_reason])
def test_a_publisher_that_invents_sites_and_garbage_makes_few_lines_with_the_right_count(
    tmp_path: Path, lines: Lines, make: Callable[[int], Message]
) -> None:
    with desks(tmp_path) as desks_:
        desk = desks_(dedup_window=0)
        for first in range(0, FLOOD, 500):
            messages = [make(number) for number in range(first, first + 500)]
            desk.inbox.put(Delivered(1, 10**15, messages, 500 * 300))
        desk.run()
        counters = desk.counters()
    told = lines.objects()
    assert len(lines.getvalue()) < MANY_BYTES
    assert counters["received"] == FLOOD
    for name, text, again in (
        ("site_mismatch", "site_code differs", "the same again: site mismatch"),
        ("rejected", "message rejected", "the same again: rejected"),
        ("qos0", "messages come with QoS 0", "the same again: qos 0"),
    ):
        said = len(lines.objects(text)) + sum(
            int(str(one["more_since_last_line"])) for one in told if again in str(one["message"])
        )
        assert said == counters.get(name, 0)


def letter(number: int, reason: str) -> DeadLetter:
    topic = f"FCTS/FAE/S{number}/SolvExtract/T"
    row = (number, b"i" * 16, 0, 0, f"S{number}", "s", "T", 1.0, topic, b"{}", 0)
    return DeadLetter(row, reason, f"refused for the reason {reason}")


def test_a_service_that_invents_reasons_makes_few_lines_with_the_right_count(
    tmp_path: Path, lines: Lines
) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    clock = Clock()
    watch = DeadLetterWatch("pubsub", state, clock)
    for number in range(FLOOD):
        watch.report([letter(number, f"reason_{number}")])
        clock.now_s += INTERVAL_S / FLOOD
    watch.flush(at_end=True)
    state.close()
    told = lines.objects()
    assert len(told) <= 2 * (KEYS_MAX + 1)
    assert len(lines.getvalue()) < MANY_BYTES
    more = sum(int(str(one.get("more_since_last_line", 0))) for one in told)
    assert len(lines.objects("dead letter: ")) + more == FLOOD


def test_a_gap_at_each_batch_makes_a_line_a_minute_with_the_number_of_readings(
    lines: Lines,
) -> None:
    clock = Clock()
    notices = RateLimitedLog(log, clock)
    for number in range(FLOOD):
        log_gaps(notices, "pubsub", [Gap(10 * number + 1, 10 * number + 3, f"reason {number}")])
    clock.now_s += INTERVAL_S
    notices.flush()
    first, again = lines.objects()
    assert (first["rows"], again["more_since_last_line"]) == (3, 3 * (FLOOD - 1))
    assert first["severity"] == again["severity"] == "ERROR"


def test_a_librarys_lines_are_bounded_as_well(lines: Lines) -> None:
    for number in range(FLOOD):
        logging.getLogger("any.library").warning("Retrying: %s", "x" * number)
    assert len(lines.objects()) == BURST_LINES


def test_drop_oldest_makes_a_line_a_minute_with_the_number_of_readings(
    tmp_path: Path, lines: Lines
) -> None:
    with desks(tmp_path) as desks_:
        desk = desks_(max_bytes=2 * MIB, drop_oldest=True)
        desk.fill(until_level=Level.FULL, incoming_bytes=0)
        for number in range(60):
            one = message(number, pad_bytes=50_000)
            desk.inbox.put(Delivered(1, 10**15, [one], one.size))
        desk.run()
        counters = desk.counters()
    first, again = lines.objects("dropped undelivered")
    assert int(str(first["rows"])) + int(str(again["more_since_last_line"])) == counters["dropped"]
    assert counters["spooled"] == 60
