"""One site that is refused: the others are delivered, and the books, the file and people know."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
import pytest

import forwarder.bypass
import forwarder.pubsub
from forwarder.backoff import BACKOFF_MAX_S
from forwarder.drain import Drain
from forwarder.sink import Delivery, Fault, FaultKind
from lifecycle import StopRequest, Watchdog
from spool import (
    AheadStep,
    CursorAheadError,
    DeadLetter,
    DiskFullError,
    Reading,
    Settlement,
    SinkState,
    spool_path,
)
from tests.fakes import FakePubSub
from tests.harness import wait_until
from tests.test_bypass_model import KeyedSink
from tests.test_drain import HOLD, SITES, Bench, FakeStop
from tests.test_sink_pubsub import TOPIC, made
from tests.test_spool_writer import edit, look

SOON_S = 20.0


class PlainSink(KeyedSink):
    """Refuses sites, and single readings, and is well otherwise."""

    def __init__(self, *refused: str) -> None:
        super().__init__()
        self.feel(0)
        self._poisoned = [False] * 100_000
        self.refused = set(refused)
        self.calls: list[list[int]] = []
        self.guilty: set[int] = set()

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        self.calls.append([row[0] for row in rows])
        guilty = [row for row in rows if row[0] in self.guilty]
        delivery = super().deliver([row for row in rows if row not in guilty])
        delivery.dead += [DeadLetter(row, "invalid", "no") for row in guilty]
        return delivery

    @property
    def acked(self) -> list[int]:
        return sorted(row[0] for row in self.acknowledged)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def of_site(bench: Bench, site: str) -> list[int]:
    query = "SELECT seq FROM reading_row WHERE site_code = ? ORDER BY seq"
    return [int(str(seq)) for (seq,) in look(spool_path(bench.directory), query, site)]


def others_than(bench: Bench, site: str) -> list[int]:
    return sorted(seq for other in SITES if other != site for seq in of_site(bench, other))


def held(bench: Bench) -> list[tuple[object, ...]]:
    return look(bench.state.path, "SELECT site_code, first_seq, through_seq FROM held_sites")


def after(sink: PlainSink, count: int) -> Callable[[], bool]:
    """Return whether the sink has acknowledged so many readings."""
    return lambda: len(sink.acknowledged) >= count


def test_the_others_are_delivered_while_one_site_is_refused(bench: Bench) -> None:
    bench.append(90)
    sink = PlainSink("S2")
    during: list[tuple[object, ...]] = []
    sums: set[int] = set()

    def until() -> bool:
        during.append(bench.status())
        sums.add(sum(bench.counters()) - bench.state.position(bench.writer.epoch))
        return len(sink.acknowledged) >= 60 and bench.stop.now_s > 150

    bench.drain(sink, until)
    assert sink.acked == others_than(bench, "S2")
    assert bench.state.position(bench.writer.epoch) == 1, "the cursor stays before its first"
    assert held(bench) == [("S2", 2, 90)]
    assert sums == {0}, "delivered + dead letters + dropped is what the cursor has passed"
    assert ("retrying", "held: site S2: the network is down") in during
    tries = [call for call in sink.calls if 2 in call]
    assert 150 / BACKOFF_MAX_S <= len(tries) <= 15, "it has a backoff of its own"


def test_once_it_is_taken_again_everything_is_there_once_and_in_order(bench: Bench) -> None:
    bench.append(90)
    sink = PlainSink("S2", "S3")
    bench.drain(sink, lambda: bench.stop.now_s > 60)
    assert sink.acked == of_site(bench, "S1")
    sink.refused = set()
    bench.append(30)
    bench.drain(sink)
    assert sink.acked == list(range(1, 121)), "a restart repeats nothing that was delivered ahead"
    for site in SITES:
        assert [r[0] for r in sink.acknowledged if r[4] == site] == of_site(bench, site)
    assert bench.counters() == (120, 0, 0)
    assert held(bench) == []
    assert look(bench.state.path, "SELECT * FROM ahead") == []
    assert bench.status() == ("stopped", "done")


def test_a_hold_of_one_site_is_told_with_its_remedy_and_looked_at_each_minute(
    bench: Bench,
) -> None:
    bench.append(30)
    sink = PlainSink("S1")
    sink.trouble = HOLD
    seen = set()

    def until() -> bool:
        seen.add(bench.status())
        return bench.stop.now_s > 150

    bench.drain(sink, until)
    assert ("on hold", "held: site S1: no permission; allow it") in seen
    assert len([call for call in sink.calls if 1 in call]) in range(3, 5)
    assert sink.acked == others_than(bench, "S1")


def test_readings_that_come_one_by_one_do_not_wait_for_the_site_that_came_first(
    bench: Bench,
) -> None:
    bench.append(1)  # of S1, alone in its batch
    sink = PlainSink("S1")
    bench.drain(sink, lambda: bench.stop.now_s > 5)
    for _ in range(4):
        bench.append(3)
        bench.drain(sink, after(sink, len(others_than(bench, "S1"))))
        assert bench.stop.now_s < 1, "at once"
    assert sink.acked == others_than(bench, "S1")


def test_so_far_ahead_and_no_further(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forwarder.bypass, "AHEAD_MAX_ROWS", 20)
    bench.append(90)
    sink = PlainSink("S2")
    seen = set()

    def until() -> bool:
        seen.add(bench.status())
        return bench.stop.now_s > 200

    bench.drain(sink, until)
    assert held(bench) == [("S2", 2, 21)], "20 readings behind the cursor"
    assert sink.acked == [seq for seq in others_than(bench, "S2") if seq <= 21]
    text = "held: site S2: all sites wait, others are 20 readings ahead of it; the network is down"
    assert ("retrying", text) in seen
    lines = [record for record in caplog.records if "the limit of readings" in record.message]
    assert [line.levelno for line in lines] == [logging.ERROR]
    assert lines[0].__dict__["fields"]["site"] == "S2"
    sink.refused = set()
    bench.drain(sink)
    assert sink.acked == list(range(1, 91))


def test_after_an_outage_of_all_sites_nothing_is_repeated_and_nothing_left_held(
    bench: Bench,
) -> None:
    bench.append(700)
    sink = PlainSink(*SITES)
    bench.drain(sink, lambda: bench.stop.now_s > 900)
    through = int(str(held(bench)[0][2]))
    assert through < 400, "in an outage little is read ahead"
    sink.refused = set()
    bench.drain(sink)
    assert sink.acked == list(range(1, 701))
    assert bench.counters() == (700, 0, 0)


def test_what_was_only_looked_at_in_an_outage_is_read_again_and_delivered_once(
    bench: Bench,
) -> None:
    bench.append(700)
    sink = PlainSink(*SITES)

    def until() -> bool:
        if bench.stop.now_s > 500:
            sink.refused = set()
        return bench.drained()

    bench.drain(sink, until)
    assert sink.acked == list(range(1, 701))
    for site in SITES:
        assert [r[0] for r in sink.acknowledged if r[4] == site] == of_site(bench, site)


def test_dropped_readings_are_those_of_the_held_site_and_no_others(bench: Bench) -> None:
    bench.append(60)
    sink = PlainSink("S2")
    bench.drain(sink, lambda: len(sink.acknowledged) >= 40)
    bench.append(60)

    def until() -> bool:
        if bench.writer.last_seq() == 120 and not gone:
            gone.append(bench.writer.delete_through(30, "dropped"))
            sink.refused = set()
        return bench.drained()

    gone: list[object] = []
    bench.drain(sink, until)
    lost = [seq for seq in range(2, 31) if SITES[(seq - 1) % 3] == "S2"]
    assert bench.counters() == (120 - len(lost), 0, len(lost))
    noted = look(bench.state.path, "SELECT first_seq, last_seq FROM gap ORDER BY first_seq")
    assert noted == [(seq, seq) for seq in lost]
    assert sink.acked == [seq for seq in range(1, 121) if seq not in lost]


def test_readings_dropped_beyond_what_was_delivered_ahead_are_a_gap_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.bypass, "AHEAD_MAX_ROWS", 20)
    bench.append(60)
    sink = PlainSink("S2")
    gone: list[object] = []

    def until() -> bool:
        if bench.stop.now_s > 60 and not gone:
            gone.append(bench.writer.delete_through(45, "dropped"))
            sink.refused = set()
        return bench.drained()

    bench.drain(sink, until)
    lost = [seq for seq in range(2, 46) if seq > 21 or SITES[(seq - 1) % 3] == "S2"]
    assert sink.acked == [seq for seq in range(1, 61) if seq not in lost]
    assert bench.counters() == (60 - len(lost), 0, len(lost))


def test_readings_that_left_while_this_forwarder_was_down_are_counted_as_dropped(
    bench: Bench,
) -> None:
    bench.append(60)
    sink = PlainSink("S2")
    sink.guilty = {4}
    bench.drain(sink, lambda: len(sink.acknowledged) >= 39)
    bench.writer.delete_through(30, "dropped")
    sink.refused = set()
    bench.drain(sink)
    # Which of them had been delivered is not known any more; the dead letter is.
    assert bench.counters() == (1 + 30, 1, 28)
    assert sink.acked == [seq for seq in range(1, 61) if seq in sink.acked]


def test_a_dead_letter_ahead_is_kept_at_once_and_counted_when_the_cursor_passes_it(
    bench: Bench,
) -> None:
    bench.append(60)
    sink = PlainSink("S2")
    sink.guilty = {4, 13, 52}
    bench.drain(sink, lambda: len(sink.acknowledged) >= 37)
    kept = [seq for (seq,) in look(bench.state.path, "SELECT seq FROM dead_letter ORDER BY seq")]
    assert kept == [4, 13, 52]
    assert bench.counters() == (1, 0, 0)
    sink.refused = set()
    bench.drain(sink)
    assert bench.counters() == (57, 3, 0)


def test_a_row_of_the_held_site_that_was_damaged_since_is_a_dead_letter(bench: Bench) -> None:
    bench.append(30)
    sink = PlainSink("S2")
    bench.drain(sink, lambda: len(sink.acknowledged) >= 20)
    edit(spool_path(bench.directory), "UPDATE reading_row SET site_code = 'S9' WHERE seq = 5")
    sink.refused = set()
    bench.drain(sink)
    # After a restart it is not known as the held site's any more: it was passed, and the
    # checksum is looked at where it is read for delivery.
    assert sum(bench.counters()) == 30


def test_a_spool_older_than_what_was_delivered_ahead_is_an_alarm(bench: Bench) -> None:
    bench.append(60)
    sink = PlainSink("S2")
    bench.drain(sink, lambda: len(sink.acknowledged) >= 40)
    edit(spool_path(bench.directory), "DELETE FROM reading_row WHERE seq > 50")
    edit(spool_path(bench.directory), "UPDATE counter SET value = 50 WHERE name = 'last_seq'")
    with pytest.raises(CursorAheadError, match="stands at seq 60"):
        bench.drain(sink)


def test_a_full_disk_loses_no_dead_letter_although_the_cursor_does_not_move(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.append(30)
    sink = PlainSink("S1")
    sink.guilty = {5}
    settle = SinkState.settle
    full = [True, True]

    def settle_later(state: SinkState, s: Settlement, ahead: AheadStep | None = None) -> None:
        if ahead is not None and ahead.dead and full:
            full.pop()
            raise DiskFullError("no room", state.path)
        settle(state, s, ahead)

    monkeypatch.setattr(SinkState, "settle", settle_later)
    bench.drain(sink, lambda: len(sink.acknowledged) >= 19)
    assert not full
    assert look(bench.state.path, "SELECT seq FROM dead_letter") == [(5,)]


def test_what_was_held_in_another_spool_counts_no_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 30)
    sink = PlainSink("S2")
    sink.guilty = {6}
    bench.drain(sink, lambda: len(sink.acknowledged) >= 19)
    bench.writer.close()
    for file in tmp_path.glob("spool.db*"):
        file.unlink()
    bench.state.close()
    bench = Bench(tmp_path, 30)
    sink = PlainSink("S1")
    bench.drain(sink, lambda: len(sink.acknowledged) >= 20)
    assert held(bench) == [("S1", 1, 30)]
    assert look(bench.state.path, "SELECT * FROM dead_ahead") == []
    sink.refused = set()
    bench.drain(sink)
    assert sink.acked == list(range(1, 31))
    bench.close()


def test_a_full_budget_of_dead_letters_holds_the_others_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 90)
    bench.state.close()
    bench.state = SinkState.open(tmp_path, "pubsub", dead_letter_max_bytes=500)
    sink = PlainSink("S2")
    sink.guilty = {4, 13}
    seen = set()

    def until() -> bool:
        seen.add(str(bench.status()[1])[:35])
        return bench.stop.now_s > 150

    bench.drain(sink, until)
    assert "the budget of dead letters is used " in seen
    assert max(sink.acked) < 60
    bench.state.close()
    bench.state = SinkState.open(tmp_path, "pubsub")
    sink.refused = set()
    assert bench.state.dead_letters.discard(10) == 2
    bench.drain(sink)
    assert sink.acked == [seq for seq in range(1, 91) if seq not in sink.guilty]
    names = ("delivered", "dead_lettered", "dead_letters_discarded")
    assert [bench.state.counters()[name] for name in names] == [88, 2, 2]
    bench.close()


def test_a_hole_that_a_held_batch_has_grown_over_is_counted_when_the_cursor_passes_it(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, 10)
    probing = Fault(FaultKind.HOLD, "every row is refused", probe=True)
    passing = Fault(FaultKind.TRANSIENT, "S2: unavailable")

    class Growing(PlainSink):
        """Refuses all of one delivery, while readings are dropped; then one site, for a while."""

        max_rows = 10

        def deliver(self, rows: Sequence[Reading]) -> Delivery:
            self.calls.append([row[0] for row in rows])
            if len(self.calls) == 1:
                bench.append(20)
                edit(spool_path(bench.directory), "DELETE FROM reading_row WHERE seq <= 20")
                return Delivery(retry=list(rows), fault=probing)
            bad = [row for row in rows if row[4] == "S2"] if len(self.calls) < 6 else []
            self.acknowledged += [row for row in rows if row not in bad]
            if not bad:
                return Delivery()
            return Delivery(retry=bad, fault=passing, faults={"S2": passing})

    sink = Growing()
    bench.drain(sink, lambda: bench.state.position(bench.writer.epoch) == 30)
    counters = bench.state.counters()
    assert counters["delivered"] == len(set(sink.acked))
    assert counters["delivered"] + counters["dropped"] == 30
    gaps = look(bench.state.path, "SELECT first_seq, last_seq FROM gap ORDER BY first_seq")
    assert gaps[-1] == (11, 20)
    bench.close()


def test_the_dead_letters_warning_comes_while_a_site_is_held_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, 90)
    bench.state.close()
    bench.state = SinkState.open(tmp_path, "pubsub", dead_letter_max_bytes=3500)
    sink = PlainSink("S2")
    sink.guilty = {4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21}
    seen = set()

    def until() -> bool:
        seen.add(str(bench.status()[1]))
        return bench.stop.now_s > 100

    bench.drain(sink, until)
    usage = bench.state.dead_letters.usage()
    assert usage.nearly_full
    assert not usage.full
    assert [r for r in caplog.records if "budget" in r.getMessage()]
    assert any("held: site S2" in detail and "more than 80 %" in detail for detail in seen), seen
    bench.close()


@pytest.mark.parametrize("refused", [(), ("S2",)])
def test_while_the_log_is_pinned_batches_are_few_also_with_a_held_site(
    tmp_path: Path, refused: tuple[str, ...]
) -> None:
    class Pinned:
        """In the place of the watch on the log of the sink's file."""

        detail = ""

        def look(self) -> bool:
            return False

        def pause_s(self, took_s: float, *, more: bool) -> float:
            return 0.0 if more else max(0.0, 0.5 - took_s)

        def close(self) -> None:
            """Hold nothing."""

    bench = Bench(tmp_path, 30)
    settled = []
    settle = bench.state.settle

    def counting(settlement: Settlement, ahead: AheadStep | None = None) -> None:
        settled.append(settlement.seq)
        settle(settlement, ahead)

    bench.state.settle = counting  # type: ignore[method-assign] # only counted

    def until() -> bool:
        bench.append(3)
        return bench.stop.now_s > 5

    bench.stop = FakeStop(until)
    sink = PlainSink(*refused)
    Drain(
        directory=bench.directory,
        sink=sink,
        state=bench.state,
        app_env="LOCAL",
        max_rate=0,
        stop=bench.stop,
        watchdog=Watchdog(["a loop that never turns"], 1.0),
        log_hold=Pinned(),  # type: ignore[arg-type] # what the drain loop uses of it
        jitter=lambda: 1.0,
        clock=lambda: bench.stop.now_s,
    ).run()
    assert len(settled) < 40
    bench.close()


@pytest.fixture
def fake() -> Iterator[FakePubSub]:
    with FakePubSub(topics=[TOPIC]) as server:
        yield server
        server.faults.clear()
        assert server.violations == []


class Running:
    """A drain into the fake, in a thread."""

    def __init__(self, bench: Bench, fake: FakePubSub) -> None:
        self.bench = bench
        self.stop = StopRequest()
        self.sink = made(fake, notes=None)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        state = SinkState.open(self.bench.directory, "pubsub")
        Drain(
            directory=self.bench.directory,
            sink=self.sink,
            state=state,
            app_env="LOCAL",
            max_rate=0,
            stop=self.stop,
            watchdog=Watchdog(["a loop that never turns"], 1.0),
        ).run()
        state.close()

    def end(self) -> None:
        self.stop.request("the test is over")
        self._thread.join()
        self.stop.close()
        self.sink.close()


def arrived(fake: FakePubSub) -> dict[str, list[int]]:
    """Return the seq of what came first, by site."""
    return {
        key: list(dict.fromkeys(int(m.attributes["seq"]) for m in messages))
        for key, messages in fake.by_key(TOPIC).items()
    }


@pytest.mark.parametrize("hangs", ["refused", "hanging"])
def test_pubsub_goes_on_with_all_other_keys(
    tmp_path: Path, fake: FakePubSub, hangs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.pubsub, "DEADLINE_S", 1.0)
    if hangs == "hanging":
        fake.faults.hang_key("S2")
    else:
        fake.faults.refuse_key("S2", grpc.StatusCode.UNAVAILABLE, "not this key")
    bench = Bench(tmp_path, 300)
    running = Running(bench, fake)
    try:
        for count in (300, 330, 360):
            wait_until(lambda n=count: fake.count >= n * 2 // 3, SOON_S, f"{count}: the others")  # type: ignore[misc]
            bench.append(30)
        assert "S2" not in arrived(fake)
        fake.faults.clear()
        wait_until(bench.drained, SOON_S, "all is delivered")
    finally:
        running.end()
    assert arrived(fake) == {site: of_site(bench, site) for site in SITES}
    assert bench.counters() == (390, 0, 0)
    repeated = fake.count - 390
    assert repeated == 0
    bench.close()


def test_a_site_whose_readings_are_all_refused_is_told_from_the_service_while_another_is_held(
    tmp_path: Path, fake: FakePubSub
) -> None:
    bench = Bench(tmp_path, 600)
    fake.faults.refuse_key("S2", grpc.StatusCode.UNAVAILABLE, "not this key")
    fake.faults.poison = lambda data: b'"site_code":"S1"' in data
    running = Running(bench, fake)
    guilty = 200
    try:

        def all_told() -> bool:
            bench.append(3)
            return len(look(bench.state.path, "SELECT seq FROM dead_letter")) >= guilty

        wait_until(all_told, SOON_S, "the first 200 of S1 are dead letters")
        assert set(arrived(fake)) == {"S3"}
        fake.faults.keys.clear()
        wait_until(lambda: "S2" in arrived(fake), SOON_S, "S2 goes on")
        fake.faults.poison = None
        wait_until(bench.drained, SOON_S, "all is settled")
    finally:
        running.end()
    dead = bench.counters()[1]
    assert dead >= guilty
    assert sum(bench.counters()) == bench.writer.last_seq()
    assert fake.count == bench.writer.last_seq() - dead
    bench.close()


def test_others_wait_for_a_key_that_hangs_for_one_deadline_and_not_longer(
    tmp_path: Path, fake: FakePubSub, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline_s = 1.0
    monkeypatch.setattr(forwarder.pubsub, "DEADLINE_S", deadline_s)
    fake.faults.hang_key("S2")
    bench = Bench(tmp_path, 3)
    running = Running(bench, fake)
    waits = []
    try:
        wait_until(lambda: fake.count == 2, SOON_S, "the others are delivered")
        for number in range(8):
            bench.append(3)
            begun = time.monotonic()
            wait_until(lambda n=number: fake.count >= 4 + 2 * n, SOON_S, "the others again")  # type: ignore[misc]
            waits.append(time.monotonic() - begun)
    finally:
        fake.faults.clear()
        running.end()
    assert max(waits) < deadline_s + 1.0
    bench.close()
