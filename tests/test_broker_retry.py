"""A broker that is away, hangs up or talks nonsense is tried again, and the reason is told."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collector.mqtt import (
    RECONNECT_FIRST_S,
    RECONNECT_MAX_S,
    SESSION_FLAP_S,
    SESSION_FLAPS_SUSPICIOUS,
)
from tests.broker_gate import FILTER, Gate, gate_maker, session_clock, subscribed_link
from tests.broker_link import (
    CONNECT,
    WireBroker,
    publish,
    wire_broker,
)
from tests.collector_parts import Clock, Logbook, logbook

LOST = "the connection to the broker was lost"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return session_clock(monkeypatch)


@pytest.fixture
def broker() -> Iterator[WireBroker]:
    with wire_broker() as opened:
        yield opened


@pytest.fixture
def gates(broker: WireBroker, clock: Clock) -> Iterator[Callable[..., Gate]]:
    with gate_maker(broker.port, clock) as make:
        yield make


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook("collector.mqtt") as opened:
        yield opened


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken but that nobody listens on."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.parametrize(("jitter", "share"), [(1.0, 1.0), (0.0, 0.5), (0.5, 0.75)])
def test_a_broker_that_is_away_is_tried_ever_more_seldom_but_never_given_up(
    closed_port: int, gates: Callable[..., Gate], book: Logbook, jitter: float, share: float
) -> None:
    gate = gates(closed_port, jitter=jitter)

    def stop_at_the_tenth() -> None:
        if len(book.lines("cannot reach the broker")) == 10:
            gate.stop.request("SIGTERM")

    book.when("cannot reach the broker", stop_at_the_tenth)
    began_s = gate.clock.now_s
    gate.session.run()
    waits = [RECONNECT_FIRST_S * 2**n for n in range(6)] + [RECONNECT_MAX_S] * 4
    told = [values["retry_in_s"] for values in book.values("cannot reach the broker")]
    assert told == [round(wait * share, 2) for wait in waits]
    assert gate.clock.now_s - began_s == pytest.approx(sum(waits[:9]) * share, abs=0.01)
    assert "systemctl status mosquitto" in book.lines()[0]
    assert set(book.levels("cannot reach")) == {"WARNING"}
    assert gate.beats.asked >= sum(waits[:9]) * share, "the wait is no stall"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_good_session_makes_the_next_wait_short_again(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook, *, resumed: bool
) -> None:
    gate = gates(known_filters=[FILTER])
    gate.start()
    for _ in range(4):
        broker.link().accept(code=5)
    link = broker.link()
    link.accept(session_present=resumed)
    if not resumed:
        link.grant()
    link.send(publish(5))
    gate.arrival()
    link.close()
    broker.link().accept()
    assert book.values(LOST)[0]["retry_in_s"] == RECONNECT_FIRST_S


def test_a_connection_without_a_subscription_is_no_good_session(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gates().start()
    for _ in range(3):
        link = broker.link()
        link.accept()
        link.expect(0x82)
        link.close()
    broker.link().accept()
    assert [v["retry_in_s"] for v in book.values(LOST)] == [0.5, 1.0, 2.0]


def test_a_broker_that_hangs_up_without_an_answer_is_told_of(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gates().start()
    link = broker.link()
    link.expect(CONNECT)
    link.close()
    broker.link().accept()
    assert book.lines("without an answer") == ["the broker closed the connection without an answer"]


def test_connections_that_break_at_once_again_and_again_point_to_a_second_client(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook, clock: Clock
) -> None:
    gates().start()
    for lives_s in (0.0, 0.0, 0.0, SESSION_FLAP_S + 1.0, 0.0):
        link = subscribed_link(broker)
        clock.now_s += lives_s
        link.close()
    broker.link().accept()
    hints = ["another client connected with the id gate-7" in line for line in book.lines(LOST)]
    assert SESSION_FLAPS_SUSPICIOUS == 3
    assert hints == [False, False, True, False, False]


def test_a_malformed_packet_ends_the_connection_and_what_stood_before_it_is_kept(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5) + b"\x36\x05\x00\x01t\x00\x07" + publish(6))
    link.expect_end()
    second = broker.link()
    second.accept(session_present=True)
    second.send(publish(5))
    assert [m.mid for m in gate.arrival().messages] == [5]
    again = gate.arrival()
    assert (again.generation, [m.mid for m in again.messages]) == (2, [5])
    assert book.lines("QoS 3") == ["a PUBLISH with QoS 3"]


def test_half_a_packet_of_the_old_connection_is_forgotten(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5) + publish(6)[:4])
    gate.arrival()
    link.close()
    second = broker.link()
    second.accept(session_present=True)
    second.send(publish(7))
    assert [m.mid for m in gate.arrival().messages] == [7]


# paho leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl:pytest.PytestUnraisableExceptionWarning"
)
def test_a_broker_without_tls_is_told_of_where_tls_is_asked_for(
    broker: WireBroker, gates: Callable[..., Gate], tmp_path: Path, book: Logbook
) -> None:
    authority = tmp_path / "ca.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=ca", "-keyout", str(tmp_path / "ca.key"), "-out", str(authority)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    gate = gates(MQTT_TLS_CA_FILE=str(authority))
    book.when("TLS with", lambda: gate.stop.request("SIGTERM"))
    gate.start()
    broker.link().send(b"\x20\x02\0\0" + bytes(100))
    gate.thread.join()
    (line,) = book.lines("TLS with")
    assert f"127.0.0.1:{broker.port} failed" in line
    assert "check MQTT_TLS_CA_FILE" in line
