"""The connections that rows are inserted over: HTTP/1.1, some side by side, each used again.

A request of 500 rows costs 0.9 ms of processor time by requests, and 0.1 ms by the standard
library's ``http.client``; the rows themselves take 0.5 ms. What requests does besides is done
here as far as it matters: TLS with verification, a proxy, a connection that the other side has
closed meanwhile. Redirects are not followed: the service has none, and a POST would become a GET.

Nothing of Google's is known here; what allows to insert comes from an :class:`Authorization`.
"""

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from forwarder.sharedcall import SharedCall

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ANSWER_MAX_BYTES = 16 * 1024 * 1024
"""The errors of a request's rows have room in it; what is longer is no answer of the service."""

IDLE_MAX_S = 50.0
"""A connection that rested for longer is not used again: a router on the way may have forgotten
it without a word, and the rows would wait for their deadline."""

Address: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""What ``socket.getaddrinfo`` answers with."""

_PORTS = {"http": http.client.HTTP_PORT, "https": http.client.HTTPS_PORT}


class Authorization(Protocol):
    """What allows to insert. Raises what it likes; that is for the caller of the connections."""

    def headers(self) -> Mapping[str, str]:
        """Return the headers that carry valid credentials; have new ones if need be."""

    def renewed(self) -> Mapping[str, str]:
        """Return others, because the service refused the last ones."""


class UnsupportedProxyError(ValueError):
    """The proxy speaks something else than plain HTTP."""


@dataclass(frozen=True, slots=True)
class Route:
    """The way to the service.

    Attributes:
        url: What is posted to.
        proxy: ``http://[user:password@]host:port``; empty for none.
        authorities: File or directory of the certificates of those that may vouch for the
            service; empty for the system's own.
    """

    url: str
    proxy: str = ""
    authorities: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service answered."""

    status: int
    body: bytes


class InsertConnections:
    """Posts to one URL. May be used by several threads, each has a connection to itself.

    Args:
        route: The way there.
        authorization: Goes with each request.

    Raises:
        UnsupportedProxyError: Of the constructor.
        OSError: Of the constructor: the authorities cannot be read.
    """

    def __init__(self, route: Route, authorization: Authorization) -> None:
        self._route = route
        self._authorization = authorization
        self._headers: Mapping[str, str] = {}
        self._may_renew = False
        self._renewing = threading.Lock()
        self._addresses: SharedCall[Sequence[Address]] = SharedCall("resolve")
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()
        url = urlsplit(route.url)
        self._target = url.path
        self._proxy_headers: dict[str, str] = {}
        self._context = _context(route.authorities) if url.scheme == "https" else None
        if route.proxy:
            proxy = urlsplit(route.proxy)
            if proxy.scheme != "http":
                raise UnsupportedProxyError(f"{proxy.scheme}://{proxy.hostname}")
            self._proxy_headers = proxy_headers(proxy)
            if self._context is None:
                # A plain proxy is told the whole address (RFC 9112, section 3.2.2).
                self._target = route.url

    def close(self) -> None:
        """Close what is idle; the next request opens connections again."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop()[0].close()

    def authorize(self) -> None:
        """Have valid credentials for the requests to come; before each delivery.

        Raises:
            Exception: What the authorization raises.
        """
        self._headers = self._authorization.headers()
        self._may_renew = True

    def post(self, body: bytes, deadline_s: float) -> Answer:
        """Send one request and wait for its answer.

        A request that is answered with 401 is sent once more, with renewed credentials.

        Args:
            body: JSON.
            deadline_s: For everything together, from the host's name to the answer's last byte,
                however slowly it comes. A renewal of the credentials is not in it, and the
                request that follows one has as much again.

        Raises:
            OSError: There is no connection, it broke, or the deadline has passed. The request
                may have been carried out all the same, unless there was no connection.
            Exception: What the authorization raises.
        """
        headers = self._headers
        answer = self._exchange(body, headers, deadline_s)
        if answer.status != HTTPStatus.UNAUTHORIZED:
            return answer
        renewed = self._renewed(headers)
        return answer if renewed == headers else self._exchange(body, renewed, deadline_s)

    def _renewed(self, refused: Mapping[str, str]) -> Mapping[str, str]:
        """Return other headers than those that were refused; the same where there are none."""
        with self._renewing:
            # The first of those that were refused renews for all, once in a delivery.
            if self._headers is refused and self._may_renew:
                self._may_renew = False
                self._headers = self._authorization.renewed()
            return self._headers

    def _exchange(self, body: bytes, headers: Mapping[str, str], deadline_s: float) -> Answer:
        ends_at = time.monotonic() + deadline_s
        connection = self._connected(ends_at)
        sent = keep = False
        try:
            _limit(connection.sock, ends_at)
            # A server may answer, and hang up, before it has read everything.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request("POST", self._target, body, self._all_headers(headers))
                sent = True
            response = connection.getresponse()
            content = response.read(ANSWER_MAX_BYTES)
            # Without a length, only the end of the connection tells that it was all.
            if not response.isclosed() and (response.length is not None or response.read(1)):
                raise ConnectionError(
                    f"the answer was cut off after {len(content)} bytes, or is longer than "
                    f"{ANSWER_MAX_BYTES}"
                )
            keep = sent and not response.will_close
            return Answer(response.status, content)
        except http.client.HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            if keep:
                self._idle.append((connection, time.monotonic()))
            else:
                connection.close()

    def _all_headers(self, credentials: Mapping[str, str]) -> dict[str, str]:
        own = {"Content-Type": "application/json", "User-Agent": "sluice"}
        if self._context is None:
            own |= self._proxy_headers  # with TLS the proxy gets them before
        return {**own, **credentials}

    def _connected(self, ends_at: float) -> http.client.HTTPConnection:
        """Return a connection that is open as far as can be known, the last one used first."""
        with contextlib.suppress(IndexError):
            while True:
                connection, since = self._idle.pop()
                if time.monotonic() - since < IDLE_MAX_S and not _readable(connection):
                    _read_until(connection, ends_at)
                    return connection
                connection.close()
        connection = self._new()
        _read_until(connection, ends_at)  # the proxy's answer too
        opening: Any = connection  # its own way gives each address of the host the whole time
        opening._create_connection = partial(self._dial, ends_at)  # noqa: SLF001
        try:
            connection.connect()
        except BaseException as error:
            connection.close()
            if isinstance(error, http.client.HTTPException):  # the proxy's answer
                raise ConnectionError(f"{type(error).__name__}: {error}") from error
            raise
        return connection

    def _dial(self, ends_at: float, host: tuple[str, int], *_: object) -> socket.socket:
        try:
            addresses = self._addresses.result(
                lambda: socket.getaddrinfo(*host, type=socket.SOCK_STREAM),
                ends_at - time.monotonic(),
            )
        except TimeoutError:
            raise TimeoutError(
                f"the name {host[0]} was not resolved in time; is the network up? try: "
                f"getent ahosts {host[0]}"
            ) from None
        return dialled(addresses, ends_at)

    def _new(self) -> http.client.HTTPConnection:
        url = urlsplit(self._route.url)
        proxy = urlsplit(self._route.proxy)
        goal = (url.hostname or "", url.port or _PORTS[url.scheme])
        host, port = (proxy.hostname or "", proxy.port or _PORTS["http"]) if proxy.netloc else goal
        if self._context is None:
            return http.client.HTTPConnection(host, port)
        connection = http.client.HTTPSConnection(host, port, context=self._context)
        if proxy.netloc:
            connection.set_tunnel(*goal, self._proxy_headers)
        return connection


def proxy_headers(proxy: SplitResult) -> dict[str, str]:
    """Return what tells a proxy who asks; nothing where its URL names no user."""
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode('ascii')}"}


def _context(authorities: str) -> ssl.SSLContext:
    if not authorities:
        return ssl.create_default_context()
    if Path(authorities).is_dir():
        return ssl.create_default_context(capath=authorities)
    return ssl.create_default_context(cafile=authorities)


def dialled(addresses: Sequence[Address], ends_at: float) -> socket.socket:
    """Return a socket that is connected to the first of ``addresses`` that answers.

    Each has half of the time that is left, the last one all of it: on a slow link nothing less
    would do for a good address, and one that is silent leaves time for another.

    Raises:
        OSError: None answers in time: the error of the first one.
    """
    first_error: OSError | None = None
    for number, (family, kind, protocol, _, place) in enumerate(by_turns(addresses), 1):
        tried = None
        try:
            tried = socket.socket(family, kind, protocol)  # this kernel may not have the family
            _limit(tried, ends_at, among=1 if number == len(addresses) else 2)
            tried.connect(place)
            _limit(tried, ends_at)
        except OSError as error:
            if tried is not None:
                tried.close()
            first_error = first_error or error
        else:
            return tried
    raise first_error or OSError("the host has no address")


def by_turns(addresses: Sequence[Address]) -> list[Address]:
    """Return the addresses so that IPv4 and IPv6 take turns, otherwise in their order.

    Where one of the two is broken, it is so for all of its addresses.
    """
    met: Counter[socket.AddressFamily] = Counter()

    def turn(address: Address) -> int:
        met[address[0]] += 1
        return met[address[0]]

    return sorted(addresses, key=turn)


class _Pieces(io.RawIOBase):
    """What comes over a socket; each piece has what is left of the time.

    A socket's own timeout begins anew with each byte, and a byte a second is an answer that
    never ends.

    Args:
        connected: The socket.
        ends_at: When to give up, of ``time.monotonic``.
    """

    def __init__(self, connected: socket.socket, ends_at: float) -> None:
        self._socket = connected
        # As long as this is open, a closed connection's socket stays readable.
        self._raw = connected.makefile("rb", buffering=0)
        self._ends_at = ends_at

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return itself as the response wants it, which takes this for the socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        _limit(self._socket, self._ends_at)
        got = self._raw.readinto(buffer)
        # After a proxy's answer comes the TLS handshake, which asks nobody for the time.
        _limit(self._socket, self._ends_at)
        return got

    def close(self) -> None:
        self._raw.close()
        super().close()


def _read_until(connection: http.client.HTTPConnection, ends_at: float) -> None:
    """Let the connection's next responses be read until ``ends_at``, and no longer."""
    response: Any = partial(_response, ends_at)
    connection.response_class = response


def _response(
    ends_at: float, connected: socket.socket, *, method: str | None
) -> http.client.HTTPResponse:
    source: Any = _Pieces(connected, ends_at)
    return http.client.HTTPResponse(source, method=method)


def _limit(connected: socket.socket, ends_at: float, *, among: int = 1) -> None:
    """Give what comes next until ``ends_at``; a part of that, if it is one of several."""
    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    connected.settimeout(left_s / among)


def _readable(connection: http.client.HTTPConnection) -> bool:
    """Return whether something came unasked: the other side's good-bye, or nonsense."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
