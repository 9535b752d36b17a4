"""What the drain loop does about dead letters besides keeping them: log lines, and the budget."""

import logging
import time
from collections.abc import Callable, Sequence

from forwarder.sink import Fault, FaultKind
from lifecycle import RateLimitedLog, fields
from spool import DeadLetter, SinkState, Usage

log = logging.getLogger("forwarder")

_KIB = 1024
_MIB = 1024 * 1024
_BY_CAUSE = "select reason, site_code, count(*), max(detail) from dead_letters group by 1, 2"
_ALL = "select * from dead_letters"


class DeadLetterWatch:
    """Reports the dead letters of one sink, and whether their budget leaves room.

    Args:
        sink: The sink's name.
        state: Its file, which keeps and counts them.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, sink: str, state: SinkState, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sink = sink
        self._state = state
        self._log = RateLimitedLog(log, clock)
        self._warned = False

    def report(self, dead: Sequence[DeadLetter]) -> None:
        """Log ``dead``: the first of each reason at once, then one line a minute with their number.

        120,000 of them, a line for each, were 35 MB of log; the table has every one.
        """
        for letter in dead:
            self._log.log(
                logging.ERROR,
                f"dead letter, {letter.reason}",
                f"dead letter: {letter.detail}",
                sink=self._sink,
                reason=letter.reason,
                seq=letter.row[0],
                topic=letter.row[8],
                look=_ALL,
            )

    def flush(self, *, at_end: bool = False) -> None:
        """Log how many there were since the last line, once it is old enough, or at the end."""
        self._log.flush(at_end=at_end)

    def notice(self) -> str:
        """Return what belongs into the status while delivery goes on; warn where it is new.

        Raises:
            StorageFaultError: The file cannot be read.
        """
        usage = self._state.dead_letters.usage()
        if not usage.nearly_full:
            self._warned = False
            return ""
        if usage.full:
            return ""  # the hold that comes next says more
        text = (
            "dead letters take more than 80 % of DEAD_LETTER_MAX_BYTES, "
            f"{_size(usage.max_bytes)}; when it is used up, delivery to this sink is on hold; "
            f"{self._how_to_look()}"
        )
        if not self._warned:
            self._warned = True
            log.warning(
                "the budget of dead letters is nearly used up: %s", text, extra=self._figures(usage)
            )
        return text

    def full(self) -> Fault | None:
        """Return why no further batch may be delivered; None while there is room.

        Raises:
            StorageFaultError: The file cannot be read.
        """
        usage = self._state.dead_letters.usage()
        if not usage.full:
            return None
        path = self._state.path
        return Fault(
            FaultKind.HOLD,
            f"the budget of dead letters is used up: {usage.kept} of them take "
            f"{_size(usage.kept_bytes)} in {path}, and the next one might not be kept, so nothing "
            "more is delivered to this sink",
            f"{self._how_to_look()}; keep a copy: sqlite3 -readonly -json {path} '{_ALL}' > "
            "dead_letters.json; correct what makes them; then raise DEAD_LETTER_MAX_BYTES, now "
            f"{_size(usage.max_bytes)} (room on the disk: df -h {path.parent}), and: supervisorctl "
            f"restart forwarder-{self._sink}",
        )

    def _how_to_look(self) -> str:
        return f"look at them: sqlite3 -readonly {self._state.path} '{_BY_CAUSE}'"

    def _figures(self, usage: Usage) -> dict[str, dict[str, object]]:
        return fields(
            sink=self._sink,
            dead_letters=usage.kept,
            dead_letter_bytes=usage.kept_bytes,
            max_bytes=usage.max_bytes,
        )


def _size(count: int) -> str:
    return f"{count / _MIB:.1f} MiB" if count >= _MIB else f"{count / _KIB:.1f} KiB"
