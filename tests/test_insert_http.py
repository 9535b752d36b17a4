"""forwarder/inserthttp.py: one answer for each request, and nothing is sent twice unasked."""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import forwarder.inserthttp
from forwarder.inserthttp import (
    Address,
    Answer,
    InsertConnections,
    Route,
    UnsupportedProxyError,
    by_turns,
    dialled,
)
from tests.fakes.http1 import HOST, Reply, Request
from tests.fakes.relay import Proxy, Relay
from tests.insert_parts import (
    BODY,
    DEADLINE_S,
    OK,
    Keys,
    Service,
    Tokens,
    answering,
    connected,
    made_keys,
)

SOON_S = 0.2
PATIENCE_S = 2.0

DEAD_RESOLVER = """
ip link set lo up
printf 'nameserver 127.0.0.1\\n' > "$1"
mount --bind "$1" /etc/resolv.conf
exec "$2" -c "$3"
"""
WITH_A_DEADLINE = f"""
import socket, time
from forwarder.inserthttp import InsertConnections, Route
from tests.insert_parts import Tokens
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
connections = InsertConnections(Route("http://service.test/"), Tokens())
begun = time.monotonic()
try:
    connections.post(b"", {SOON_S})
except TimeoutError as error:
    print(error)
print(time.monotonic() - begun)
"""


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    made.server.start()
    yield made
    made.server.stop()


@pytest.fixture
def tokens() -> Tokens:
    return Tokens()


@pytest.fixture
def connections(service: Service, tokens: Tokens) -> Iterator[InsertConnections]:
    with connected(Route(service.url), tokens) as made:
        yield made


def unauthorized_without(token: str) -> Callable[[Request], Reply]:
    return lambda request: Reply(200 if request.headers["authorization"] == token else 401, b"{}")


def test_a_request_says_what_it_brings_and_who_sends_it(
    service: Service, connections: InsertConnections
) -> None:
    assert connections.post(BODY, DEADLINE_S) == OK
    (request,) = service.requests
    assert (request.method, request.target, request.body) == ("POST", "/insertAll", BODY)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["authorization"] == "Bearer 0"
    assert request.headers["host"] == f"{HOST}:{service.server.port}"


def test_an_error_is_an_answer_too(service: Service, connections: InsertConnections) -> None:
    service.answer = lambda _: Reply(503, b"busy")
    assert connections.post(BODY, DEADLINE_S) == Answer(503, b"busy")


def test_one_connection_serves_all_that_come_one_after_the_other(
    service: Service, connections: InsertConnections
) -> None:
    for _ in range(5):
        assert connections.post(BODY, DEADLINE_S) == OK
    assert service.server.accepted == 1


def test_requests_at_the_same_time_have_a_connection_each(
    service: Service, connections: InsertConnections
) -> None:
    together = threading.Barrier(4, timeout=DEADLINE_S)

    def all_are_here(_: Request) -> Reply:
        together.wait()
        return Reply(200, b"{}")

    service.answer = all_are_here
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            answers = pool.map(lambda _: connections.post(BODY, DEADLINE_S), range(4))
            assert list(answers) == [OK] * 4
    assert service.server.accepted == 4


def test_a_connection_that_the_service_closed_meanwhile_is_not_used(
    service: Service, connections: InsertConnections
) -> None:
    assert connections.post(BODY, DEADLINE_S) == OK
    service.server.stop()
    service.server.start()
    assert connections.post(BODY, DEADLINE_S) == OK
    assert len(service.requests) == 2


def test_a_connection_that_rested_for_long_is_not_used(
    service: Service, connections: InsertConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.inserthttp, "IDLE_MAX_S", 0.0)
    for _ in range(2):
        assert connections.post(BODY, DEADLINE_S) == OK
    assert service.server.accepted == 2


def test_a_request_whose_answer_is_lost_is_not_sent_again(
    service: Service, connections: InsertConnections
) -> None:
    """It may have been carried out; sending it again is for who knows of the rows."""
    assert connections.post(BODY, DEADLINE_S) == OK  # so that the next finds a used connection
    service.answer = lambda _: None
    with pytest.raises(OSError, match=r"without response|reset"):
        connections.post(BODY, DEADLINE_S)
    assert len(service.requests) == 2
    service.answer = lambda _: Reply(200, b"{}")
    assert connections.post(BODY, DEADLINE_S) == OK


def test_a_service_that_is_not_there_is_an_error(service: Service) -> None:
    service.server.stop()
    with connected(Route(service.url)) as connections, pytest.raises(ConnectionRefusedError):
        connections.post(BODY, DEADLINE_S)


def test_an_answer_that_does_not_come_ends_with_the_deadline(
    service: Service, connections: InsertConnections
) -> None:
    over = threading.Event()
    service.answer = lambda _: Reply(200, b"{}") if over.wait(DEADLINE_S) else None
    with pytest.raises(TimeoutError):
        connections.post(BODY, SOON_S)
    over.set()
    # Its answer must not be taken for that of the next request.
    service.answer = lambda _: Reply(200, b'{"next":1}')
    assert connections.post(BODY, DEADLINE_S) == Answer(200, b'{"next":1}')


@pytest.mark.parametrize(
    ("way", "at_once"), [("plain", 0), ("plain", 20), ("plain", 50), ("proxy", 0), ("proxy", 20)]
)
def test_an_answer_that_trickles_ends_with_the_deadline(way: str, at_once: int) -> None:
    """Each byte comes in time, in the head or in the body, and the last one never would."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + bytes(999)
    over = threading.Event()
    with socket.create_server((HOST, 0)) as listener:

        def trickle() -> None:
            service, _ = listener.accept()
            with service, contextlib.suppress(OSError):
                service.sendall(answer[:at_once])
                for n in range(at_once, len(answer)):
                    service.sendall(answer[n : n + 1])
                    if over.wait(SOON_S / 20):
                        return

        server = threading.Thread(target=trickle)
        server.start()
        url = f"http://{HOST}:{listener.getsockname()[1]}"
        route = Route(f"{url}/") if way == "plain" else Route("https://localhost/", url)
        with connected(route) as connections, pytest.raises(TimeoutError):
            connections.post(BODY, SOON_S)
        over.set()
        server.join()


def test_a_body_that_nobody_reads_ends_with_its_own_deadline() -> None:
    with (
        socket.create_server((HOST, 0)) as listener,
        connected(Route(f"http://{HOST}:{listener.getsockname()[1]}/")) as connections,
    ):
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(connections.post, BODY, 100 * DEADLINE_S)
            service, _ = listener.accept()
            service.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            assert first.result() == OK
        with service, pytest.raises(TimeoutError):
            connections.post(bytes(64 * 1024 * 1024), SOON_S)


class Resolver:
    """Stands in for ``getaddrinfo``: answers what it is told, as soon as it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: Sequence[tuple[str, int]]) -> None:
        self.may_answer = threading.Event()
        self.asked = 0
        self._places = places
        monkeypatch.setattr(socket, "getaddrinfo", self._answer)

    def _answer(self, *_: object, **__: object) -> list[Address]:
        self.asked += 1
        assert self.may_answer.wait(DEADLINE_S)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place) for place in self._places]


@pytest.fixture
def silent() -> Iterator[tuple[str, int]]:
    """An address that lets nobody in, and says so to nobody: its queue is full."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        place = (HOST, listener.getsockname()[1])
        for _ in range(3):
            waiting = opened.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(place)
        yield place


def seconds_until_timeout(connections: InsertConnections, deadline_s: float, match: str) -> float:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=match):
        connections.post(BODY, deadline_s)
    return time.monotonic() - begun


def test_a_name_that_is_not_resolved_in_time_ends_with_the_deadline_and_is_asked_for_once(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(monkeypatch, [(HOST, service.server.port)])
    with connected(Route("http://service.test/insertAll")) as connections:
        with ThreadPoolExecutor(4) as pool:
            ends = [
                pool.submit(seconds_until_timeout, connections, SOON_S, "service.test was not")
                for _ in range(8)
            ]
            assert max(end.result() for end in ends) < PATIENCE_S
        assert resolver.asked == 1
        resolver.may_answer.set()
        assert connections.post(BODY, DEADLINE_S) == OK


def test_a_name_that_does_not_exist_is_asked_for_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    with connected(Route("http://service.test/insertAll")) as connections:
        with monkeypatch.context() as offline:
            offline.setattr(socket, "getaddrinfo", unknown)
            with pytest.raises(socket.gaierror, match="Temporary"):
                connections.post(BODY, DEADLINE_S)
        Resolver(monkeypatch, [(HOST, service.server.port)]).may_answer.set()
        assert connections.post(BODY, DEADLINE_S) == OK


def test_silent_name_servers_hold_a_request_for_its_deadline_only(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-n", "-m", "sh", "-ec", DEAD_RESOLVER, "sh", tmp_path / "resolv.conf",
         sys.executable, WITH_A_DEADLINE],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "unshare failed" in done.stderr:
        pytest.skip("only root can have name servers of its own")
    message, seconds = done.stdout.splitlines()
    assert "service.test was not resolved in time" in message
    assert float(seconds) < PATIENCE_S


def test_a_host_with_many_silent_addresses_has_one_deadline_for_all(
    silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Resolver(monkeypatch, [silent] * 20).may_answer.set()
    with connected(Route("http://service.test/insertAll")) as connections:
        assert seconds_until_timeout(connections, SOON_S, "timed out") < PATIENCE_S


def test_a_silent_address_leaves_time_for_the_next(
    service: Service, silent: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    Resolver(monkeypatch, [silent, (HOST, service.server.port)]).may_answer.set()
    with connected(Route("http://service.test/insertAll")) as connections:
        assert connections.post(BODY, PATIENCE_S) == OK


def test_a_family_that_the_kernel_lacks_is_passed_over(service: Service) -> None:
    none = socket.AF_APPLETALK if hasattr(socket, "AF_APPLETALK") else 5
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        refusing = closed.getsockname()
        stream = socket.SOCK_STREAM
        unknown: Address = (socket.AddressFamily(none), stream, 0, "", refusing)
        there: Address = (socket.AF_INET, stream, 0, "", (HOST, service.server.port))
        away: Address = (socket.AF_INET, stream, 0, "", refusing)
        ends_at = time.monotonic() + PATIENCE_S
        dialled([away, unknown, there], ends_at).close()
        with pytest.raises(ConnectionRefusedError):
            dialled([away, unknown], ends_at)


def test_the_two_families_of_addresses_take_turns() -> None:
    def address(family: socket.AddressFamily, number: int) -> Address:
        return (family, socket.SOCK_STREAM, 0, "", number)

    v6 = [address(socket.AF_INET6, n) for n in range(4)]
    v4 = [address(socket.AF_INET, n) for n in range(2)]
    assert by_turns([*v6, *v4]) == [v6[0], v4[0], v6[1], v4[1], v6[2], v6[3]]


def test_a_proxys_slow_answer_leaves_the_handshake_what_is_left() -> None:
    over = threading.Event()
    with socket.create_server((HOST, 0)) as listener:

        def answer_late() -> None:
            service, _ = listener.accept()
            with service:
                over.wait(0.6 * PATIENCE_S)
                service.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                over.wait(DEADLINE_S)

        server = threading.Thread(target=answer_late)
        server.start()
        route = Route("https://localhost/", f"http://{HOST}:{listener.getsockname()[1]}")
        with connected(route) as connections:
            assert seconds_until_timeout(connections, PATIENCE_S, "timed out") < 1.4 * PATIENCE_S
        over.set()
        server.join()


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"",
    ],
)
def test_half_an_answer_is_an_error(head: bytes) -> None:
    for url in answering(head):
        with connected(Route(url)) as connections, pytest.raises(OSError, match=r".+"):
            connections.post(BODY, DEADLINE_S)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_each_form_of_an_answer_is_read_whole(head: bytes) -> None:
    for url in answering(head):
        with connected(Route(url)) as connections:
            assert connections.post(BODY, DEADLINE_S) == OK


def test_a_connection_that_the_service_will_close_is_not_used_again() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    for url in answering(head, times=2):
        with connected(Route(url)) as connections:
            for _ in range(2):
                assert connections.post(BODY, DEADLINE_S) == OK


@pytest.mark.parametrize("form", ["Content-Length: 9", "Connection: close"])
def test_an_answer_without_end_is_an_error(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder.inserthttp, "ANSWER_MAX_BYTES", 8)
    head = f"HTTP/1.1 200 OK\r\n{form}\r\n\r\n123456789".encode()
    for url in answering(head):
        with connected(Route(url)) as connections, pytest.raises(OSError, match="longer than 8"):
            connections.post(BODY, DEADLINE_S)


def test_an_answer_that_comes_before_everything_was_sent_is_heard() -> None:
    head = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    for url in answering(head, read_body=False):
        with connected(Route(url)) as connections:
            # More than the sockets' buffers take, so that the sender is stopped in the middle.
            assert connections.post(bytes(64 * 1024 * 1024), DEADLINE_S) == Answer(413, b"")


def test_refused_credentials_are_renewed_once_and_the_request_sent_again(
    service: Service, connections: InsertConnections, tokens: Tokens
) -> None:
    service.answer = unauthorized_without("Bearer 1")
    assert connections.post(BODY, DEADLINE_S) == OK
    assert connections.post(BODY, DEADLINE_S) == OK
    assert tokens.renewals == 1
    assert [r.headers["authorization"][-1] for r in service.requests] == ["0", "1", "1"]


def test_credentials_that_stay_refused_are_renewed_once_for_each_delivery(
    service: Service, connections: InsertConnections, tokens: Tokens
) -> None:
    service.answer = lambda _: Reply(401, b"no")
    for _ in range(3):
        assert connections.post(BODY, DEADLINE_S) == Answer(401, b"no")
    assert tokens.renewals == 1
    connections.authorize()
    assert connections.post(BODY, DEADLINE_S) == Answer(401, b"no")
    assert tokens.renewals == 2


def test_requests_that_are_refused_together_renew_the_credentials_once(
    service: Service, connections: InsertConnections, tokens: Tokens
) -> None:
    together = threading.Barrier(4, timeout=DEADLINE_S)

    def refuse_the_old(request: Request) -> Reply:
        if request.headers["authorization"] == "Bearer 0":
            together.wait()
            return Reply(401, b"{}")
        return Reply(200, b"{}")

    service.answer = refuse_the_old
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: connections.post(BODY, DEADLINE_S), range(4))
        assert list(answers) == [OK] * 4
    assert tokens.renewals == 1


def test_what_renewing_raises_is_raised(
    service: Service, connections: InsertConnections, tokens: Tokens
) -> None:
    service.answer = lambda _: Reply(401, b"no")
    tokens.error = LookupError("revoked")
    with pytest.raises(LookupError, match="revoked"):
        connections.post(BODY, DEADLINE_S)
    # The others of the delivery do not try it again; they have their answer.
    assert connections.post(BODY, DEADLINE_S) == Answer(401, b"no")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return made_keys(tmp_path_factory.mktemp("keys"))


def test_rows_go_over_tls_to_who_can_prove_the_name(service: Service, keys: Keys) -> None:
    with Relay(service.server.port, keys.server) as front:
        route = Route(f"https://localhost:{front.port}/insertAll", "", str(keys.authority))
        with connected(route) as connections:
            for _ in range(3):
                assert connections.post(BODY, DEADLINE_S) == OK
    assert service.server.accepted == 1


@pytest.mark.parametrize("wrong", ["authority", "name", "system"])
def test_nothing_is_sent_to_who_cannot(service: Service, keys: Keys, wrong: str) -> None:
    host = HOST if wrong == "name" else "localhost"
    authority = {"authority": str(keys.stranger), "name": str(keys.authority), "system": ""}[wrong]
    with Relay(service.server.port, keys.server) as front:
        route = Route(f"https://{host}:{front.port}/insertAll", "", authority)
        with connected(route) as connections, pytest.raises(ssl.SSLCertVerificationError):
            connections.post(BODY, DEADLINE_S)
    assert service.requests == []


def test_a_proxy_tunnels_tls_and_is_shown_only_its_own_password(
    service: Service, keys: Keys
) -> None:
    with Relay(service.server.port, keys.server) as front, Proxy(front.port) as proxy:
        route = Route(
            "https://localhost/insertAll", f"http://me:p%40ss@{HOST}:{proxy.port}",
            str(keys.authority),
        )  # fmt: skip
        with connected(route) as connections:
            for _ in range(2):
                assert connections.post(BODY, DEADLINE_S) == OK
        (head,) = proxy.heads
    assert head.startswith("CONNECT localhost:443 ")
    assert "Proxy-Authorization: Basic bWU6cEBzcw==" in head
    assert "Bearer" not in head
    assert "proxy-authorization" not in service.requests[0].headers
    assert service.requests[0].headers["host"] == "localhost"


def test_a_proxy_is_told_a_plain_services_whole_address(service: Service) -> None:
    with Proxy(service.server.port) as proxy:
        route = Route("http://far.test/insertAll", f"http://me:secret@{HOST}:{proxy.port}")
        with connected(route) as connections:
            assert connections.post(BODY, DEADLINE_S) == OK
        (head,) = proxy.heads
    assert head.startswith("POST http://far.test/insertAll HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in head
    assert service.requests[0].headers["host"] == "far.test"


def test_a_proxy_that_refuses_is_an_error() -> None:
    for url in answering(b"HTTP/1.1 407 Who are you\r\n\r\n", read_body=False):
        route = Route("https://localhost/insertAll", url)
        with connected(route) as connections, pytest.raises(OSError, match="407"):
            connections.post(BODY, DEADLINE_S)


@pytest.mark.parametrize("proxy", ["https://proxy:3128", "socks5h://proxy:1080"])
def test_a_proxy_that_speaks_something_else_is_refused_at_once(proxy: str) -> None:
    with pytest.raises(UnsupportedProxyError, match=proxy.rpartition(":")[0]):
        InsertConnections(Route("https://localhost/insertAll", proxy), Tokens())
