"""The broker's side of the collector: connect, subscribe, read while there is room, acknowledge.

One thread, the main one. It fills the inbox and sends the acknowledgements that the writer
thread hands back after its commits. Acknowledgements belong to the connection on which the
message came: the broker reuses packet identifiers, and a late one would acknowledge a
message that was never stored.
"""

import logging
import random
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paho.mqtt.client import Client, ConnectFlags
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from collector.brokerhealth import BrokerHealth, NotConnectedError, Problem, unreadable
from collector.inbox import Delivered, Inbox
from collector.packets import Message
from collector.paho_client import Ack, FastClient
from lifecycle import Settings, StopRequest, Watchdog, fields
from spool import BrokerLink, Conditions

if TYPE_CHECKING:
    from collector.tls import Tls

log = logging.getLogger("collector.mqtt")

KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 5.0
RECONNECT_FIRST_S = 0.5
RECONNECT_MAX_S = 30.0
LOOP_TIMEOUT_S = 1.0
READS_PER_TURN = 16
"""Then the loop looks at everything else: acknowledgements, keepalive, the wish to stop."""

SUBSCRIBE_QOS = 1
SUBSCRIBE_FAILED = 0x80

SESSION_FLAP_S = 5.0
SESSION_FLAPS_SUSPICIOUS = 3
"""Connections in a row that each broke within SESSION_FLAP_S: another client with our id?"""

LOOP = "network"

_REFUSALS = {
    "Client identifier not valid": "set another MQTT_CLIENT_ID",
    "Bad user name or password": "check MQTT_USERNAME and the file MQTT_PASSWORD_FILE",
    "Not authorized": "check MQTT_USERNAME, MQTT_PASSWORD_FILE and the broker's access list",
}


@dataclass
class _Connection:
    """What is known of the present connection."""

    generation: int
    began: float
    accepted: bool = False
    garbled: bool = False
    subscribing: dict[int, tuple[str, ...]] = field(default_factory=dict)
    problem: Problem | None = None


class BrokerSession:
    """Keeps the session with the broker, for as long as the program runs.

    Args:
        settings: Broker, credentials, TLS, client id, topic filters.
        inbox: Where messages go.
        stop: When to end; also wakes the loop.
        watchdog: Told at each turn.
        known_filters: The filters that the broker's session of this client id already has.
        weak_filters: Those of them that were granted with QoS 0: they are asked for again.
        last_reading_us: When the last reading was received before this start; 0 if not known.
        on_subscribed: Told the granted filters, and those with QoS 0; none once a session is lost.
        conditions: Where this session says what is wrong with it, for the spool's view ``health``.
        link: Where it says whether it is connected, for the spool's view ``broker``.
        jitter: Returns a number from 0 to 1.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        settings: Settings,
        inbox: Inbox,
        stop: StopRequest,
        watchdog: Watchdog,
        *,
        known_filters: Sequence[str] = (),
        weak_filters: Sequence[str] = (),
        last_reading_us: int = 0,
        on_subscribed: Callable[[Sequence[str], Sequence[str]], None] = lambda *_: None,
        conditions: Conditions | None = None,
        link: BrokerLink | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._inbox = inbox
        self._stop = stop
        self._watchdog = watchdog
        self._known_filters = tuple(known_filters)
        self._weak_filters = tuple(weak_filters)
        self._last_reading_us = last_reading_us
        self._on_subscribed = on_subscribed
        conditions = conditions or Conditions()
        self._health = BrokerHealth(
            settings, conditions, steady_s=SESSION_FLAP_S, link=link, clock=time.monotonic
        )
        self._tls = _tls(settings, conditions)
        self._jitter = jitter
        self._acks: deque[tuple[int, list[Ack]]] = deque()
        self._connection = _Connection(0, 0.0)
        self._client = self._make_client()
        self._failures = 0
        self._flaps = 0

    def _make_client(self) -> FastClient:
        s = self._settings
        client = FastClient(s.mqtt_client_id, s.max_payload_bytes, self._on_messages)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        return client

    def acknowledge(self, generation: int, acks: list[Ack]) -> None:
        """Hand in acknowledgements of messages that are durable. From any thread."""
        self._acks.append((generation, acks))
        self._stop.wake()

    def run(self) -> None:
        """Hold the session until asked to stop."""
        while not self._stop.requested:
            if self._connect():
                self._serve()
                self._after_loss()
            self._wait_to_reconnect()

    def finish(self, until: Callable[[], bool], timeout_s: float) -> None:
        """Read no more, send the last acknowledgements, and take leave of the broker.

        Args:
            until: Returns True once no more acknowledgements will come.
            timeout_s: How long to wait for that.
        """
        deadline = time.monotonic() + timeout_s
        while not until() and time.monotonic() < deadline:
            self._send_acks()
            self._stop.drain()
            select.select([self._stop], [], [], 0.05)
        self._send_acks()
        while self._client.want_write() and time.monotonic() < deadline:
            if self._client.loop_write() != MQTTErrorCode.MQTT_ERR_SUCCESS:
                break
            time.sleep(0.001)
        # A session is kept over a DISCONNECT; without one the broker would publish our will.
        self._client.disconnect()
        self._client.loop_write()

    def _connect(self) -> bool:
        """Open a connection and say CONNECT; return whether that much worked."""
        s = self._settings
        self._connection = _Connection(self._connection.generation + 1, time.monotonic())
        self._acks.clear()
        self._client.start_stream()
        try:
            if s.mqtt_username:
                self._client.username_pw_set(s.mqtt_username, self._password())
            if self._tls is not None:
                self._client.use_tls(self._tls.context())
            self._client.connect(s.mqtt_broker, s.mqtt_port, keepalive=KEEPALIVE_S)
        except NotConnectedError as error:
            self._connection.problem = error.problem
            return False
        except (OSError, ValueError) as error:
            if self._tls is not None and self._tls.concerns(error):
                self._connection.problem = self._tls.problem(error)
            else:
                self._connection.problem = Problem(
                    f"cannot reach the broker {s.mqtt_broker}:{s.mqtt_port}: {error}",
                    "is it running? (systemctl status mosquitto)",
                )
            return False
        self._health.opened()
        sock: Any = self._client.socket()
        if sock is not None:
            # Two acknowledgements close together would otherwise wait for each other's (Nagle,
            # delayed ACK): measured, 10 ms in the place of 1.5 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                self._tls.connected(sock.getpeercert(binary_form=True))
        return True

    def _password(self) -> str | None:
        # Read again each time, so that a changed password needs no restart.
        path = self._settings.mqtt_password_file
        if path is None:
            return None
        try:
            return path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeError) as error:
            raise NotConnectedError(unreadable("MQTT_PASSWORD_FILE", path, error)) from error

    def _serve(self) -> None:
        """Turn the loop until the connection is gone or the program should stop."""
        client = self._client
        unread = False
        while not self._stop.requested:
            sock: Any = client.socket()
            if sock is None:
                return
            self._watchdog.beat(LOOP)
            full = self._inbox.full
            if full:
                client.keep_alive_unread()
                self._health.unread()
            self._health.turn()
            if self._tls:
                self._tls.turn()
            readers: list[Any] = [self._stop] if full else [sock, self._stop]
            writers = [sock] if client.want_write() else []
            # TLS may hold decoded bytes that select knows nothing of.
            timeout_s = 0.0 if unread and not full else LOOP_TIMEOUT_S
            readable, writable, _ = select.select(readers, writers, [], timeout_s)
            self._stop.drain()
            self._send_acks()
            if not full and (sock in readable or unread):
                unread = self._read()
            if writable:
                client.loop_write()
            client.loop_misc()

    def _read(self) -> bool:
        """Read while something comes and there is room; return whether more may be waiting."""
        for _ in range(READS_PER_TURN):
            before = self._client.reads
            result = self._client.loop_read()
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._connection.garbled = result == MQTTErrorCode.MQTT_ERR_PROTOCOL
                return False
            if self._client.reads == before:
                return False
            if self._inbox.full:
                return True
        return True

    def _send_acks(self) -> None:
        ready: list[Ack] = []
        while self._acks:
            generation, acks = self._acks.popleft()
            if generation == self._connection.generation:  # of an older one: they come again
                ready += acks
        if ready and self._client.socket() is not None:
            self._client.send_acks(ready)
            self._inbox.acknowledged(len(ready))

    def _on_messages(self, messages: list[Message]) -> None:
        size = sum([len(topic) + len(payload) for topic, payload, *_ in messages])
        received_us = time.time_ns() // 1000
        self._inbox.put(Delivered(self._connection.generation, received_us, messages, size))

    def _on_connect(
        self,
        _client: object,
        _data: object,
        flags: ConnectFlags,
        reason: ReasonCode,
        _properties: object,
    ) -> None:
        if reason.is_failure:
            name = reason.getName()
            remedy = next(
                (r for n, r in _REFUSALS.items() if n in name), "look at the broker's log"
            )
            self._connection.problem = Problem(
                f"the broker refuses the connection: {name}", remedy, refusal=True
            )
            return
        self._connection.accepted = True
        wanted = self._settings.mqtt_topic
        log.info(
            "connected",
            extra=fields(
                broker=f"{self._settings.mqtt_broker}:{self._settings.mqtt_port}",
                client_id=self._settings.mqtt_client_id,
                session_resumed=bool(flags.session_present),
            ),
        )
        if self._known_filters and not flags.session_present:
            # CONNECT has just begun an empty one, which the next CONNACK will call present.
            self._known_filters = self._weak_filters = ()
            self._on_subscribed((), ())
            self._health.session_lost(self._last_reading_us)
        if set(self._known_filters) == set(wanted) and not self._weak_filters:
            # Subscribing again would bring every retained message again.
            self._ready()
            return
        stale = [f for f in self._known_filters if f not in wanted]
        if flags.session_present and stale:
            self._client.unsubscribe(stale)
        _, mid = self._client.subscribe([(f, SUBSCRIBE_QOS) for f in wanted])
        if mid is not None:
            self._connection.subscribing[mid] = wanted

    def _on_subscribe(
        self,
        client: Client,
        _data: object,
        mid: int,
        reasons: list[ReasonCode],
        _properties: object,
    ) -> None:
        filters = self._connection.subscribing.pop(mid, None)
        if filters is None:
            return  # nothing was asked for by this identifier, or it was granted before
        if len(reasons) != len(filters):
            self._connection.problem = Problem(
                f"the broker answers {len(reasons)} of {len(filters)} subscriptions; it is taken "
                "for a refusal (MQTT 3.1.1, section 3.9.3)",
                refusal=True,
            )
            client.disconnect()
            return
        refused = [f for f, r in zip(filters, reasons, strict=False) if r.value >= SUBSCRIBE_FAILED]
        if refused:
            self._connection.problem = Problem(
                f"the broker refuses the subscription to {', '.join(refused)}",
                "check its access list for this user",
                refusal=True,
            )
            client.disconnect()
            return
        weak = [f for f, r in zip(filters, reasons, strict=False) if r.value < SUBSCRIBE_QOS]
        self._known_filters, self._weak_filters = filters, tuple(weak)
        self._health.granted(weak)
        self._on_subscribed(filters, weak)
        log.info("subscribed", extra=fields(filters=filters))
        self._ready()

    def _ready(self) -> None:
        self._failures = 0
        self._health.ready(doubtful=self._flaps >= SESSION_FLAPS_SUSPICIOUS)

    def _after_loss(self) -> None:
        if self._stop.requested:
            return
        lived_s = time.monotonic() - self._connection.began
        self._flaps = self._flaps + 1 if lived_s < SESSION_FLAP_S else 0
        self._connection.problem = self._connection.problem or self._reason()

    def _reason(self) -> Problem:
        """Return why the present connection has ended, where it was not told before."""
        s = self._settings
        if self._connection.accepted:
            reason = self._client.malformed or "the connection to the broker was lost"
            if self._flaps < SESSION_FLAPS_SUSPICIOUS:
                return Problem(reason)
            hint = f"is another client connected with the id {s.mqtt_client_id}?"
            return Problem(f"{reason}; {hint}", "give each client an MQTT_CLIENT_ID of its own")
        if self._tls and (refused := self._tls.refusal(self._client.failure)):
            return refused
        if self._connection.garbled:
            # The library calls it a protocol error, and not a refusal, if CONNACK says that the
            # version is not supported (3.1.1, section 3.2.2.3, code 1).
            return Problem(
                f"what answers at {s.mqtt_broker}:{s.mqtt_port} does not speak MQTT 3.1.1",
                "check MQTT_BROKER, MQTT_PORT and whether it expects TLS (MQTT_TLS_CA_FILE)",
                refusal=True,
            )
        silence = "the broker closed the connection without an answer"
        return Problem(silence, self._tls.doubt() if self._tls else "")

    def _wait_to_reconnect(self) -> None:
        if self._stop.requested:
            return
        self._failures += 1
        ceiling = min(RECONNECT_MAX_S, RECONNECT_FIRST_S * 2.0 ** min(self._failures - 1, 10))
        wait_s = ceiling * (0.5 + 0.5 * self._jitter())
        if self._connection.problem is not None:
            self._health.lost(self._connection.problem)
        log.warning("%s", self._connection.problem, extra=fields(retry_in_s=round(wait_s, 2)))
        deadline = time.monotonic() + wait_s
        while not self._stop.requested and (left_s := deadline - time.monotonic()) > 0:
            self._watchdog.beat(LOOP)
            self._health.turn()
            self._stop.wait(min(left_s, LOOP_TIMEOUT_S))


def _tls(settings: Settings, conditions: Conditions) -> "Tls | None":
    if settings.mqtt_tls_ca_file is None:
        return None
    # Only here: reading certificates takes a library of 8 MB.
    from collector.tls import Tls  # noqa: PLC0415 - see above

    return Tls(settings, conditions)
