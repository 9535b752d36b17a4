"""What the tests of the insert connections stand on: a service, credentials, keys."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forwarder.inserthttp import Answer, InsertConnections, Route
from tests.fakes.http1 import HOST, HttpServer, Reply, Request

DEADLINE_S = 20.0
BODY = b'{"rows":[]}'
OK = Answer(200, b"{}")


class Tokens:
    """An authorization that counts what it is asked for."""

    def __init__(self) -> None:
        self.asked = self.renewals = 0
        self.error: Exception | None = None

    def headers(self) -> Mapping[str, str]:
        self.asked += 1
        return self._current()

    def renewed(self) -> Mapping[str, str]:
        self.renewals += 1
        if self.error is not None:
            raise self.error
        return self._current()

    def _current(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.renewals}"}


class Service:
    """A server that remembers its requests, and answers as it is told."""

    def __init__(self) -> None:
        self.answer: Callable[[Request], Reply | None] = lambda _: Reply(200, b"{}")
        self.requests: list[Request] = []
        self.server = HttpServer(self._handle)

    def _handle(self, request: Request) -> Reply | None:
        self.requests.append(request)
        return self.answer(request)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server.port}/insertAll"


@contextmanager
def connected(route: Route, tokens: Tokens | None = None) -> Iterator[InsertConnections]:
    connections = InsertConnections(route, tokens or Tokens())
    connections.authorize()
    yield connections
    connections.close()


def answering(head: bytes, *, read_body: bool = True, times: int = 1) -> Iterator[str]:
    """Serve each connection with these bytes, and close it."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            for _ in range(times):
                connection, _address = listener.accept()
                with connection:
                    got = connection.recv(65536)
                    while read_body and not got.endswith(BODY):
                        got += connection.recv(65536)
                    connection.sendall(head)
                    connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://{HOST}:{listener.getsockname()[1]}/"
        thread.join()


@dataclass(frozen=True)
class Keys:
    """Files of an authority, of a stranger, and of a server called localhost."""

    authority: Path
    stranger: Path
    server: ssl.SSLContext


def made_keys(directory: Path) -> Keys:
    """Make them anew."""
    for name in ("localhost", "stranger"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
             "-keyout", f"{name}.key", "-out", f"{name}.crt"],
            cwd=directory, check=True, capture_output=True,
        )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "localhost.crt", directory / "localhost.key")
    return Keys(directory / "localhost.crt", directory / "stranger.crt", server)
