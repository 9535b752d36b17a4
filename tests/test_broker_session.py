"""The session with the broker: what is asked of it, and what becomes of each answer."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collector.mqtt import (
    KEEPALIVE_S,
)
from tests.broker_gate import FILTER, Gate, gate_maker, session_clock, subscribed_link
from tests.broker_link import (
    CONNECT,
    DISCONNECT,
    UNSUBSCRIBE,
    WireBroker,
    publish,
    texts,
    wire_broker,
)
from tests.collector_parts import Clock, Logbook, logbook

REFUSED = 0x80


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


def test_the_session_is_persistent_and_has_a_fixed_id(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gates().start()
    body = broker.link().accept()
    assert body[:7] == b"\0\4MQTT\4", "MQTT 3.1.1"
    assert body[7] == 0, "no clean session, no will, no user"
    assert struct.unpack("!H", body[8:10]) == (KEEPALIVE_S,)
    assert texts(body[10:]) == ["gate-7"]


def test_what_is_wanted_is_subscribed_with_qos_1_and_told_once_granted(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates(MQTT_TOPIC=f"{FILTER}, other/#")
    gate.start()
    link = broker.link()
    link.accept()
    body = link.expect(0x82)
    assert texts(body[2:], 1) == [FILTER, "other/#"]
    assert body[-1] == 1
    assert gate.subscribed == []
    link.send(b"\x90\x04" + body[:2] + b"\1\1" + publish(5))
    gate.arrival()
    assert gate.subscribed == [(FILTER, "other/#")]
    assert book.values("connected") == [
        {"broker": f"127.0.0.1:{broker.port}", "client_id": "gate-7", "session_resumed": False}
    ]
    assert book.values("subscribed") == [{"filters": (FILTER, "other/#")}]


def test_a_session_that_has_the_same_filters_is_not_subscribed_again(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates(MQTT_TOPIC=f"{FILTER},other/#", known_filters=["other/#", FILTER])
    gate.start()
    link = broker.link()
    link.accept(session_present=True)
    link.send(publish(5))
    gate.arrival()
    gate.session.acknowledge(1, [(1, 5)])
    assert link.expect_acks(1) == [5], "nothing was sent before it"
    assert gate.subscribed == []


def test_a_session_that_the_broker_has_lost_is_subscribed_again(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates(known_filters=[FILTER, "stale/#"])
    gate.start()
    link = broker.link()
    link.accept(session_present=False)
    assert link.grant() == [FILTER], "and there is nothing to unsubscribe"


def test_a_session_begun_again_and_left_before_the_grant_is_subscribed_at_the_next_connection(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates(known_filters=[FILTER])
    gate.start()
    first = broker.link()
    first.accept(session_present=False)
    first.expect(0x82)
    first.close()
    second = broker.link()
    second.accept(session_present=True)
    assert second.grant() == [FILTER], "the session that the first CONNECT began has no filter"
    second.send(publish(5))
    gate.arrival()
    assert gate.subscribed == [(FILTER,)]
    assert book.levels("has lost the session") == ["WARNING"], "told once"


def test_filters_that_are_no_longer_wanted_are_unsubscribed(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates(known_filters=["stale/#", FILTER, "old/+"], MQTT_TOPIC=f"{FILTER},new/#")
    gate.start()
    link = broker.link()
    link.accept(session_present=True)
    assert texts(link.expect(UNSUBSCRIBE)[2:]) == ["stale/#", "old/+"]
    assert link.grant() == [FILTER, "new/#"]


def test_what_was_granted_once_is_known_at_the_next_connection(
    broker: WireBroker, gates: Callable[..., Gate]
) -> None:
    gate = gates()
    gate.start()
    first = subscribed_link(broker)
    first.send(publish(5))
    gate.arrival()
    first.close()
    second = broker.link()
    second.accept(session_present=True)
    second.send(publish(6))
    gate.arrival()
    gate.session.acknowledge(2, [(1, 6)])
    assert second.expect_acks(1) == [6]
    assert gate.subscribed == [(FILTER,)]


def test_a_refused_subscription_is_named_and_the_connection_is_left(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates(MQTT_TOPIC=f"{FILTER},secret/#")
    gate.start()
    for _ in range(2):
        link = broker.link()
        link.accept()
        assert link.grant(1, REFUSED) == [FILTER, "secret/#"], "no filter counts as known"
        link.expect(DISCONNECT)
        link.expect_end()
    broker.link().accept()
    told = book.lines("refuses the subscription")
    assert (
        told
        == ["the broker refuses the subscription to secret/#; check its access list for this user"]
        * 2
    )
    assert [v["retry_in_s"] for v in book.values("refuses the sub")] == [0.5, 1.0]
    assert gate.subscribed == []


def test_an_answer_to_some_of_the_subscriptions_is_no_grant(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates(MQTT_TOPIC=f"{FILTER},other/#")
    gate.start()
    link = broker.link()
    link.accept()
    link.grant(1)
    link.expect(DISCONNECT)
    link.expect_end()
    broker.link().accept()
    assert len(book.lines("answers 1 of 2 subscriptions")) == 1
    assert gate.subscribed == []


def test_an_answer_that_nobody_asked_for_is_passed_over(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates()
    gate.start()
    link = broker.link()
    link.accept()
    link.send(b"\x90\x03\x7f\x7f\x80")
    link.grant()
    link.send(publish(5))
    gate.arrival()
    assert gate.subscribed == [(FILTER,)]
    assert set(book.levels("")) == {"INFO"}


def test_a_broker_that_grants_qos_0_only_is_warned_of(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook
) -> None:
    gate = gates(MQTT_TOPIC=f"{FILTER},weak/#")
    gate.start()
    link = broker.link()
    link.accept()
    link.grant(1, 0)
    link.send(publish(5))
    gate.arrival()
    assert book.levels("grants QoS 0 only") == ["WARNING"]
    assert book.values("grants QoS 0 only") == [{"filters": ["weak/#"]}]
    assert gate.subscribed == [(FILTER, "weak/#")]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (2, "set another MQTT_CLIENT_ID"),
        (3, "look at the broker's log"),
        (4, "check MQTT_USERNAME and the file MQTT_PASSWORD_FILE"),
        (5, "the broker's access list"),
    ],
)
def test_a_refused_connection_is_told_with_its_remedy_and_tried_later_and_later(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook, code: int, remedy: str
) -> None:
    gate = gates()
    gate.start()
    for _ in range(3):
        link = broker.link()
        link.accept(code=code)
        link.expect_end()
    broker.link().accept()
    lines = book.lines("the broker refuses the connection")
    assert len(lines) == 3
    assert all(remedy in line for line in lines), lines
    assert [v["retry_in_s"] for v in book.values("refuses the connection")] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "answer",
    [
        b"\x20\x02\x00\x01",  # CONNACK: this version of the protocol is not supported
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + bytes(100),
        b"\x15\x03\x03\x00\x02\x02\x46",  # TLS's alert: not the version that it expects
    ],
    ids=["version", "http", "tls"],
)
def test_what_does_not_speak_mqtt_3_1_1_is_told_of_and_tried_later_and_later(
    broker: WireBroker, gates: Callable[..., Gate], book: Logbook, answer: bytes
) -> None:
    gates().start()
    for _ in range(2):
        link = broker.link()
        link.expect(CONNECT)
        link.send(answer)
        link.expect_end()
    broker.link().accept()
    lines = book.lines(f"what answers at 127.0.0.1:{broker.port} does not speak MQTT 3.1.1")
    assert len(lines) == 2
    assert "MQTT_TLS_CA_FILE" in lines[0]
    assert [v["retry_in_s"] for v in book.values("does not speak")] == [0.5, 1.0]


def test_credentials_are_sent_and_the_password_is_read_anew_each_time(
    broker: WireBroker, gates: Callable[..., Gate], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("first\r\n", encoding="ascii")
    gate = gates(MQTT_USERNAME="gate", MQTT_PASSWORD_FILE=str(secret))
    gate.start()
    link = broker.link()
    body = link.expect(CONNECT)
    assert body[7] == 0xC0
    assert texts(body[10:]) == ["gate-7", "gate", "first"]
    secret.write_text("second", encoding="ascii")
    link.send(b"\x20\x02\0\x04")
    assert texts(broker.link().accept()[10:]) == ["gate-7", "gate", "second"]


def test_a_password_file_that_is_gone_is_a_reason_to_try_again(
    broker: WireBroker, gates: Callable[..., Gate], tmp_path: Path, book: Logbook
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("first", encoding="ascii")
    gate = gates(MQTT_USERNAME="gate", MQTT_PASSWORD_FILE=str(secret))
    secret.unlink()
    book.when("secret", lambda: secret.write_text("back", encoding="ascii"))
    gate.start()
    assert texts(broker.link().accept()[10:])[-1] == "back"
    assert "No such file" in book.lines("secret")[0]
