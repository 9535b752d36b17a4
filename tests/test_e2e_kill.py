"""Restarts and kill -9 under load: nothing is lost, and the counters add up."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from spool import LAG_MAX_ROWS
from tests.harness import (
    COLLECTOR,
    COMMIT_DELAYS_MS,
    FORWARDERS,
    PROGRAMS,
    Rig,
    Supervisor,
    assert_adds_up,
    assert_all_received,
    wait_until,
)
from tests.torture.wiretap import WireTap

RATE = 400
"""Readings a second: many are always on their way, and no machine is too slow for it."""

SOME = RATE // 2
CALM_RATE = 50
CALM_KILLS = 4
CALM_LAG_S = 5
"""A cursor lags by a second; on a busy machine its forwarder comes to it later."""
TIMEOUT_S = 40.0
TRIES = 30
KILLS_AMID = 6
AT_ONCE, GATHERING = COMMIT_DELAYS_MS
ORPHANS_END_S = 12.0
"""10 s, and what a busy machine needs to notice."""


@pytest.fixture(scope="module")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """One system for all tests of a COMMIT_DELAY_MS; each adds to the ledger and checks all."""
    with Rig(COMMIT_DELAY_MS=request.param) as rig:
        rig.broker.start()
        yield rig


@pytest.fixture(scope="module")
def supervisor(rig: Rig) -> Iterator[Supervisor]:
    """The supervisord that runs it."""
    with Supervisor(rig).supervising() as supervisor:
        yield supervisor


def wait_for_traffic(rig: Rig) -> None:
    """Wait until readings have gone all the way to both services from now on."""
    before = {sink: len(rig.cloud.received(sink)) for sink in rig.sinks}
    wait_until(
        lambda: all(len(rig.cloud.received(s)) >= before[s] + SOME for s in rig.sinks),
        TIMEOUT_S,
        "both services get readings",
    )


def settle(rig: Rig) -> None:
    """Wait for the end of the traffic and check everything against everything."""
    rig.wait_until_delivered()
    rig.assert_nothing_lost()


@pytest.mark.parametrize(
    ("rig", "name"),
    [(GATHERING, COLLECTOR), (GATHERING, FORWARDERS[0]), (AT_ONCE, FORWARDERS[1])],
    indirect=["rig"],
)
def test_supervisorctl_restart_under_load_loses_nothing(
    rig: Rig, supervisor: Supervisor, name: str
) -> None:
    before = supervisor.pids()
    with rig.load(RATE):
        wait_for_traffic(rig)
        answer = supervisor.control("restart", name)
        assert answer.split("\n")[:2] == [f"{name}: stopped", f"{name}: started"]
        wait_for_traffic(rig)
    assert supervisor.pids()[name] not in {0, before[name]}
    log = (rig.directory / "log" / f"{name}.log").read_text(encoding="utf-8")
    assert '"message": "stopped: SIGTERM"' in log
    settle(rig)


@pytest.mark.parametrize(
    ("rig", "name"),
    [
        (AT_ONCE, COLLECTOR),
        (GATHERING, COLLECTOR),
        (AT_ONCE, FORWARDERS[0]),
        (GATHERING, FORWARDERS[1]),
    ],
    indirect=["rig"],
)
def test_kill_9_under_load_loses_nothing(rig: Rig, supervisor: Supervisor, name: str) -> None:
    before = supervisor.pids()
    with rig.load(RATE):
        wait_for_traffic(rig)
        os.kill(before[name], signal.SIGKILL)
        wait_until(
            lambda: supervisor.pid_of(name) not in {0, before[name]},
            TIMEOUT_S,
            f"supervisord starts {name} again",
        )
        supervisor.wait_until_running()
        wait_for_traffic(rig)
    after = supervisor.pids()
    assert {n for n in PROGRAMS if after[n] != before[n]} == {name}, "the others were left alone"
    settle(rig)


@pytest.mark.parametrize("rig", [GATHERING], indirect=True)
def test_kill_9_of_all_programs_at_once_under_load_loses_nothing(
    rig: Rig, supervisor: Supervisor
) -> None:
    with rig.load(RATE):
        wait_for_traffic(rig)
        for pid in supervisor.pids().values():
            os.kill(pid, signal.SIGKILL)
        wait_for_traffic(rig)
    supervisor.wait_until_running()
    settle(rig)


@pytest.mark.parametrize("rig", [AT_ONCE], indirect=True)
def test_kill_9_of_supervisord_loses_nothing_and_its_orphans_make_room(
    rig: Rig, supervisor: Supervisor
) -> None:
    orphans = supervisor.pids()
    with rig.load(RATE):
        wait_for_traffic(rig)
        supervisor.kill()
        # At once: the new one's programs may meet the orphans' locks.
        supervisor.start()
        wait_for_traffic(rig)
    assert not set(orphans.values()) & set(supervisor.pids().values())
    for pid in orphans.values():
        assert not Path(f"/proc/{pid}").exists(), "an orphan is still there"
    settle(rig)


def test_kill_9_loses_nothing_that_waits_for_the_next_commit() -> None:
    """What gathers in memory is not acknowledged, so the broker has it, and sends it again."""
    with WireTap() as tap, Rig(MQTT_PORT=str(tap.port), COMMIT_DELAY_MS="1000") as rig:
        tap.upstream = rig.broker.port
        rig.start(COLLECTOR)
        # The kill is to come between two commits: on a busy machine not at each try. And more than
        # once, for who acknowledges too early does so some moments after it was sent a reading.
        amid = 0
        for _ in range(TRIES):
            rig.publish(SOME)
            wait_until(lambda: tap.published >= len(rig.publisher.samples), TIMEOUT_S, "all came")
            rig.programs[COLLECTOR].kill()
            spooled = rig.books.counter("spooled")
            amid += len(rig.publisher.samples) > spooled
            assert tap.count <= spooled
            rig.start(COLLECTOR)
            rig.wait_until_spooled()
            if amid == KILLS_AMID:
                break
        assert amid == KILLS_AMID
        rig.start(*FORWARDERS)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()


def test_kill_9_at_calm_traffic_repeats_no_more_than_the_cursor_lags_behind() -> None:
    with Rig(BIGQUERY_ENABLED="false") as rig:
        rig.start(COLLECTOR, "forwarder-pubsub")
        program = rig.programs["forwarder-pubsub"]
        unnoted: list[int] = []
        with rig.load(CALM_RATE):
            for _ in range(CALM_KILLS):
                wait_for_traffic(rig)
                program.kill()
                ((cursor,),) = rig.books.rows("pubsub", "SELECT seq FROM cursor")
                program.start()
                unnoted.append(cursor)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        counts = Counter(one.seq for one in rig.cloud.received("pubsub"))
        repeated = {seq for seq, count in counts.items() if count > 1}
        # Each lies behind a cursor that a kill has left, by no more than the cursor may lag.
        assert all(any(c < seq <= c + LAG_MAX_ROWS for c in unnoted) for seq in repeated)
        assert len(repeated) <= CALM_KILLS * CALM_RATE * CALM_LAG_S


def test_kill_9_of_the_broker_loses_nothing_that_it_had_saved() -> None:
    """Without the collector, what the broker has acknowledged is in its own hands only."""
    options: dict[str, str | None] = {"autosave_on_changes": "true", "autosave_interval": "1"}
    with Rig(APP_ENV="LOCAL", broker_options=options) as rig:
        rig.start(COLLECTOR)
        rig.publish(SOME)
        rig.programs[COLLECTOR].kill()
        rig.publish(SOME)
        # Mosquitto acknowledges first and saves a moment later, whatever its settings.
        last = rig.publisher.acknowledged[-1].payload
        saved = rig.directory / "broker" / "mosquitto.db"
        wait_until(lambda: last in saved.read_bytes(), TIMEOUT_S, "the broker has saved")
        rig.broker.kill()
        rig.start(COLLECTOR)
        rig.publish(SOME)
        rig.wait_until_spooled()
        assert assert_adds_up(rig.books, ()).spooled == 3 * SOME


def test_kill_9_of_the_broker_under_load_leaves_the_collector_in_order() -> None:
    with Rig() as rig:
        rig.start()
        with rig.load(RATE):
            wait_for_traffic(rig)
            rig.broker.kill()
            rig.broker.start()
            wait_for_traffic(rig)
        # What a killed broker had acknowledged and not yet passed on or saved is the
        # broker's to lose (deploy/mosquitto.conf); what the collector has goes on whole.
        # The last one was sent to the new broker, behind all that it has to pass on.
        last = rig.publisher.samples[-1].number
        wait_until(
            lambda: (last,) in rig.books.rows("spool", "SELECT value FROM reading_row"),
            TIMEOUT_S,
            "the last reading is spooled",
        )
        wait_until(
            lambda: all(s.pending == 0 for s in rig.books.figures().sinks.values()),
            TIMEOUT_S,
            "the spool is drained",
        )
        figures = assert_adds_up(rig.books, rig.sinks)
        spooled = {row[0] for row in rig.books.rows("spool", "SELECT value FROM reading_row")}
        there = [s for s in rig.publisher.samples if s.number in spooled]
        assert len(spooled) == figures.spooled
        for sink in rig.sinks:
            assert_all_received(there, rig.cloud.received(sink))


def test_orphans_end_in_time_although_the_services_hang() -> None:
    with Rig() as rig:
        rig.broker.start()
        with Supervisor(rig).supervising() as supervisor:
            rig.cloud.pubsub.faults.hang(times=None, calls={"*"})
            rig.cloud.hang_bigquery()
            rig.publish(SOME)
            for service in (rig.cloud.pubsub, rig.cloud.bigquery):
                assert service.faults.wait_fired(1, TIMEOUT_S)
            supervisor.kill()
            wait_until(lambda: not supervisor.orphans(), ORPHANS_END_S, "all programs ended")
