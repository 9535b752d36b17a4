"""The private parts of paho that collector/paho_client.py relies on are what they were."""

import ast
import inspect
import re
import socket
import textwrap

from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode

import collector.paho_client
from collector.packets import Message
from collector.paho_client import FastClient, ack_packets

CONNACK = b"\x20\x02\x00\x00"


class _Wire:
    """A client on one end of a socket pair, as after its CONNECT."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.client = FastClient("test", 1000, self.messages.extend)
        self.far, near = socket.socketpair()
        near.settimeout(0)
        self.far.settimeout(2)
        self.client._sock = near  # noqa: SLF001 - what connect() would set

    def receive(self, data: bytes) -> MQTTErrorCode:
        self.far.sendall(data)
        return self.client.loop_read()

    def close(self) -> None:
        self.client._sock_close()  # noqa: SLF001 - as at the end of a connection
        self.far.close()


def test_the_names_exist_with_the_signatures_that_are_used() -> None:
    client = paho.Client
    assert list(inspect.signature(client._packet_read).parameters) == ["self"]  # noqa: SLF001
    assert list(inspect.signature(client._packet_handle).parameters) == ["self"]  # noqa: SLF001
    assert list(inspect.signature(client._sock_recv).parameters) == ["self", "bufsize"]  # noqa: SLF001
    assert list(inspect.signature(client._sock_send).parameters) == ["self", "buf"]  # noqa: SLF001
    queue = list(inspect.signature(client._packet_queue).parameters)  # noqa: SLF001
    assert queue[:5] == ["self", "command", "packet", "mid", "qos"]
    instance = FastClient("test", 1000, lambda _: None)
    for name in ("_in_packet", "_last_bytes_received", "_ping_t", "_out_packet"):
        assert name in vars(instance), name
    assert set(instance._in_packet) == {  # noqa: SLF001
        "command",
        "have_remaining",
        "remaining_count",
        "remaining_mult",
        "remaining_length",
        "packet",
        "to_process",
        "pos",
    }


def test_paho_reads_by_packet_read_and_handles_what_is_no_publish() -> None:
    wire = _Wire()
    connected: list[bool] = []
    wire.client.on_connect = lambda _c, _u, flags, *_: connected.append(flags.session_present)
    publish = b"\x32\x07\x00\x01t\x00\x07hi"
    assert wire.receive(CONNACK + publish) == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert connected == [False]
    assert wire.messages == [Message(b"t", b"hi", 1, retained=False, mid=7, size=2)]
    wire.close()


def test_acknowledgements_go_out_as_one_buffer_in_order() -> None:
    wire = _Wire()
    wire.client.send_acks([(1, 7), (1, 8), (2, 9)])
    assert wire.far.recv(100) == b"\x40\x02\x00\x07\x40\x02\x00\x08\x50\x02\x00\x09"
    assert ack_packets([]) == b""
    wire.close()


def test_nothing_is_acknowledged_by_itself() -> None:
    wire = _Wire()
    wire.receive(CONNACK + b"\x32\x07\x00\x01t\x00\x07hi")
    wire.far.settimeout(0.2)
    try:
        answer = wire.far.recv(100)
    except TimeoutError:
        answer = b""
    assert answer == b""
    wire.close()


def test_a_qos_2_message_is_completed_although_nobody_asked_for_qos_2() -> None:
    wire = _Wire()
    wire.receive(CONNACK + b"\x34\x07\x00\x01t\x00\x07hi")
    assert wire.messages[0].qos == 2
    wire.client.send_acks([(2, 7)])
    assert wire.far.recv(100) == b"\x50\x02\x00\x07"
    wire.receive(b"\x62\x02\x00\x07")
    assert wire.far.recv(100) == b"\x70\x02\x00\x07"
    wire.close()


def test_a_malformed_packet_ends_the_connection_and_says_why() -> None:
    wire = _Wire()
    assert wire.receive(CONNACK + b"\x36\x05\x00\x01t\x00\x07") == MQTTErrorCode.MQTT_ERR_PROTOCOL
    assert "QoS 3" in wire.client.malformed
    assert wire.client.socket() is None
    wire.far.close()


def test_an_unread_connection_is_kept_alive_by_pings() -> None:
    wire = _Wire()
    wire.receive(CONNACK)
    wire.client._keepalive = 1  # noqa: SLF001 - no test should last a minute
    for _ in range(3):
        wire.client._last_msg_out -= 2  # noqa: SLF001 - two seconds later
        wire.client.keep_alive_unread()
        assert wire.client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert wire.far.recv(100) == b"\xc0\x00"
    assert wire.client.socket() is not None
    wire.close()


class _Connected(_Wire):
    """The same, behind a CONNACK."""

    def __init__(self) -> None:
        super().__init__()
        self.receive(CONNACK)


def test_each_private_part_that_the_adapter_names_exists_in_paho() -> None:
    text = collector.paho_client.__doc__ or ""
    listed = text.partition("The private parts used:")[2].partition("The version is")[0]
    named = re.findall(r"``(_\w+)``", listed)
    assert len(named) == 9
    source = inspect.getsource(paho.Client)
    for name in named:
        assert re.search(rf"\bself\.{name}\b", source), f"paho no longer has {name}"


def test_the_adapter_uses_no_private_part_that_it_does_not_name() -> None:
    text = collector.paho_client.__doc__ or ""
    tree = ast.parse(textwrap.dedent(inspect.getsource(FastClient)))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    inherited = {name for name in used if name.startswith("_") and hasattr(paho.Client, name)}
    inherited |= used & {"_in_packet", "_last_bytes_received", "_ping_t"}
    assert inherited
    assert all(f"``{name}``" in text for name in inherited), inherited


def test_paho_reads_by_the_method_that_is_replaced_and_by_no_other() -> None:
    assert "self._packet_read()" in inspect.getsource(paho.Client.loop_read)
    assert FastClient._packet_read is not paho.Client._packet_read  # noqa: SLF001
    callers = [
        name
        for name, method in inspect.getmembers(paho.Client, inspect.isfunction)
        if "_sock_recv(" in inspect.getsource(method) and name != "_sock_recv"
    ]
    assert callers == ["_packet_read"], "paho reads from the socket somewhere else too"


def test_a_socket_without_data_is_no_error_and_a_closed_one_is_a_loss() -> None:
    wire = _Connected()
    reads = wire.client.reads
    assert wire.client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert wire.client.reads == reads
    wire.far.close()
    assert wire.client.loop_read() == MQTTErrorCode.MQTT_ERR_CONN_LOST
    assert wire.client.socket() is None


def test_a_new_connection_forgets_what_the_last_one_left_half_read() -> None:
    wire = _Connected()
    wire.receive(b"\x32\x07\x00\x01t")
    wire.client.start_stream()
    wire.receive(b"\x32\x07\x00\x01t\x00\x08yo")
    assert [m.payload for m in wire.messages] == [b"yo"]
    wire.close()


def test_every_small_packet_of_a_broker_that_is_mad_is_survived() -> None:
    for command in range(256):
        if command & 0xF0 == 0x30:
            continue  # PUBLISH is the reader's
        for body in (b"", b"\0", b"\xff", b"\0\x01", b"\xff\xff", b"\0\x01\x80", b"\xff" * 5):
            wire = _Connected()
            result = wire.receive(bytes((command, len(body))) + body)
            assert isinstance(result, MQTTErrorCode)
            wire.close()


@settings(max_examples=300)
@given(data=st.binary(min_size=1, max_size=60))
def test_any_bytes_of_a_broker_are_survived(data: bytes) -> None:
    wire = _Connected()
    assert isinstance(wire.receive(data), MQTTErrorCode)
    wire.close()


def test_an_http_server_in_place_of_the_broker_is_a_protocol_error() -> None:
    wire = _Wire()
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    assert wire.receive(answer + b"x" * 200) == MQTTErrorCode.MQTT_ERR_PROTOCOL
    wire.close()


def test_the_session_is_kept_and_acknowledgements_are_ours() -> None:
    client = FastClient("the-id", 1000, lambda _: None)
    assert client._manual_ack is True  # noqa: SLF001
    assert client._clean_session is False  # noqa: SLF001
    assert client._client_id == b"the-id"  # noqa: SLF001
    assert client._protocol == paho.MQTTv311  # noqa: SLF001
