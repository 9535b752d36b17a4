"""A small HTTP/1.1 server with kept-alive connections, one thread for each.

`http.server` parses headers with the e-mail package and writes in pieces; this
one reads and writes each message once, which is what a benchmark needs of it.
"""

import contextlib
import io
import socket
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

HOST = "127.0.0.1"
READ_BUFFER_BYTES = 256 * 1024
MAX_LINE_BYTES = 64 * 1024
MAX_HEADERS = 100
BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Request:
    """One request with its body, decompressed; header names are lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer; the body is JSON or empty."""

    status: int
    body: bytes = b""
    date_s: float | None = None
    """What the header Date says, seconds since 1970; None for no such header."""


class Stream(Protocol):
    """What is read from a connection."""

    def readline(self, size: int, /) -> bytes: ...
    def read(self, size: int, /) -> bytes: ...


class BadRequestError(Exception):
    """The peer does not speak HTTP/1.1 as far as this server understands it."""


# Returns None to close the connection without an answer.
Handler = Callable[[Request], Reply | None]


class HttpServer:
    """Serves on 127.0.0.1 until stopped; may be started again.

    Attributes:
        accepted: How many connections there were so far.
    """

    def __init__(self, handle: Handler, port: int = 0) -> None:
        self.port = port
        self.accepted = 0
        self._handle = handle
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()

    def start(self) -> None:
        """Listen; return once connections are accepted."""
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((HOST, self.port))
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._spawn(self._accept, listener)

    def stop(self) -> None:
        """Close the port and every connection; return once all threads are gone."""
        with self._lock:
            listener, self._listener = self._listener, None
            connections = list(self._connections)
        if listener is None:
            return
        # A close alone does not wake a thread that blocks on the socket.
        for sock in (listener, *connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        while threads := self._others():
            for thread in threads:
                thread.join()

    def _others(self) -> list[threading.Thread]:
        with self._lock:
            return [t for t in self._threads if t is not threading.current_thread()]

    def _spawn(self, target: Callable[[socket.socket], None], sock: socket.socket) -> None:
        def run() -> None:
            try:
                target(sock)
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="fake-http", daemon=True)
        with self._lock:  # stop() joins what it finds, and that must have begun
            self._threads.add(thread)
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return  # stop() shut the listener down
                with self._lock:
                    if self._listener is not listener:
                        connection.close()
                        return
                    self._connections.add(connection)
                    self.accepted += 1
                self._spawn(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, BadRequestError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                raw = connection.makefile("rb", buffering=0)
                with io.BufferedReader(raw, READ_BUFFER_BYTES) as stream:
                    while (request := read_request(stream)) is not None:
                        reply = self._handle(request)
                        if reply is None:
                            return
                        connection.sendall(encode_reply(reply))
                        if request.headers.get("connection", "").lower() == "close":
                            return
        finally:
            with self._lock:
                self._connections.discard(connection)


def read_request(stream: Stream) -> Request | None:
    """Read one request; None means that the peer is done."""
    line = stream.readline(MAX_LINE_BYTES)
    if not line:
        return None
    try:
        method, target, version = line.decode("latin-1").split()
    except ValueError as error:
        raise BadRequestError(f"request line {line!r}") from error
    if version != "HTTP/1.1":
        raise BadRequestError(version)
    headers = read_headers(stream)
    if "transfer-encoding" in headers:
        raise BadRequestError("chunked bodies are not understood")
    size = headers.get("content-length", "0")
    if not size.isdecimal():
        raise BadRequestError(f"content-length {size!r}")
    length = int(size)
    body = stream.read(length) if length else b""
    if len(body) != length:
        return None  # the peer left in the middle of its request
    if headers.get("content-encoding", "").lower() == "gzip":
        try:
            body = zlib.decompress(body, wbits=31)
        except zlib.error as error:
            raise BadRequestError("not gzip") from error
    return Request(method, target, headers, body)


def read_headers(stream: Stream) -> dict[str, str]:
    """Read up to the empty line; names come out in lower case."""
    headers: dict[str, str] = {}
    while (line := stream.readline(MAX_LINE_BYTES)) not in (b"\r\n", b"\n", b""):
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or len(headers) >= MAX_HEADERS:
            raise BadRequestError(f"header {line!r}")
        headers[name.lower()] = value.strip()
    return headers


def encode_reply(reply: Reply) -> bytes:
    """Return the answer as one piece, so that it leaves in one segment."""
    phrase = HTTPStatus(reply.status).phrase
    date = "" if reply.date_s is None else f"Date: {formatdate(reply.date_s, usegmt=True)}\r\n"
    head = (
        f"HTTP/1.1 {reply.status} {phrase}\r\n"
        "Content-Type: application/json; charset=UTF-8\r\n"
        f"{date}Content-Length: {len(reply.body)}\r\n\r\n"
    )
    return head.encode("latin-1") + reply.body
