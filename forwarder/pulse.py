"""The forwarder's loop turns: told to the watchdog, and as a sign of life in the sink's file."""

from lifecycle import Watchdog
from spool import SinkState


class Pulse(Watchdog):
    """A watchdog whose beats leave a sign of life in the sink's file now and then.

    Args:
        loop: The name of the loop.
        timeout_s: How long it may stand still.
        state: The sink's own file.
    """

    def __init__(self, loop: str, timeout_s: float, state: SinkState) -> None:
        super().__init__([loop], timeout_s)
        self._loop = loop
        self._state = state

    def beat(self, loop: str) -> None:
        """Say that ``loop`` has turned.

        Raises:
            StorageFaultError: The sink's file cannot be written.
        """
        super().beat(loop)
        self._state.beat.turn()

    def waits(self) -> None:
        """Say that the loop waits as it may, without a sign of life: the file is locked."""
        super().beat(self._loop)
