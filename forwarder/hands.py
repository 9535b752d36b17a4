"""What the drain loop does for the module that delivers ahead of held sites."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forwarder.sink import Fault
from spool import AheadStep, DeadLetter, Reading, Settlement, SpoolReader


@dataclass(frozen=True)
class Hands:
    """What the drain loop does for this module.

    Attributes:
        settle: Writes a settlement, waiting for room on a full disk.
        set_status: Writes state and detail for people.
        log_dead: Logs dead letters.
        backoff_s: Returns how long to wait after a fault, given the failures in a row.
        check_rows: Refuses readings of another environment.
        pause: Waits after a delivery of so many rows that was begun then, where a rate is set.
        batch_rows: Returns how many rows to read at once.
        beat: Tells the watchdog.
        clock: Seconds, monotonic.
    """

    settle: Callable[[Settlement, AheadStep], None]
    set_status: Callable[[str, str], None]
    log_dead: Callable[[Sequence[DeadLetter]], None]
    backoff_s: Callable[[Fault, int], float]
    check_rows: Callable[[SpoolReader, Sequence[Reading]], None]
    pause: Callable[[int, float], None]
    batch_rows: Callable[[], int]
    beat: Callable[[], None]
    clock: Callable[[], float]
