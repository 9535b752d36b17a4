"""What one publisher sends, and a service refuses, stops no other publisher's readings."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from forwarder import lookahead
from forwarder.backoff import HOLD_RETRY_S
from forwarder.drain import Drain
from forwarder.partitions import REASON
from lifecycle import Watchdog
from spool import (
    NewReading,
    Reading,
    SinkState,
    SpoolWriter,
    claim_environment,
    event_id,
    row_crc,
)
from tests.test_drain import FakeStop
from tests.test_sink_contract import SERVICES, BigQuery, PubSub, Storage
from tests.test_spool_writer import look

NOW_US = time.time_ns() // 1000
METHODS = ("storage", "storage_default", "insert_all")
HEALTHY_SITES = ("S1", "S2", "S3")
BAD, GOOD = "dead-clock", "PT-1"
ROUNDS = 40


def reading(
    number: int, *, sensor: str = GOOD, site: str = "S1", timestamp_us: int = NOW_US
) -> NewReading:
    """Return a whole row; ``number`` is its payload."""
    topic = f"FCTS/FAE/{site}/SolvExtract/TI-101.PV"
    payload = b'{"n":%d}' % number
    identity = event_id(topic.encode(), payload)
    crc = row_crc(identity, (NOW_US, timestamp_us, 1.5), f"{site}{sensor}TI-101.PV{topic}", payload)
    return (identity, NOW_US, timestamp_us, site, sensor, "TI-101.PV", 1.5, topic, payload, crc)


class World:
    """A spool, a forwarder's loop whose waits take no time, and a service."""

    def __init__(self, name: str, directory: Path) -> None:
        self.service = SERVICES[name]()
        self.sink = self.service.sink
        self.own_state = None
        if isinstance(self.service, PubSub):
            self.directory = directory
            self.state = self.own_state = SinkState.open(directory, self.sink.name)
        else:
            self.directory = Path(self.service.directory.name)
            self.state = self.service.state
        self.writer = SpoolWriter.open(self.directory)
        claim_environment(self.writer, "DEV", [])
        self.healthy: list[int] = []
        self.poisonous: list[int] = []
        self.held: list[list[int]] = []
        """The rows of each delivery."""
        deliver = self.sink.deliver

        def watched(rows: Sequence[Reading]) -> object:
            self.held.append([row[0] for row in rows])
            return deliver(rows)

        self.sink.deliver = watched  # type: ignore[method-assign, assignment]

    def refuse(self, sensor: str | None = BAD) -> None:
        """Let the service refuse this sensor's readings; None for all of them."""
        if isinstance(self.service, PubSub):
            self.service.fake.faults.poison = lambda data: (
                sensor is None or json.loads(data)["sensor_id"] == sensor
            )
        else:
            self.service.fake.faults.poison = lambda row: (
                sensor is None or row["sensor_id"] == sensor
            )

    def add(self, *rows: NewReading) -> None:
        """Spool rows."""
        self.writer.append(list(rows), [], {})
        for row in rows:
            seq = len(self.healthy) + len(self.poisonous) + 1
            (self.poisonous if row[4] == BAD else self.healthy).append(seq)

    def add_poison(self, count: int, site: str = "S9") -> None:
        """Spool readings that the service refuses."""
        begin = len(self.poisonous)
        self.add(*(reading(begin + n, sensor=BAD, site=site) for n in range(count)))

    def add_healthy(self, count: int, sites: Sequence[str] = HEALTHY_SITES) -> None:
        """Spool readings that it takes."""
        begin = len(self.healthy)
        numbers = range(begin, begin + count)
        self.add(*(reading(n, site=sites[n % len(sites)]) for n in numbers))

    def run(self, until: Callable[["World"], bool], max_waits: int = 300) -> FakeStop:
        """Drain until that holds; it is asked whenever the loop waits."""
        stop = FakeStop(lambda: until(self), max_waits)
        Drain(
            directory=self.directory,
            sink=self.sink,
            state=self.state,
            app_env="DEV",
            max_rate=0,
            stop=stop,
            watchdog=Watchdog(["a loop that never turns"], 1.0),
            jitter=lambda: 1.0,
            clock=lambda: stop.now_s,
        ).run()
        return stop

    @property
    def total(self) -> int:
        return len(self.healthy) + len(self.poisonous)

    @property
    def done(self) -> bool:
        """Whether everything is settled."""
        return self.state.position(self.writer.epoch) == self.total

    @property
    def on_hold(self) -> bool:
        rows = look(self.state.path, "SELECT state FROM status")
        return [str(state) for (state,) in rows] == ["on hold"]

    def dead(self) -> list[tuple[int, str]]:
        rows = look(self.state.path, "SELECT seq, reason FROM dead_letter ORDER BY seq")
        return [(int(str(seq)), str(reason)) for seq, reason in rows]

    def arrived(self) -> list[int]:
        return self.service.arrived()

    def check(self) -> None:
        """Each healthy reading is there, once and in order of its site; the others are dead."""
        assert [seq for seq, _ in self.dead()] == self.poisonous
        arrived = self.arrived()
        assert sorted(arrived) == self.healthy
        if self.service.ordered and isinstance(self.service, Storage):
            assert arrived == self.healthy

    def close(self) -> None:
        self.writer.close()
        self.service.close()
        if self.own_state is not None:
            self.own_state.close()


@pytest.fixture(params=SERVICES)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = World(request.param, tmp_path)
    yield made
    made.close()


@pytest.fixture(params=METHODS)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = World(request.param, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("count", [150, 1_000])
@pytest.mark.parametrize("healthy", [1, 30])
def test_poison_alone_in_a_batch_is_found_out_by_what_comes_later(
    world: World, count: int, healthy: int
) -> None:
    world.refuse()
    world.add_poison(count)

    def until(world: World) -> bool:
        if world.on_hold and not world.healthy:
            world.add_healthy(healthy)
        return bool(world.healthy) and world.done

    stop = world.run(until)
    world.check()
    assert stop.now_s < 3 * HOLD_RETRY_S, "no hold for good"


def test_poison_with_healthy_readings_waiting_in_the_next_batch_is_not_even_a_hold(
    table: World,
) -> None:
    table.refuse()
    table.sink.max_rows = 150
    table.add_poison(150)
    table.add_healthy(100)
    stop = table.run(lambda world: world.done)
    table.check()
    assert stop.now_s <= table.sink.gather_s  # and no hold, which is looked at again after 1 s


@pytest.mark.parametrize("count", [150, 600])
def test_poison_of_one_sensor_lets_the_other_sensors_of_its_site_pass(
    world: World, count: int
) -> None:
    world.refuse()
    world.add_poison(count, site="S1")
    world.add_healthy(50, sites=["S1"])
    stop = world.run(lambda world: world.done)
    world.check()
    assert world.arrived() == sorted(world.arrived())
    assert stop.now_s < 3 * HOLD_RETRY_S


@pytest.mark.parametrize("site", ["S9", "S1"])
def test_poison_at_a_hundred_a_second_among_healthy_readings_stops_none_of_them(
    world: World, site: str
) -> None:
    """25 bad ones and a good one in each batch, as 100/s and 4/s make them."""
    world.refuse()
    rounds = iter(range(ROUNDS))

    def until(world: World) -> bool:
        if next(rounds, None) is None:
            return world.done
        world.add_poison(25, site=site)
        world.add_healthy(1)
        return False

    stop = world.run(until)
    world.check()
    assert stop.now_s < 2 * HOLD_RETRY_S


def test_a_service_that_refuses_all_is_held_however_much_comes_and_gives_up_nothing(
    world: World,
) -> None:
    world.refuse(None)
    world.add_healthy(300)
    holds = iter(range(10))

    def until(world: World) -> bool:
        if next(holds, None) is not None:
            world.add_healthy(30)
            return False
        world.service.mend()
        return world.done

    world.run(until)
    assert world.dead() == []
    arrived = list(dict.fromkeys(world.arrived()))
    assert sorted(arrived) == world.healthy
    if world.service.ordered:
        for number in range(3):
            site = [seq for seq in arrived if (seq - 1) % 3 == number]
            assert site == sorted(site)


def test_a_held_batch_grows_no_further_than_memory_allows(world: World) -> None:
    world.refuse(None)
    world.sink.max_rows = 50
    world.add_healthy(400)
    world.run(lambda world: len(world.held) > 8)
    assert max(map(len, world.held)) == lookahead.TIMES * 50
    assert world.dead() == []


def test_a_crash_between_a_hold_and_its_end_repeats_and_loses_nothing(
    table: World,
) -> None:
    """The held batch has grown; the next process takes it up at its journal."""
    table.refuse()
    table.add_poison(200)
    waits = iter(range(3))
    table.run(lambda _: next(waits, None) is None)
    table.add_poison(100)
    table.run(lambda world: len(world.held[-1]) == 300)
    table.add_healthy(20)
    table.run(lambda world: world.done)
    table.check()
    if isinstance(table.service, Storage):
        assert look(table.state.path, "SELECT count(*) FROM append_cut") == [(0,)]


# A time that the table's partitions cannot take.

DEAD_CLOCK_US = 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [1, 150, 2_500])
def test_a_time_that_the_partitions_cannot_take_is_a_dead_letter_that_is_never_sent(
    table: World, count: int, *, ahead: bool
) -> None:
    moment_us = 4_000_000_000_000_000 if ahead else DEAD_CLOCK_US  # the year 2096, or 1970
    table.add(*(reading(n, sensor=BAD, site="S9", timestamp_us=moment_us) for n in range(count)))
    table.add_healthy(20)
    stop = table.run(lambda world: world.done)
    table.check()
    assert {reason for _, reason in table.dead()} == {REASON}
    assert stop.now_s <= table.sink.gather_s  # and no hold, which is looked at again after 1 s
    assert look(table.state.path, "SELECT detail FROM dead_letter")[0][0]
    if isinstance(table.service, BigQuery):
        assert table.service.fake.requests == 1
    else:
        assert table.service.fake.requests == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_table_without_partitions_by_time_takes_any_time(method: str, tmp_path: Path) -> None:
    world = World(method, tmp_path)
    tables = world.service.fake if isinstance(world.service, BigQuery) else world.service.tables  # type: ignore[union-attr]
    tables.store.delete("p-1.d.readings")
    tables.create_table("p-1.d.readings", partition_by=None)
    world.add(reading(1, timestamp_us=DEAD_CLOCK_US), reading(2))
    world.run(lambda world: world.done)
    assert world.arrived() == [1, 2]
    world.close()


@pytest.mark.parametrize("ahead_s", [None, 20 * 366 * 86_400.0, -20 * 366 * 86_400.0])
def test_where_the_two_clocks_disagree_the_service_decides(
    table: World, ahead_s: float | None
) -> None:
    """A wrong clock here, or no word of the service's, must not put healthy readings aside."""
    fake = table.service.fake if isinstance(table.service, BigQuery) else table.service.tables  # type: ignore[union-attr]
    fake.clock_ahead_s = ahead_s
    table.add(reading(0, sensor=BAD, timestamp_us=DEAD_CLOCK_US))
    table.add_healthy(100)
    table.run(lambda world: world.done)
    table.check()
    assert table.dead() == [(1, "invalid")], "in the service's own words"


def test_rows_older_than_the_partitions_are_kept_are_delivered_and_told(
    table: World, caplog: pytest.LogCaptureFixture
) -> None:
    fake = table.service.fake if isinstance(table.service, BigQuery) else table.service.tables  # type: ignore[union-attr]
    extras = fake.store.table("p-1.d.readings").extras
    extras["timePartitioning"] = {"type": "DAY", "field": "timestamp", "expirationMs": "864000000"}
    old_us = NOW_US - 20 * 86_400_000_000
    table.add(reading(1, timestamp_us=old_us), reading(2), reading(3, timestamp_us=old_us))
    table.run(lambda world: world.done)
    assert sorted(table.arrived()) == [1, 2, 3]
    (line,) = [r for r in caplog.records if "partition expiration" in r.getMessage()]
    told = line.__dict__["fields"]
    assert (told["rows"], told["first_seq"], told["last_seq"]) == (2, 1, 3)
