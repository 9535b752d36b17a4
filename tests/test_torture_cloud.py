"""Every way in which a network fails, and then the books: nothing lost, in order, and once."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, FORWARDERS, IMPATIENT, PROGRAMS, Program, Rig, wait_until
from tests.torture import cloud_faults
from tests.torture.cloud_faults import METHODS, READINGS, SOON_S, Cloudy, cloudy, suffer
from tests.torture.proxy import Fault

ROUNDS = int(os.environ.get("SLUICE_CLOUD_ROUNDS", "0"))
SEED = int(os.environ.get("SLUICE_TORTURE_SEED", "1"))
FAULTS = [fault for fault in Fault if fault is not Fault.NONE]
NOWHERE = "gate.invalid"
"""A name that no server knows (RFC 2606)."""


@pytest.fixture(scope="module", params=METHODS)
def system(request: pytest.FixtureRequest) -> Iterator[Cloudy]:
    """One system that goes through all faults, one after the other."""
    with cloudy(request.param) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.value)
def test_nothing_is_lost_by_a_broken_way(system: Cloudy, fault: Fault) -> None:
    suffer(system, fault, random.Random(SEED))  # noqa: S311 - a test's dice


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_cut_anywhere_in_a_request_loses_nothing(system: Cloudy, share: float) -> None:
    cuts = sum(proxy.cuts for proxy in system.proxies)
    # A batch of this size has some 30,000 bytes at BigQuery, half as many per site at Pub/Sub.
    system.begin(Fault.CUT_DURING, round(share * 30_000))
    system.rig.publish(READINGS)
    wait_until(lambda: sum(p.cuts for p in system.proxies) > cuts, SOON_S, "a connection is cut")
    system.mend()
    system.rig.wait_until_delivered()
    system.rig.assert_nothing_lost()


def test_a_forwarder_that_is_killed_while_answers_are_lost_repeats_only_what_it_may(
    system: Cloudy,
) -> None:
    rig = system.rig
    rig.publish(READINGS)
    rig.wait_until_delivered()
    before = system.arrived()
    system.begin(Fault.LOSE_ANSWERS)
    rig.publish(READINGS)
    wait_until(
        lambda: all(n > before[sink] for sink, n in system.arrived().items()), SOON_S, "it arrives"
    )
    for name in FORWARDERS:
        rig.programs[name].kill()
    system.mend()
    rig.start(*FORWARDERS)
    rig.wait_until_delivered()
    rig.assert_nothing_lost()


def in_own_hosts(program: Program, hosts: Path, module: str, sink: str) -> Program:
    """Return the forwarder as it runs where ``hosts`` stands for /etc/hosts."""
    script = f'mount --bind "{hosts}" /etc/hosts && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", module, sink]
    return Program(program.name, command, program.environment, program.log)


def may_have_own_mounts() -> bool:
    """Return whether this user may bind a file over /etc/hosts for a process of its own."""
    command = ["unshare", "-m", "mount", "--bind", "/dev/null", "/etc/hosts"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_have_own_mounts(), reason="needs root, for a hosts file of its own")
@pytest.mark.parametrize("method", METHODS)
def test_names_that_do_not_resolve_are_waited_for_and_need_no_restart(
    method: str, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n", encoding="ascii")
    with Rig(forwarder=IMPATIENT, BIGQUERY_WRITE_METHOD=method) as rig:
        elsewhere = {
            name: value.replace("127.0.0.1", NOWHERE)
            for name, value in rig.cloud.environment().items()
        }
        for sink in rig.sinks:
            name = f"forwarder-{sink}"
            rig.programs[name].environment |= elsewhere
            rig.programs[name] = in_own_hosts(rig.programs[name], hosts, IMPATIENT, sink)
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_spooled()
        for sink in rig.sinks:
            assert_seen(rig, sink, lambda row: row["state"] == "retrying")
        with hosts.open("a", encoding="ascii") as file:
            file.write(f"127.0.0.1 {NOWHERE}\n")
        rig.wait_until_delivered()
        rig.assert_nothing_lost()


def assert_seen(rig: Rig, sink: str, holds: Callable[[dict[str, object]], bool]) -> None:
    """Wait until the operator's line of ``sink`` is as it should be."""
    wait_until(lambda: holds(rig.books.backlog(sink)), SOON_S, f"the backlog of {sink} shows it")


HOUR_S = 3_600


def skewed(program: Program, seconds: int, *module: str) -> Program:
    """Return the program as it runs on a machine whose clock is off."""
    command = [sys.executable, "-m", "tests.torture.skewed", str(seconds), *module]
    return Program(program.name, command, program.environment, program.log)


def test_a_clock_that_is_off_and_jumps_loses_and_reorders_nothing() -> None:
    with Rig(SPOOL_RETENTION_HOURS="0.5") as rig:
        # Where the collector's clock jumps to; the forwarders ask for durations only, but for
        # gRPC, which cannot be told one time in Python and another in its core.
        for turn, seconds in enumerate((0, HOUR_S, -HOUR_S, 400 * 24 * HOUR_S, 0)):
            rig.programs[COLLECTOR] = skewed(rig.programs[COLLECTOR], seconds, "collector")
            rig.cloud.stop()
            rig.start(COLLECTOR)
            rig.publish(READINGS)
            rig.wait_until_spooled()
            # What is not delivered stays, however old it looks.
            pending = rig.books.figures().sinks["bigquery"].pending
            assert pending == READINGS, f"turn {turn}"
            assert rig.books.backlog("bigquery")["lag_s"] >= 0
            rig.cloud.start()
            rig.start(*FORWARDERS)
            rig.wait_until_delivered()
            rig.assert_nothing_lost()
            for name in PROGRAMS:
                assert rig.programs[name].stop()[0] == 0


@pytest.mark.timeout(0)
@pytest.mark.skipif(not ROUNDS, reason="the long version: SLUICE_CLOUD_ROUNDS=100")
def test_faults_in_random_order() -> None:
    cloud_faults.run(ROUNDS, SEED)
