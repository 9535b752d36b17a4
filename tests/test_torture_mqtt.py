"""Whatever a broker says or does: what was acknowledged is stored, and nothing twice."""

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.harness import COLLECTOR, Rig, assert_adds_up, wait_until
from tests.torture import mqtt_faults
from tests.torture.lying_broker import packet
from tests.torture.mqtt_faults import (
    LIES,
    MEMORY_SLACK_KIB,
    TIMEOUT_S,
    Collected,
    collected,
    tell,
)

ROUNDS = int(os.environ.get("SLUICE_MQTT_ROUNDS", "0"))
SEED = int(os.environ.get("SLUICE_TORTURE_SEED", "1"))
QUEUED_MAX = 100
READINGS = 500


@pytest.fixture(scope="module")
def system() -> Iterator[Collected]:
    """One collector that is told all lies, one after the other."""
    with collected(SEED) as made:
        yield made


@pytest.mark.parametrize("name", LIES)
def test_a_lie_breaks_no_promise(system: Collected, name: str) -> None:
    tell(system, name)


def test_after_all_lies_everything_is_stored_once(system: Collected) -> None:
    system.assert_kept()
    assert "Traceback" not in system.rig.programs[COLLECTOR].log_text


def test_a_packet_of_256_mb_costs_no_memory(system: Collected) -> None:
    before = system.rig.programs[COLLECTOR].memory_kib("VmHWM")
    tell(system, "PUBLISH of 256 MB")
    system.broker.settle()
    assert system.rig.programs[COLLECTOR].memory_kib("VmHWM") - before < MEMORY_SLACK_KIB


@pytest.mark.parametrize("codes", [b"", b"\1\1"])
def test_a_subscription_is_granted_only_if_each_filter_has_its_answer(
    system: Collected, codes: bytes
) -> None:
    broker = system.broker
    broker.await_client()
    broker.send(packet(0x20, b"\0\0"))
    body = broker.expect(0x82)
    broker.send(packet(0x90, body[:2] + codes))
    broker.expect_left()
    collector = system.rig.programs[COLLECTOR]
    collector.wait_for_log(f"the broker answers {len(codes)} of 1 subscriptions")


def test_a_grant_that_nobody_asked_for_changes_nothing(system: Collected) -> None:
    broker = system.broker
    broker.welcome()
    (number,) = broker.new()
    broker.send(packet(0x90, b"\xff\xfe\1") + broker.message(number))
    broker.expect_acknowledged([number])
    # What it knows of its session is what was granted: it need not subscribe again.
    broker.welcome(session_present=True)
    (number,) = broker.new()
    broker.send(broker.message(number))
    while number not in broker.acknowledged:
        assert broker.receive()[0] == 0x40


@pytest.mark.timeout(0)
@pytest.mark.skipif(not ROUNDS, reason="the long version: SLUICE_MQTT_ROUNDS=100")
def test_all_lies_in_random_order() -> None:
    mqtt_faults.run(ROUNDS, SEED)


class Thief:
    """A second client with the collector's id, who never acknowledges anything."""

    def __init__(self, port: int, client_id: str, *, clean: bool) -> None:
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        name = client_id.encode()
        flags = 2 if clean else 0
        body = b"\0\4MQTT\4" + bytes([flags, 0, 60, 0, len(name)]) + name
        self._sock.sendall(packet(0x10, body))
        answer = self._sock.recv(4)
        assert answer[:2] == b"\x20\2", answer
        assert answer[3] == 0, "the broker takes it for the collector"

    def wait_until_thrown_out(self) -> None:
        """Read until the broker gives the session back to its owner."""
        while self._sock.recv(65_536):
            pass
        self._sock.close()


def test_a_second_client_with_the_same_id_steals_nothing_that_it_does_not_acknowledge() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.start(COLLECTOR)
        with rig.load(500) as load:
            for _ in range(3):
                before = load.count
                thief = Thief(rig.broker.port, "sluice-rig", clean=False)
                thief.wait_until_thrown_out()
                wait_until(lambda b=before: load.count > b + 50, TIMEOUT_S, "the load goes on")  # type: ignore[misc]
        rig.wait_until_spooled()
        figures = assert_adds_up(rig.books, ())
        assert figures.spooled == len(rig.publisher.samples)


def times_subscribed(rig: Rig) -> int:
    """Return how often the collector has told of a subscription."""
    return rig.programs[COLLECTOR].log_text.count('"message": "subscribed"')


def test_a_broker_that_lost_its_session_is_subscribed_to_again_and_nothing_we_got_is_lost() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.start(COLLECTOR)
        for turn in range(3):
            rig.publish(READINGS)
            rig.wait_until_spooled()
            rig.broker.kill()
            for file in (rig.directory / "broker").glob("mosquitto.db*"):
                file.unlink()
            subscribed = times_subscribed(rig)
            rig.broker.start()
            wait_until(
                lambda n=subscribed: times_subscribed(rig) > n,  # type: ignore[misc]
                TIMEOUT_S,
                f"it subscribes again, turn {turn}",
            )
        rig.publish(READINGS)
        rig.wait_until_spooled()
        figures = assert_adds_up(rig.books, ())
        assert figures.spooled == len(rig.publisher.samples) == 4 * READINGS


def test_a_queue_that_overflows_drops_the_new_ones_and_none_that_we_got() -> None:
    options: dict[str, str | None] = {"max_queued_messages": str(QUEUED_MAX)}
    options["max_inflight_messages"] = "20"
    with Rig(APP_ENV="LOCAL", broker_options=options) as rig:
        rig.start(COLLECTOR)
        collector = rig.programs[COLLECTOR]
        for _ in range(READINGS // 50):
            rig.publish(50)  # within the queue, however slow the disk is
            rig.wait_until_spooled()
        before = rig.books.counter("spooled")
        collector.stop()
        rig.publish(READINGS)  # acknowledged to the sensors, each of them
        rig.start(COLLECTOR)
        # The broker's own word on how many it dropped is not to be had: its limit is.
        wait_until(
            lambda: rig.books.counter("spooled") - before >= QUEUED_MAX, TIMEOUT_S, "the queue"
        )
        rig.publish(10)
        last = rig.publisher.samples[-1].number
        wait_until(
            lambda: (float(last),) in rig.books.rows("spool", "SELECT value FROM reading_row"),
            TIMEOUT_S,
            "what comes after the overflow is spooled",
        )
        kept = [int(v) for (v,) in rig.books.rows("spool", "SELECT value FROM reading_row")]
        sent = [sample.number for sample in rig.publisher.samples]
        after_stop = [n for n in kept if READINGS < n <= 2 * READINGS]
        assert kept[:READINGS] == sent[:READINGS]
        # The oldest stayed, the new ones were dropped: the limit of the promise.
        assert after_stop == sent[READINGS : READINGS + len(after_stop)]
        assert QUEUED_MAX <= len(after_stop) < READINGS
        assert kept[-10:] == sent[-10:]
        assert_adds_up(rig.books, ())


def test_a_collector_that_stands_still_and_goes_on_loses_nothing() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.start(COLLECTOR)
        collector = rig.programs[COLLECTOR]
        with rig.load(500) as load:
            for _ in range(3):
                before = load.count
                collector.signal(signal.SIGSTOP)
                wait_until(lambda b=before: load.count > b + 200, TIMEOUT_S, "it goes on")  # type: ignore[misc]
                collector.signal(signal.SIGCONT)
        rig.wait_until_spooled()
        assert assert_adds_up(rig.books, ()).spooled == len(rig.publisher.samples)
