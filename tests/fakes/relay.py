"""What may stand between a client and a server: the end of a TLS connection, and a proxy."""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Self

HOST = "127.0.0.1"
PIECE_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024


class Relay:
    """Passes on what it gets to a server on 127.0.0.1, and what that answers.

    Args:
        server_port: The server's.
        tls: Ends TLS here; the server speaks plainly.
    """

    def __init__(self, server_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._server_port = server_port
        self._tls = tls
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        """Start to serve."""
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; return once all threads are gone."""
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type] # a method of ours
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # stopped
            self._spawn(self._serve, connection)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), self._known(client):
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with self._known(client):
                first = self.begin(client)
                with self._known(socket.create_connection((HOST, self._server_port))) as server:
                    server.sendall(first)
                    _pass_on(client, server)

    @contextlib.contextmanager
    def _known(self, sock: socket.socket) -> Iterator[socket.socket]:
        with self._lock:
            self._sockets.add(sock)
        try:
            with sock:
                yield sock
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def begin(self, client: socket.socket) -> bytes:  # noqa: ARG002 - for who speaks first
        """Talk to the client; return what the server gets of it."""
        return b""


class Proxy(Relay):
    """An HTTP proxy that finds every name at the same server.

    It understands CONNECT, and a request that names the whole address; of these only one for each
    connection.

    Attributes:
        heads: Everything up to the first empty line of each connection.
    """

    def __init__(self, server_port: int) -> None:
        super().__init__(server_port)
        self.heads: list[str] = []

    def begin(self, client: socket.socket) -> bytes:
        """Read who is asked for."""
        read = b""
        while b"\r\n\r\n" not in read and len(read) < MAX_HEAD_BYTES:
            read += client.recv(PIECE_BYTES)
        head, _, rest = read.partition(b"\r\n\r\n")
        self.heads.append(head.decode("latin-1"))
        if head.startswith(b"CONNECT "):
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            return rest
        method, address, version = head.split(b"\r\n")[0].split()
        path = b"/" + address.split(b"/", 3)[3]
        return read.replace(
            b" ".join((method, address, version)), b" ".join((method, path, version)), 1
        )


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    """Pass on until either side ends."""
    goes_to = {one: other, other: one}
    while True:
        # What TLS has decrypted already does not show at the socket.
        ready = [s for s in goes_to if isinstance(s, ssl.SSLSocket) and s.pending()]
        for sock in ready or select.select(list(goes_to), [], [])[0]:
            piece = sock.recv(PIECE_BYTES)
            if not piece:
                return
            goes_to[sock].sendall(piece)
