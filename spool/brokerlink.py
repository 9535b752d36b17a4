"""Whether the collector is connected to its broker, since when, and if not, why.

The network thread says it, the writer thread stores it in spool.db (table ``broker_link``, view
``broker``), only when it changes.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from spool.texts import shown


@dataclass(frozen=True, slots=True)
class LinkState:
    """The connection to the broker at one moment."""

    connected: bool = False
    """Connected and subscribed: messages can come."""
    address: str = ""
    """``host:port``."""
    detail: str = ""
    """Why it is not connected."""
    since_us: int = 0
    """Since when it is connected or not, microseconds since 1970 UTC."""


class LinkFile(Protocol):
    """The spool, opened by its owner."""

    def set_broker_link(self, state: LinkState) -> None:
        """Store it."""


class BrokerLink:
    """What the network thread knows of the connection, for the writer thread to store.

    Any thread may call :meth:`up` and :meth:`down`, as often as it likes; :meth:`store` belongs to
    the thread that writes the spool.

    Args:
        address: ``host:port`` of the broker.
        now_us: Microseconds since 1970 UTC.
    """

    def __init__(
        self, address: str = "", now_us: Callable[[], int] = lambda: time.time_ns() // 1000
    ) -> None:
        self._now_us = now_us
        self._lock = threading.Lock()
        self.state = LinkState(address=address, since_us=now_us())
        self._stored: LinkState | None = None

    def up(self) -> None:
        """Say that it is connected and subscribed."""
        self._set(connected=True, detail="")

    def down(self, detail: str) -> None:
        """Say that it is not connected, and why."""
        self._set(connected=False, detail=detail)

    def _set(self, *, connected: bool, detail: str) -> None:
        with self._lock:
            before = self.state
            since_us = before.since_us if before.connected == connected else self._now_us()
            self.state = LinkState(connected, before.address, shown(detail), since_us)

    def store(self, file: LinkFile) -> None:
        """Bring the file up to date, if anything has changed.

        Raises:
            StorageFaultError: The file cannot be written; DiskFullError if there is no room.
        """
        state = self.state
        if state != self._stored:
            file.set_broker_link(state)
            self._stored = state
