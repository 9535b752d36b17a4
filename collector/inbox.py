"""What the network thread has read and the writer thread has not yet taken. Bounded.

Mosquitto does not keep to the in-flight window (2.0.11 has 780 messages outstanding where 20
are allowed), so the bound is here: a full inbox makes the network thread stop reading, and
TCP holds the broker back.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from collector.gather import ENOUGH_MESSAGES, Gathering
from collector.packets import Message

INBOX_MAX_MESSAGES = 10_000
INBOX_MAX_BYTES = 4 * 1024 * 1024


class Delivered(NamedTuple):
    """Messages that came with one read of one connection."""

    generation: int
    """Which connection: an acknowledgement is valid on that one only."""
    received_us: int
    messages: list[Message]
    size: int
    """Bytes of topics and payloads."""


class Inbox:
    """A bounded queue of what was received.

    Args:
        on_room: Called, from the taking thread, when reading may go on.
        gathering: Decides how long what is there waits for more.
    """

    def __init__(self, on_room: Callable[[], None], gathering: Gathering | None = None) -> None:
        self._on_room = on_room
        self._gathering = gathering or Gathering()
        self._items: deque[Delivered] = deque()
        self._messages = 0
        self._bytes = 0
        self._paused = False
        self._closed = False
        self._wanted = 1
        """With how many messages the taking thread wants to be woken."""
        self._changed = threading.Condition()

    def put(self, delivered: Delivered) -> None:
        """Add what was read. Never blocks; look at :attr:`full` before reading more."""
        with self._changed:
            self._items.append(delivered)
            self._messages += len(delivered.messages)
            self._bytes += delivered.size
            if self._messages >= self._wanted:
                self._changed.notify()

    @property
    def full(self) -> bool:
        """Whether to stop reading; then ``on_room`` says when to go on."""
        with self._changed:
            self._paused = self._messages >= INBOX_MAX_MESSAGES or self._bytes >= INBOX_MAX_BYTES
            return self._paused

    def take(self, max_messages: int, timeout_s: float) -> list[Delivered]:
        """Return what waits, oldest first: at least one item if any, then up to the limit.

        A few messages wait for more, as :mod:`collector.gather` says.

        Args:
            max_messages: Stop before the item that would exceed this.
            timeout_s: How long to wait for something.
        """
        with self._changed:
            if not self._items and not self._closed:
                self._changed.wait(timeout_s)
            if self._items:
                self._gather()
            taken: list[Delivered] = []
            count = 0
            while self._items and (
                not taken or count + len(self._items[0].messages) <= max_messages
            ):
                item = self._items.popleft()
                taken.append(item)
                count += len(item.messages)
                self._bytes -= item.size
            self._messages -= count
            wake = self._paused and self._messages <= INBOX_MAX_MESSAGES // 2
            if wake:
                self._paused = False
        if wake:
            self._on_room()
        return taken

    def _gather(self) -> None:
        had = self._messages
        wait_s = self._gathering.wait_s() if had < ENOUGH_MESSAGES and not self._closed else 0.0
        if wait_s:
            self._wanted = ENOUGH_MESSAGES
            self._changed.wait(wait_s)
            self._wanted = 1
            self._gathering.waited(in_vain=self._messages == had)
        self._gathering.begins()

    def close(self) -> None:
        """Say that nothing more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def finished(self) -> bool:
        """Whether it is closed and empty."""
        with self._changed:
            return self._closed and not self._items
