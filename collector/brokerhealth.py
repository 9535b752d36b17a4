"""What the view ``health`` says of the connection to the broker, and when it takes it back.

Each change of a condition is a write to the disk. So a text does not change with each attempt, and
a connection that comes and goes is one condition and not one for each time.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lifecycle import Settings, fields
from spool import BrokerLink, Condition, Conditions

log = logging.getLogger("collector.mqtt")

CRITICAL_AFTER_S = 60.0
"""A broker that is restarted is back before; after that, readings wait."""

ANSWER_S = 10.0
"""How long CONNACK and SUBACK may take until the broker counts as one that does not answer."""

SESSION_LOST_S = 3600.0
"""How long ``session_lost`` stays: what happened is over, and a person should see it."""

DISCONNECTED, REFUSES = "broker_disconnected", "broker_refuses"
SESSION_LOST, QOS_GRANTED = "session_lost", "qos_granted"

_KEPT = (
    "What the collector has acknowledged is safe; what comes now, the broker queues for this "
    "client within its limits, and while it is down the sensors keep what it has not acknowledged"
)
_LOOK = "look at the broker and its log: systemctl status mosquitto; journalctl -u mosquitto"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is no session with the broker."""

    text: str
    """What failed, on what, and why."""
    remedy: str = ""
    """What to do; empty where there is no better word than to look at the broker."""
    refusal: bool = False
    """Whether one side refuses the other, so that waiting will not help."""

    def __str__(self) -> str:
        """Return the line of the log."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


class NotConnectedError(Exception):
    """There was no attempt to connect, for a reason of our own.

    Args:
        problem: What stands in the way.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def unreadable(variable: str, path: Path, error: Exception) -> Problem:
    """Return what is wrong where a file that a variable names cannot be used.

    Args:
        variable: Its name.
        path: The file.
        error: What reading it, or making use of it, raised.
    """
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Problem(
        f"cannot use the file of {variable}={path}: {reason}",
        "it is read at each attempt, and one that is being written now is complete at the next; "
        f"otherwise see whether it is there, and whether this user may read it: ls -l {path}",
    )


class BrokerHealth:
    """Puts and clears the conditions of the broker. Belongs to the network thread.

    Args:
        settings: Which broker, which client id.
        conditions: Where they are put.
        link: Where it is said whether there is a connection, for the view ``broker``.
        clock: Seconds, monotonic.
        now_us: Microseconds since 1970 UTC.
        steady_s: How long a connection lasts that counts, after several that broke at once.
    """

    def __init__(  # noqa: PLR0913 - each is a seam that tests pass in
        self,
        settings: Settings,
        conditions: Conditions,
        *,
        steady_s: float,
        link: BrokerLink | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._broker = f"{settings.mqtt_broker}:{settings.mqtt_port}"
        self._client_id = settings.mqtt_client_id
        self._conditions = conditions
        self._link = link or BrokerLink()
        self._steady_s = steady_s
        self._clock = clock
        self._now_us = now_us
        self._problem: Problem | None = None
        self._since_us = 0
        self._lost_at = 0.0
        self._last: Problem | None = None
        self._opened_at: float | None = None
        self._clear_at: float | None = None
        self._session_lost_at: float | None = None
        self._ready = False
        self._last_ready_us = 0

    def opened(self) -> None:
        """Note that the broker was reached and has been told CONNECT."""
        self._opened_at = self._clock()

    def unread(self) -> None:
        """Note that nothing is read now, for a reason of our own: no answer can be seen."""
        if self._opened_at is not None:
            self._opened_at = self._clock()

    def lost(self, problem: Problem) -> None:
        """Say that there is no session, and why. May be called for each attempt."""
        now = self._clock()
        self._opened_at = self._clear_at = None
        if self._ready:
            self._ready = False
            self._last_ready_us = self._now_us()
        if self._problem is None:
            self._lost_at, self._since_us = now, self._now_us()
            self._problem = problem
        elif problem == self._last:
            self._problem = problem  # twice in a row: reasons that take turns are not written
        self._last = problem
        self._put()
        if problem.refusal:
            self._conditions.put(
                Condition(REFUSES, "CRITICAL", f"{problem.text}. {_KEPT}", problem.remedy or _LOOK)
            )
        else:
            self._conditions.clear(REFUSES)

    def ready(self, *, doubtful: bool) -> None:
        """Say that the broker has accepted and subscribed this client.

        Args:
            doubtful: The last connections broke at once: wait and see.
        """
        self._opened_at = None
        self._ready = True
        self._conditions.clear(REFUSES)
        if doubtful and self._problem is not None:
            self._clear_at = self._clock() + self._steady_s
        else:
            self._clear()

    def session_lost(self, last_reading_us: int) -> None:
        """Say that the broker no longer has the session that it had granted.

        Args:
            last_reading_us: When the last reading before it was received, µs since 1970 UTC; 0 if
                that is not known. It is used where this process has not been connected before.
        """
        if self._last_ready_us:
            since = f"the last connection ended at {_utc(self._last_ready_us)}"
        elif last_reading_us:
            since = f"the last reading before it was received at {_utc(last_reading_us)}"
        else:
            since = "when it was connected last is not known"
        remedy = (
            "nothing brings them back. Has the broker persistence, and was its file kept? See "
            "persistence and persistent_client_expiration in mosquitto.conf, and docs/guarantees.md"
        )
        log.warning(
            "the broker has lost the session: the messages that it had queued for this client are "
            "gone",
            extra=fields(
                broker=self._broker,
                client_id=self._client_id,
                session_resumed=False,
                since=since,
                remedy=remedy,
            ),
        )
        self._session_lost_at = self._clock()
        self._conditions.put(
            Condition(
                SESSION_LOST,
                "WARNING",
                f"at {_utc(self._now_us())} the broker {self._broker} no longer had the session of "
                f"{self._client_id}: the messages that it had acknowledged and queued for it are "
                f"gone, and those that came until it was subscribed again ({since})",
                remedy,
            )
        )

    def granted(self, weak: Sequence[str]) -> None:
        """Say for which filters the broker grants QoS 0 only; none is as it should be."""
        if not weak:
            self._conditions.clear(QOS_GRANTED)
            return
        log.warning(
            "the broker grants QoS 0 only; what it sends gets no promise",
            extra=fields(filters=list(weak)),
        )
        self._conditions.put(
            Condition(
                QOS_GRANTED,
                "WARNING",
                f"the broker {self._broker} grants QoS 0 only, for {', '.join(weak)}: what it "
                "sends while the collector is away, or a connection breaks, is lost",
                "allow QoS 1 in the broker (Mosquitto: max_qos) and restart it; the collector asks "
                "for it again at each connection",
            )
        )

    def turn(self) -> None:
        """Do what is due by the clock. Call it at least every few seconds."""
        if self._problem is None and self._session_lost_at is None and self._opened_at is None:
            return
        now = self._clock()
        if self._session_lost_at is not None and now - self._session_lost_at >= SESSION_LOST_S:
            self._session_lost_at = None
            self._conditions.clear(SESSION_LOST)
        if self._opened_at is not None and now - self._opened_at >= ANSWER_S:
            self.lost(
                Problem(f"the broker {self._broker} takes the connection, but does not answer")
            )
        if self._clear_at is not None and now >= self._clear_at:
            self._clear()
        elif self._problem is not None:
            self._put()

    def _clear(self) -> None:
        self._problem = self._last = self._clear_at = None
        self._conditions.clear(DISCONNECTED)
        self._link.up()

    def _put(self) -> None:
        if self._problem is None:
            return
        self._link.down(self._problem.text)
        lasts = self._clock() - self._lost_at >= CRITICAL_AFTER_S
        self._conditions.put(
            Condition(
                DISCONNECTED,
                "CRITICAL" if lasts else "WARNING",
                f"no lasting connection to the broker {self._broker} since "
                f"{_utc(self._since_us)}: {self._problem.text}. {_KEPT}",
                self._problem.remedy or _LOOK,
            )
        )


def _utc(time_us: int) -> str:
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
