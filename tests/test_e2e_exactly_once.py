"""BigQuery by the write API: kill -9 at every point, faults of every kind, each reading once.

Real processes and signals, and the fake of the service on a real socket. ``SLUICE_KILLS`` sets
how often each point is tried, ``SLUICE_SEED`` repeats a run.
"""

import os
import random
import threading
import time
from collections.abc import Callable

import grpc
import pytest

from tests.harness import (
    COLLECTOR,
    MORTAL,
    Rig,
    assert_adds_up,
    assert_all_received,
    assert_once,
)
from tests.harness.mortal import POINTS

KILLS = int(os.environ.get("SLUICE_KILLS", "2"))
SEED = int(os.environ.get("SLUICE_SEED", str(time.time_ns())))
RATE = 1_500
FORWARDER = "forwarder-bigquery"
LIFE_S = 6.0
"""How long a forwarder may take to come to the point at which it is to die."""


@pytest.fixture
def dice() -> random.Random:
    """The seed is printed, so that a failure can be run again."""
    print(f"SLUICE_SEED={SEED}")  # noqa: T201 - pytest shows it with a failure
    return random.Random(SEED)  # noqa: S311 - a test's dice


def make_rig() -> Rig:
    """Return a system whose BigQuery forwarder can be told when to die."""
    return Rig(forwarder=MORTAL, PUBSUB_ENABLED="false")


def live_and_die(rig: Rig, point: str, count: int) -> bool:
    """Run the forwarder until it dies at ``point``; return whether it came there."""
    forwarder = rig.programs[FORWARDER]
    forwarder.environment |= {"MORTAL_AT": point, "MORTAL_COUNT": str(count)}
    forwarder.start()
    deadline = time.monotonic() + LIFE_S
    while forwarder.running and time.monotonic() < deadline:
        time.sleep(0.01)
    died = not forwarder.running
    forwarder.kill()
    del forwarder.environment["MORTAL_AT"]
    return died


def settle(rig: Rig, *, poisoned: Callable[[int], bool] = lambda _: False) -> None:
    """Let an unharmed forwarder finish, and check the table against the ledger."""
    rig.cloud.write_api.faults.before_append = lambda *_: None
    rig.cloud.write_api.faults.after_append = lambda *_: None
    forwarder = rig.programs[FORWARDER]
    if not forwarder.running:
        forwarder.start()
    rig.wait_until_delivered()
    figures = assert_adds_up(rig.books, rig.sinks)
    received = rig.cloud.received("bigquery")
    dead = {s.number for s in rig.publisher.samples if poisoned(s.number)}
    assert_all_received(rig.publisher.samples, received, but=dead)
    assert_once(received)
    assert figures.sinks["bigquery"].dead_lettered == len(dead)
    assert rig.books.rows("bigquery", "SELECT * FROM append_cut") == []
    assert rig.books.rows("bigquery", "SELECT value FROM counter WHERE name LIKE 'possibly%'") == []


NEVER_BY_ITSELF = {
    "before rows are left out",
    "after rows were left out",
    "after a stream was finalized",
    "after a stream was made",
    "after a stream was noted",
}
"""Or once in a life."""


@pytest.mark.parametrize("point", [p for p in POINTS if p not in NEVER_BY_ITSELF])
def test_kill_9_at_a_point_of_the_cycle(point: str, dice: random.Random) -> None:
    with make_rig() as rig:
        rig.start(COLLECTOR)
        with rig.load(RATE):
            died = [live_and_die(rig, point, dice.randint(1, 4)) for _ in range(KILLS)]
            assert all(died), f"it never came to the point {point}"
        settle(rig)
        assert len(rig.cloud.write_api.streams.names) <= KILLS + 1, "one for each life at most"


@pytest.mark.parametrize("point", sorted(NEVER_BY_ITSELF))
def test_kill_9_at_a_point_that_only_trouble_leads_to(point: str, dice: random.Random) -> None:
    def poisoned(number: int) -> bool:
        return number % 977 == 0

    with make_rig() as rig:
        rig.start(COLLECTOR)
        rig.cloud.poison_bigquery(lambda row: poisoned(int(float(str(row["value"])))))
        rig.start(FORWARDER)
        rig.publish(100)
        rig.wait_until_delivered()
        rig.programs[FORWARDER].kill()
        with rig.load(RATE):
            for _ in range(KILLS):
                if "stream" in point:
                    for name in rig.cloud.write_api.streams.names:
                        rig.cloud.write_api.streams.finalize(name)
                assert live_and_die(rig, point, 1), f"it never came to the point {point}"
                dice.random()
        settle(rig, poisoned=poisoned)


@pytest.mark.parametrize("moment", ["before_append", "after_append"])
def test_kill_9_while_the_service_has_the_rows(moment: str, dice: random.Random) -> None:
    """Killed with the request on its way, and with the rows in the table but not answered."""
    with make_rig() as rig:
        rig.start(COLLECTOR)
        forwarder = rig.programs[FORWARDER]
        left = [0]

        def strike(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                forwarder.kill()

        setattr(rig.cloud.write_api.faults, moment, strike)
        with rig.load(RATE):
            for _ in range(KILLS * 2):
                left[0] = dice.randint(1, 5)
                forwarder.start()
                assert forwarder.wait() == -9
        settle(rig)
        assert len(rig.cloud.write_api.streams.names) <= KILLS * 2 + 1, "one for each life"


def test_kill_9_at_random_times_and_points_under_faults(dice: random.Random) -> None:
    with make_rig() as rig:
        rig.start(COLLECTOR)
        api = rig.cloud.write_api
        faults: list[Callable[[], object]] = [
            lambda: api.faults.lose_answer(times=dice.randint(1, 3)),
            lambda: api.faults.abort(grpc.StatusCode.UNAVAILABLE, "cut", times=dice.randint(1, 3)),
            lambda: api.faults.refuse("INTERNAL", times=1),
            lambda: api.faults.refuse("INTERNAL", times=1, carried_out=True),
            lambda: api.faults.refuse("ABORTED", times=1),
            lambda: [api.streams.finalize(name) for name in api.streams.names],
            lambda: api.faults.delay(0.2, times=3),
        ]
        with rig.load(RATE):
            for _ in range(KILLS * 6):
                dice.choice(faults)()
                away = threading.Timer(0.3, api.start)
                if dice.random() < 0.2:
                    api.stop()  # the next life begins before it is back
                    away.start()
                if dice.random() < 0.5:
                    live_and_die(rig, dice.choice(list(POINTS)), dice.randint(1, 6))
                else:
                    rig.programs[FORWARDER].start()
                    time.sleep(dice.uniform(0.2, 1.0))  # it is killed at any moment of its life
                    rig.programs[FORWARDER].kill()
                if away.ident:
                    away.join()
        api.faults.clear()
        settle(rig)


def test_a_forgotten_stream_repeats_at_most_one_window_and_counts_it(dice: random.Random) -> None:
    """The documented exception: rows without an answer, and then the stream is unknown."""
    with make_rig() as rig:
        rig.start(COLLECTOR)
        rig.publish(3_000)
        rig.wait_until_spooled()
        assert live_and_die(rig, "before the cursor", 1)
        there = len(rig.cloud.received("bigquery"))
        assert there > 0
        for name in rig.cloud.write_api.streams.names:
            rig.cloud.write_api.streams.forget(name)
        rig.programs[FORWARDER].start()
        rig.wait_until_delivered()
        received = rig.cloud.received("bigquery")
        assert_all_received(rig.publisher.samples, received)
        ((counted,),) = rig.books.rows(
            "bigquery", "SELECT value FROM counter WHERE name = 'possibly_repeated'"
        )
        assert len(received) - 3_000 == there == counted
        assert "may be in the table twice" in rig.programs[FORWARDER].log_text
        dice.random()


@pytest.mark.parametrize("other", ["insert_all", "storage_default"])
def test_switching_the_method_with_a_backlog_and_back_loses_and_repeats_nothing(other: str) -> None:
    """Between clean stops nothing is on its way, so nothing repeats."""
    with make_rig() as rig:
        rig.start(COLLECTOR)
        forwarder = rig.programs[FORWARDER]
        for method in ("storage", other, "storage"):
            rig.publish(1_000)
            rig.wait_until_spooled()
            forwarder.environment["BIGQUERY_WRITE_METHOD"] = method
            forwarder.start()
            rig.wait_until_delivered()
            assert forwarder.stop()[0] == 0
        received = rig.cloud.received("bigquery")
        assert_all_received(rig.publisher.samples, received)
        assert len(received) == len(rig.publisher.samples) == 3_000
