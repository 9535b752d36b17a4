"""paho's client, with its slow receiving path replaced. All reliance on its private parts is here.

As it is, paho calls recv for every header byte and wraps, locks and logs each message: 66 µs
a message. Here a large piece is read at once, the PUBLISH packets in it are taken apart by
:mod:`collector.packets`, and every other packet is left to paho. Connecting, TLS, keepalive,
subscribing and writing stay paho's.

The private parts used: ``_packet_read`` (replaced), ``_sock_recv``, ``_sock_send``,
``_packet_handle``, ``_in_packet``, ``_packet_queue``, ``_last_bytes_received``, ``_ping_t``,
``_ssl_context``. The version is bounded in pyproject.toml, and
``tests/test_paho_private_parts.py`` fails when they change.
"""

import ssl
import struct
import time
from collections.abc import Callable

from paho.mqtt import MQTTException
from paho.mqtt.client import Client, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from collector.packets import Message, PacketReader

READ_BYTES = 256 * 1024

PUBACK = 0x40
PUBREC = 0x50
PUBREL = 0x62
PUBCOMP = 0x70

Ack = tuple[int, int]
"""QoS and packet identifier of a message that is durable."""

_ACK_PACKET = struct.Struct("!BBH")


def ack_packets(acks: list[Ack]) -> bytes:
    """Return the packets that say "received" (3.1.1, sections 3.4 and 3.5), in order."""
    pack = _ACK_PACKET.pack
    return b"".join(pack(PUBACK if qos == 1 else PUBREC, 2, mid) for qos, mid in acks)


class FastClient(Client):
    """An MQTT 3.1.1 client with a persistent session that hands on messages in batches.

    Args:
        client_id: Fixed, so that the broker knows the session again.
        max_payload_bytes: Larger payloads are cut while they arrive.
        on_messages: Called with what one read brought; nothing is acknowledged for it.
    """

    def __init__(
        self,
        client_id: str,
        max_payload_bytes: int,
        on_messages: Callable[[list[Message]], None],
    ) -> None:
        super().__init__(
            callback_api_version=CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            protocol=MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._max_payload_bytes = max_payload_bytes
        self._on_messages = on_messages
        self._reader = PacketReader(max_payload_bytes)
        self.reads = 0
        """How many reads brought something: tells an empty socket from a busy one."""
        self.failure: OSError | None = None
        """What ended the present connection's reading or writing, if something did."""

    def start_stream(self) -> None:
        """Forget what the last connection left half-read. Call before each connecting."""
        self._reader = PacketReader(self._max_payload_bytes)
        self.failure = None

    def use_tls(self, context: ssl.SSLContext) -> None:
        """Have the next connection use this context. May be called again and again."""
        self._ssl_context = None  # paho takes a context once, and certificates are renewed
        self.tls_set_context(context)

    @property
    def malformed(self) -> str:
        """Why the stream was given up; empty while it is good."""
        return self._reader.malformed

    def send_acks(self, acks: list[Ack]) -> None:
        """Send the acknowledgements of a batch as one buffer."""
        self._packet_queue(PUBACK, ack_packets(acks), 0, 0)

    def keep_alive_unread(self) -> None:
        """Keep the connection although nothing is read from it at the moment.

        With a full inbox the broker's PINGRESP stands behind messages that are not read yet;
        without this, paho would take the silence for a dead connection. PINGREQs go on.
        """
        self._last_bytes_received = time.monotonic()
        self._ping_t = 0.0

    def _packet_read(self) -> MQTTErrorCode:
        try:
            data = self._sock_recv(READ_BYTES)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError as error:
            self.failure = error
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        if not data:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        self.reads += 1
        self._last_bytes_received = time.monotonic()
        messages, others = self._reader.feed(data)
        if messages:
            self._on_messages(messages)
        for command, body in others:
            result = self._handle_other(command, body)
            if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return result
        return (
            MQTTErrorCode.MQTT_ERR_PROTOCOL
            if self._reader.malformed
            else MQTTErrorCode.MQTT_ERR_SUCCESS
        )

    def _sock_send(self, buf: bytes | bytearray) -> int:
        try:
            return super()._sock_send(buf)
        except BlockingIOError:
            raise
        except OSError as error:
            self.failure = self._alert() or error
            raise

    def _alert(self) -> ssl.SSLError | None:
        """Return the alert that stands unread behind a write that failed.

        In TLS 1.3 the client's handshake is over before the broker has looked at its certificate,
        so CONNECT meets a closed connection, and only a read tells why.
        """
        if self._ssl_context is None:
            return None
        try:
            self._sock_recv(1)
        except ssl.SSLError as error:
            return error
        except OSError:
            return None
        return None

    def _handle_other(self, command: int, body: bytes) -> MQTTErrorCode:
        if command == PUBREL and len(body) == 2:  # noqa: PLR2004 - section 3.6
            # We subscribe with QoS 1, but a broker that sends QoS 2 all the same loses
            # nothing: PUBREC went out after the commit, so the rest is a formality.
            return self._packet_queue(PUBCOMP, bytes((PUBCOMP, 2)) + body, 0, 0)
        self._in_packet = {
            "command": command,
            "have_remaining": 1,
            "remaining_count": [],
            "remaining_mult": 1,
            "remaining_length": len(body),
            "packet": bytearray(body),
            "to_process": 0,
            "pos": 0,
        }
        try:
            return self._packet_handle()
        except (MQTTException, ValueError, struct.error, IndexError):
            # paho's MalformedPacket is an MQTTException; the others come from too short a body.
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
