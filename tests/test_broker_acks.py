"""Messages and acknowledgements of one connection: in order, whole, never of another one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import paho.mqtt.client
import pytest

import collector.inbox
import collector.mqtt
import collector.paho_client
from collector.mqtt import (
    KEEPALIVE_S,
)
from tests.broker_gate import Gate, gate_maker, session_clock, subscribed_link
from tests.broker_link import (
    CONNECT,
    DISCONNECT,
    PINGREQ,
    PINGRESP,
    SAFETY_S,
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


def test_nothing_is_acknowledged_but_what_is_handed_in_and_in_that_order(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    before_us = time.time_ns() // 1000
    link.send(publish(5, b"one", b"t/1") + publish(6, b"three", b"t") + publish(0, qos=0))
    arrived = gate.arrival()
    assert arrived.generation == 1
    assert [(m.topic, m.payload, m.mid, m.qos) for m in arrived.messages] == [
        (b"t/1", b"one", 5, 1),
        (b"t", b"three", 6, 1),
        (b"a/b", b"{}", 0, 0),
    ]
    assert arrived.size == len(b"t/1onetthreea/b{}")
    assert before_us <= arrived.received_us <= time.time_ns() // 1000
    gate.session.acknowledge(1, [(1, 6)])
    gate.session.acknowledge(1, [(1, 5), (2, 9)])
    assert link.expect_acks(2) == [6, 5]
    assert link.expect(0x50) == b"\0\x09", "PUBREC for what came with QoS 2"


def test_an_acknowledgement_of_an_old_connection_is_never_sent(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates()
    gate.start()
    first = subscribed_link(broker)
    first.send(publish(5))
    assert gate.arrival().generation == 1
    first.close()
    second = broker.link()
    second.expect(CONNECT)
    # Whether it is handed in before the session is there, or after.
    gate.session.acknowledge(1, [(1, 5)])
    second.send(b"\x20\x02\x01\0" + publish(5, b"another"))
    assert gate.arrival().generation == 2
    gate.session.acknowledge(1, [(1, 5)])
    gate.session.acknowledge(2, [(1, 8)])
    assert second.expect_acks(1) == [8]


def test_acknowledgements_that_the_socket_does_not_take_at_once_are_sent_whole(
    clock: Clock,
) -> None:
    acks = [(1, n % 60_000 + 1) for n in range(100_000)]
    with wire_broker(receive_buffer_bytes=4096) as broker:
        gate = Gate(broker.port, clock=clock)
        gate.start()
        link = subscribed_link(broker)
        link.send(publish(5))
        gate.arrival()
        sock = gate.session._client.socket()  # noqa: SLF001 - its buffer is made small
        assert isinstance(sock, socket.socket)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        gate.session.acknowledge(1, acks[:60_000])
        assert link.expect_acks(60_000) == [mid for _, mid in acks[:60_000]]
        gate.stop.request("SIGTERM")
        gate.thread.join()
        gate.session.acknowledge(1, acks[60_000:])
        ending = threading.Thread(target=gate.session.finish, args=(lambda: True, SAFETY_S))
        ending.start()
        assert link.expect_acks(40_000) == [mid for _, mid in acks[60_000:]]
        link.expect(DISCONNECT)
        link.expect_end()
        ending.join()
        gate.close()


def test_a_full_inbox_stops_the_reading_and_the_connection_lives_on(
    broker: WireBroker, gates: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    library_clock = Clock()
    monkeypatch.setattr(paho.mqtt.client, "time_func", library_clock)
    monkeypatch.setattr(collector.paho_client, "time", SimpleNamespace(monotonic=library_clock))
    monkeypatch.setattr(collector.inbox, "INBOX_MAX_MESSAGES", 1)
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5))
    gate.arrival()
    link.send(publish(6))
    for _ in range(4):
        # The answer stands behind a message that is not read: it is missing for minutes.
        library_clock.now_s += KEEPALIVE_S + 1
        gate.stop.wake()
        link.expect(PINGREQ)
        link.send(PINGRESP)
    assert gate.inbox.arrivals.empty()
    assert [m.mid for d in gate.inbox.take(10, 0) for m in d.messages] == [5]
    assert [m.mid for m in gate.arrival().messages] == [6]
    gate.session.acknowledge(1, [(1, 5)])
    assert link.expect_acks(1) == [5]


def test_acknowledgements_go_out_while_the_inbox_is_full(
    broker: WireBroker, gates: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.inbox, "INBOX_MAX_MESSAGES", 1)
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5))
    gate.arrival()
    gate.session.acknowledge(1, [(1, 5)])
    assert link.expect_acks(1) == [5]


def test_a_connection_that_is_silent_for_too_long_is_given_up(
    broker: WireBroker,
    gates: Callable[..., Gate],
    book: Logbook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library_clock = Clock()
    monkeypatch.setattr(paho.mqtt.client, "time_func", library_clock)
    monkeypatch.setattr(collector.paho_client, "time", SimpleNamespace(monotonic=library_clock))
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5))
    gate.arrival()
    library_clock.now_s += KEEPALIVE_S + 1
    gate.stop.wake()
    link.expect(PINGREQ)
    library_clock.now_s += KEEPALIVE_S + 1
    gate.stop.wake()
    link.expect_end()
    broker.link().accept()
    assert len(book.lines(LOST)) == 1


def test_the_end_sends_the_last_acknowledgements_and_takes_leave(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5))
    gate.arrival()
    gate.end_run()
    link.send(publish(6))
    # The writer thread finishes what is in the inbox, and hands it in bit by bit.
    last = [[(1, 5)], [(1, 7), (1, 8)]]

    def writer_done() -> bool:
        if last:
            gate.session.acknowledge(1, last.pop(0))
            return False
        return True

    gate.session.acknowledge(0, [(1, 99)])
    gate.session.finish(writer_done, SAFETY_S)
    assert link.expect_acks(3) == [5, 7, 8]
    assert link.expect(DISCONNECT) == b""
    link.expect_end()
    assert gate.inbox.arrivals.empty(), "nothing more is read"


def test_the_end_waits_no_longer_than_it_is_told(
    broker: WireBroker, gates: Callable[..., Gate], clock: Clock
) -> None:
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5))
    gate.arrival()
    gate.end_run()
    asked: list[float] = []

    def never() -> bool:
        asked.append(clock.now_s)
        clock.now_s += 1.0
        return False

    gate.session.finish(never, 3.0)
    assert len(asked) in {3, 4}
    link.expect(DISCONNECT)


def test_the_end_without_a_connection_is_no_error(
    closed_port: int, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates(closed_port)
    book.when("cannot reach the broker", lambda: gate.stop.request("SIGTERM"))
    gate.session.run()
    gate.session.acknowledge(1, [(1, 5)])
    gate.session.finish(lambda: True, SAFETY_S)
    assert len(book.lines()) == 1


def test_a_stop_while_connected_is_no_loss_to_be_told_of(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates()
    gate.start()
    link = subscribed_link(broker)
    link.send(publish(5))
    gate.arrival()
    gate.end_run()
    assert set(book.levels("")) == {"INFO"}
