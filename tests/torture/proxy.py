"""A TCP proxy between a program and a service, which breaks connections in every known way.

It knows nothing of what passes: a test decides when a fault begins and when it ends, by what
it sees at the service. Two threads per connection, one for each direction.
"""

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from tests.harness.waiting import HOST, free_port

PIECE_BYTES = 64 * 1024
_LINGER_NOT = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: close() says RST, as a host does that knows no such connection."""

_TRICKLE_S = 1.0


class Fault(Enum):
    """What happens to bytes, and to new connections."""

    NONE = "none"
    REFUSE = "refused"
    """Nobody listens; what was open is cut."""
    CUT_BEFORE = "cut before the request"
    """A new connection is taken, and cut before a byte has passed; so are the open ones."""
    CUT_DURING = "cut during the request"
    """Each connection is cut once a number of bytes has passed to the service."""
    LOSE_ANSWERS = "the answer lost"
    """Requests pass, answers vanish."""
    SILENCE = "silence"
    """The connections stay open, and nothing passes; cut when the fault ends."""
    LATE = "held up"
    """The same, but all that was held arrives when the fault ends, whoever has left meanwhile."""
    TRICKLE = "a byte a second"
    TRICKLE_BACK = "answers at a byte a second"


_CLOSE_OPEN = {Fault.REFUSE, Fault.CUT_BEFORE}


@dataclass(eq=False)
class _Link:
    """One connection, as two sockets."""

    near: socket.socket
    far: socket.socket
    budget: int = 0
    """Of CUT_DURING: how many bytes may still pass to the service."""
    ended: int = 0
    """How many of its two directions have ended."""
    threads: list[threading.Thread] = field(default_factory=list)

    def cut(self) -> None:
        """Have both directions end; whoever is the last to, closes with RST."""
        for sock in (self.near, self.far):
            # Wakes a reader at once, and says nothing on the wire.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)

    def close(self, *, rudely: bool) -> None:
        for sock in (self.near, self.far):
            with contextlib.suppress(OSError):
                if rudely:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                sock.close()


class Proxy:
    """Listens on a port of its own, for as long as the context lasts.

    Args:
        target: The port of the service; may be set later, before the first connection.
    """

    def __init__(self, target: int = 0) -> None:
        self.target = target
        self.port = free_port()
        self.fault = Fault.NONE
        self.cuts = 0
        """How many connections CUT_DURING has cut."""
        self.swallowed = 0
        """Bytes of answers that LOSE_ANSWERS has lost."""
        self._cut_after = 0
        self._links: set[_Link] = set()
        self._rude: set[_Link] = set()
        self._changed = threading.Condition()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    @property
    def address(self) -> str:
        """What a program is told to connect to."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        """Listen."""
        self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut everything, and wait for the threads."""
        self._stop_listening()
        with self._changed:
            self.fault = Fault.NONE
            links = list(self._links)
            self._changed.notify_all()
        self._cut(links)
        for link in links:
            for thread in link.threads:
                thread.join()

    def begin(self, fault: Fault, *, cut_after_bytes: int = 0) -> None:
        """Let ``fault`` begin, for what is open and for what will be.

        Args:
            fault: Which one.
            cut_after_bytes: Of CUT_DURING: how much of the requests passes first.
        """
        with self._changed:
            self.fault = fault
            self._cut_after = cut_after_bytes
            links = list(self._links)
            for link in links:
                link.budget = cut_after_bytes
            self._changed.notify_all()
        if fault is Fault.REFUSE:
            self._stop_listening()
        if fault in _CLOSE_OPEN:
            self._cut(links)

    def mend(self, *, cut: bool | None = None) -> None:
        """End the fault.

        Args:
            cut: Whether the open connections are cut; where it is left open, after the faults
                that a real connection would not survive.
        """
        with self._changed:
            old, self.fault = self.fault, Fault.NONE
            links = list(self._links)
            doomed = old in {Fault.LOSE_ANSWERS, Fault.SILENCE} if cut is None else cut
            if doomed:
                self._rude.update(links)
            self._changed.notify_all()
        if doomed:
            self._cut(links)
        if old is Fault.REFUSE:
            self._listen()

    def _listen(self) -> None:
        listener = socket.create_server((HOST, self.port), backlog=64)
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=[listener], name="accept")
        self._acceptor.start()

    def _stop_listening(self) -> None:
        if self._listener is not None and self._acceptor is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join()
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, self.target), timeout=5.0)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            self._begin_link(near, far)

    def _begin_link(self, near: socket.socket, far: socket.socket) -> None:
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(near, far, self._cut_after)
        with self._changed:
            self._links.add(link)
            doomed = self.fault is Fault.CUT_BEFORE
        link.threads = [
            threading.Thread(target=self._pump, args=[link, near, far], name="requests"),
            threading.Thread(target=self._pump, args=[link, far, near], name="answers"),
        ]
        if doomed:
            self._cut([link])
        for thread in link.threads:
            thread.start()

    def _cut(self, links: list[_Link]) -> None:
        with self._changed:
            self._rude.update(links)
            self._changed.notify_all()
        for link in links:
            link.cut()

    def _pump(self, link: _Link, source: socket.socket, target: socket.socket) -> None:
        up = source is link.near
        try:
            while data := source.recv(PIECE_BYTES):
                if not self._pass(link, data, target, up=up):
                    break
            if link not in self._rude:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            self._cut([link])
        with self._changed:
            link.ended += 1
            last = link.ended == len(link.threads)
            if last:
                self._links.discard(link)
        if last:
            link.close(rudely=link in self._rude)
            self._rude.discard(link)

    def _await_change(self, fault: Fault, link: _Link, timeout_s: float | None = None) -> None:
        """Wait, with the lock held, for the end of the fault or of the connection."""
        self._changed.wait_for(lambda: self.fault is not fault or link in self._rude, timeout_s)

    def _pass(self, link: _Link, data: bytes, target: socket.socket, *, up: bool) -> bool:
        """Pass a piece on as the fault of the moment allows; return whether to go on."""
        while data:
            with self._changed:
                fault = self.fault
                if link in self._rude:
                    return False
                if fault is Fault.SILENCE or fault is Fault.LATE:
                    self._await_change(fault, link)
                    continue
                slow = fault is Fault.TRICKLE or (fault is Fault.TRICKLE_BACK and not up)
                if slow:
                    self._await_change(fault, link, _TRICKLE_S)
                if fault is Fault.LOSE_ANSWERS and not up:
                    self.swallowed += len(data)
                    return True
                size = 1 if slow else len(data)
                if fault is Fault.CUT_DURING and up:
                    size = min(size, link.budget)
                    link.budget -= size
                    over = link.budget == 0
                    self.cuts += over
                else:
                    over = False
            target.sendall(data[:size])
            data = data[size:]
            if over:
                self._cut([link])
                return False
        return True
