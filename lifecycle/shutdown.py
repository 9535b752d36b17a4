"""The wish to stop: SIGTERM or SIGINT, or a supervisor that is gone."""

import ctypes
import os
import select
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Protocol

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent dies."""

STOP_GRACE_S = 8.0
"""Within 10 s of SIGTERM a program has ended, whatever it waits for."""


class HasFileno(Protocol):
    """What can be waited on."""

    def fileno(self) -> int:
        """Return its descriptor."""


class StopRequest:
    """Becomes true once, when the process should end; can be waited for and selected on.

    A signal handler must not take locks, so this rests on a socket pair and not on
    threading.Event. Other threads use :meth:`wake` to interrupt a wait of the main thread.

    Args:
        supervised: Whether a supervisor started this process. Then its death is a reason to
            stop: an orphan is seen by no ``supervisorctl`` and would keep the next
            supervisor's process from starting.
    """

    def __init__(self, *, supervised: bool = False) -> None:
        self._requested = False
        self._reason = ""
        self._from_outside = False
        self._grace_s = STOP_GRACE_S
        self._parent = os.getppid() if supervised else 0
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(0)
        self._sender.settimeout(0)

    def install(self, on_overdue: Callable[[], object], grace_s: float = STOP_GRACE_S) -> None:
        """Take over SIGTERM and SIGINT. Call from the main thread.

        Args:
            on_overdue: Called, in the main thread, when the program has not ended in time.
            grace_s: How long it has from the first wish to stop.
        """
        self._grace_s = grace_s
        if self._parent:
            # The kernel tells of the supervisor's death, also a thread that waits for a service.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        signal.signal(signal.SIGALRM, lambda *_: on_overdue())
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self._from_outside:
            # A timer of the kernel, because the main thread may be waiting for a service that
            # never answers; it interrupts that.
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        self._from_outside = True
        self.request(signal.Signals(number).name)

    def request(self, reason: str) -> None:
        """Ask for the stop; the first reason is kept."""
        if not self._requested:
            self._reason = reason
            self._requested = True
        self.wake()

    def wake(self) -> None:
        """End the current or the next wait, from any thread."""
        try:
            self._sender.send(b"\0")
        except OSError:
            return  # enough wake-ups are waiting to be read already, or this is closed

    @property
    def requested(self) -> bool:
        """Whether the process should end."""
        if self._parent and os.getppid() != self._parent and not self._requested:
            self._from_outside = True
            self.request("the supervisor is gone")
        return self._requested

    @property
    def from_outside(self) -> bool:
        """Whether a signal, or the supervisor's end, asked for it, and not this program."""
        return self.requested and self._from_outside

    @property
    def reason(self) -> str:
        """Why, in a word or two."""
        return self._reason

    def fileno(self) -> int:
        """Return the descriptor that becomes readable on a wake-up."""
        return self._receiver.fileno()

    def drain(self) -> None:
        """Forget the wake-ups so far."""
        try:
            while self._receiver.recv(4096):
                pass
        except BlockingIOError:
            return  # all read

    def wait(self, timeout_s: float, also: "HasFileno | None" = None) -> bool:
        """Sleep until a wake-up or for ``timeout_s``; return whether to stop.

        Args:
            timeout_s: How long at most.
            also: Ends the wait as well, once it is readable. It is not read from.
        """
        self.sleep(0.0 if self.requested else max(0.0, timeout_s), also)
        return self.requested

    def sleep(self, timeout_s: float, also: "HasFileno | None" = None) -> None:
        """Sleep until a wake-up or for ``timeout_s``, even where the stop was asked for."""
        waited_for = [self._receiver] if also is None else [self._receiver, also]
        # Reading when there is nothing raises, which would be most of what an idle poll costs.
        if self._receiver in select.select(waited_for, [], [], timeout_s)[0]:
            self.drain()

    def close(self) -> None:
        """Give the descriptors back. A later wake-up has no effect."""
        self._receiver.close()
        self._sender.close()
