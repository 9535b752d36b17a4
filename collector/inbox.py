"""What the network thread has read and the writer thread has not yet taken. Bounded.

Mosquitto does not keep to the in-flight window (2.0.11 has 780 messages outstanding where 20
are allowed), so the bound is here: a full inbox makes the network thread stop reading, and
TCP holds the broker back.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from collector.gather import Gathering
from collector.packets import Message
from spool import ROW_OVERHEAD_BYTES

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


def parts(taken: list[Delivered], max_bytes: int) -> Iterator[list[Delivered]]:
    """Yield what was taken, in order, cut into parts for one transaction each.

    Args:
        taken: From :meth:`Inbox.take`.
        max_bytes: A part ends before the message that would bring it above this, counted as it
            will be stored; one message is a part in any case.
    """
    size = sum(item.size + ROW_OVERHEAD_BYTES * len(item.messages) for item in taken)
    if size <= max_bytes:  # always, but in a small spool
        if taken:
            yield taken
        return
    part: list[Delivered] = []
    part_bytes = 0
    for generation, received_us, messages, _ in taken:
        cut: list[Message] = []
        cut_bytes = 0
        for message in messages:
            one_bytes = len(message.topic) + len(message.payload)
            stored = one_bytes + ROW_OVERHEAD_BYTES
            if part_bytes and part_bytes + stored > max_bytes:
                if cut:
                    part.append(Delivered(generation, received_us, cut, cut_bytes))
                yield part
                part, part_bytes, cut, cut_bytes = [], 0, [], 0
            cut.append(message)
            cut_bytes += one_bytes
            part_bytes += stored
        if cut:
            part.append(Delivered(generation, received_us, cut, cut_bytes))
    if part:
        yield part


class Inbox:
    """A bounded queue of what was received.

    Args:
        on_room: Called, from the taking thread, when reading may go on.
        gathering: Decides how long what is there waits for more; not at all if there is none.
    """

    def __init__(self, on_room: Callable[[], None], gathering: Gathering | None = None) -> None:
        self._on_room = on_room
        self._gathering = gathering or Gathering(0.0)
        self._items: deque[Delivered] = deque()
        self._messages = 0
        self._bytes = 0
        self._paused = False
        self._closed = False
        self._gathers = False
        """Whether the taking thread waits for more than it has."""
        self._changed = threading.Condition()

    def put(self, delivered: Delivered) -> None:
        """Add what was read. Never blocks; look at :attr:`full` before reading more."""
        count = len(delivered.messages)
        awaited = sum([qos > 0 for _, _, qos, *_ in delivered.messages])
        with self._changed:
            self._items.append(delivered)
            self._messages += count
            self._bytes += delivered.size
            self._gathering.arrived(delivered.generation, awaited)
            if not self._gathers or self._gathering.interrupts(self._messages) or self._half_full:
                self._changed.notify()

    def acknowledged(self, messages: int) -> None:
        """Take note that so many acknowledgements went out on the present connection."""
        with self._changed:
            self._gathering.acknowledged(messages)

    @property
    def full(self) -> bool:
        """Whether to stop reading; then ``on_room`` says when to go on."""
        with self._changed:
            self._paused = self._messages >= INBOX_MAX_MESSAGES or self._bytes >= INBOX_MAX_BYTES
            return self._paused

    def take(self, max_messages: int, timeout_s: float, *, gather: bool = True) -> list[Delivered]:
        """Return what waits, oldest first: at least one item if any, then up to the limit.

        A few messages wait for more, as :mod:`collector.gather` says.

        Args:
            max_messages: Stop before the item that would exceed this.
            timeout_s: How long to wait for something.
            gather: Whether what is there may wait for more; not, where the caller has other work.
        """
        with self._changed:
            if not self._items and not self._closed:
                self._changed.wait(timeout_s)
            if self._items:
                self._gather(wanted=gather)
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

    def stretch(self, *, wanted: bool) -> None:
        """Have what comes wait longer for more, or not. From the taking thread."""
        self._gathering.stretched = wanted

    def _gather(self, *, wanted: bool) -> None:
        gathering = self._gathering
        self._gathers = True
        while wanted and not (self._closed or self._half_full):
            left_s = gathering.left_s(self._messages)
            if left_s <= 0:
                break
            self._changed.wait(left_s)
        self._gathers = False
        gathering.begins(self._messages)

    @property
    def _half_full(self) -> bool:
        # The network thread is not to stop reading for the wait.
        return self._bytes >= INBOX_MAX_BYTES // 2

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
