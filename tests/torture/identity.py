"""A changed identity: what the broker has queued is fetched, or the session that holds it is named.

The collector is absent, readings are queued for it, and it comes back under another host name
(a UTS namespace of its own), with its spool or its identity file gone, or under another client id.
"""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from lifecycle import read_identity
from lifecycle.identity import IDENTITY_FILE
from tests.harness import COLLECTOR, FORWARDERS, Program, Rig, assert_all_received, wait_until
from tests.torture.report import Report

QUEUED = 500
TIMEOUT_S = 45.0
MOVED = "the MQTT session has changed"


def start_on(rig: Rig, host_name: str, **variables: str) -> Program:
    """Start the collector on a machine of that name, and wait until it has its session."""
    script = f'echo {host_name} > /proc/sys/kernel/hostname && exec "$0" -m collector'
    namespace = ["unshare", "--uts"] if os.getuid() == 0 else ["unshare", "--uts", "-r"]
    program = Program(
        COLLECTOR,
        [*namespace, "sh", "-c", script, sys.executable],
        {**rig.variables, **variables},
        rig.directory / f"{COLLECTOR}.log",
    )
    rig.programs[COLLECTOR] = program
    program.start()
    program.wait_for_log('"message": "connected"', TIMEOUT_S)
    rig.wait_for_session()
    return program


def _same(rig: Rig, host_name: str) -> None:
    assert MOVED not in start_on(rig, host_name).log_text


def _spool_gone(rig: Rig, host_name: str) -> None:
    """As after a damaged spool was set aside: a new one, which remembers no session."""
    _remove(rig.spool_dir, "spool.db*")
    assert MOVED not in start_on(rig, host_name).log_text


def _identity_gone(rig: Rig, host_name: str) -> None:
    """As after an upgrade from a release that kept none."""
    _remove(rig.spool_dir, IDENTITY_FILE)
    assert MOVED not in start_on(rig, host_name).log_text


def _client_changed(rig: Rig, host_name: str) -> None:
    """Another client id is obeyed and told; set back, it fetches what was queued."""
    before = _client_id(rig)
    other = start_on(rig, host_name, MQTT_CLIENT_ID=f"{before}-x")
    other.wait_for_log(MOVED)
    other.wait_for_log(f"MQTT_CLIENT_ID={before},")
    wait_until(lambda: _client_id(rig) == f"{before}-x", TIMEOUT_S, "the new session is kept")
    other.stop()
    start_on(rig, host_name, MQTT_CLIENT_ID=before).wait_for_log(MOVED)


def _client_id(rig: Rig) -> str:
    identity = read_identity(rig.spool_dir)
    assert identity is not None
    assert identity.session is not None
    return identity.session.client_id


def _remove(directory: Path, pattern: str) -> None:
    for path in directory.glob(pattern):
        path.unlink()


CHANGES: dict[str, Callable[[Rig, str], None]] = {
    "host name": _same,
    "host name, spool gone": _spool_gone,
    "host name, identity file gone": _identity_gone,
    "client id": _client_changed,
}


def run(rounds: int, seed: int) -> Report:
    """Change the identity ``rounds`` times, with readings queued each time.

    Args:
        rounds: How many.
        seed: Of which.
    """
    report = Report("identity", seed)
    dice = random.Random(seed)  # noqa: S311 - a test's dice
    deck: list[str] = []
    with Rig(INSTANCE_ID="") as rig:
        rig.broker.start()
        rig.start(*FORWARDERS)
        start_on(rig, "first")
        while report.rounds < rounds and not report.violations:
            deck = deck or dice.sample(list(CHANGES), len(CHANGES))
            change = deck.pop()
            report.rounds += 1
            report.counts[change] += 1
            rig.programs[COLLECTOR].stop()
            rig.publish(QUEUED)
            try:
                CHANGES[change](rig, f"host-{report.rounds}")
                _wait_until_received(rig)
            except AssertionError as failure:
                report.violations.append(f"{change}, round {report.rounds}: {failure}")
                report.violations += [f"{log}: {text}" for log, text in rig.logs()]
        report.counts["queued"] = report.rounds * QUEUED
    return report


def _wait_until_received(rig: Rig) -> None:
    expected = {s.number for s in rig.publisher.samples}
    for sink in rig.sinks:
        wait_until(
            lambda s=sink: {r.number for r in rig.cloud.received(s)} >= expected,  # type: ignore[misc]
            TIMEOUT_S,
            f"{sink} has all {len(expected)} readings",
        )
        assert_all_received(rig.publisher.samples, rig.cloud.received(sink))
