"""A topic that was missing and is there again: who will get what is published to it?

A topic that is created again has no subscriptions. What is published before they are created
again reaches no subscriber, although the service accepts it. So once the topic was seen missing,
which the sink's file remembers, its subscriptions are looked at before the first reading goes
there. Listing them needs pubsub.topics.get (roles/pubsub.viewer), which a publisher may lack; then
nothing can be checked, delivery goes on, and an ERROR line says from which reading on.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from forwarder.faults import blame_grpc
from forwarder.publisher import CallError
from forwarder.sink import Fault, FaultKind
from lifecycle import fields
from spool import SpoolError

log = logging.getLogger("forwarder.pubsub")

MISSING = "topic_missing"
CREATED_AGAIN = "topic_created_again"
"""Keys of ``meta`` in pubsub.db."""

NOT_CHECKABLE = frozenset({"PERMISSION_DENIED", "UNIMPLEMENTED"})


class Notes(Protocol):
    """Where to remember things across restarts; :class:`spool.SinkState` is one."""

    def remembered(self, key: str) -> str:
        """Return what was stored under ``key``; empty if nothing was."""

    def remember(self, values: Mapping[str, str]) -> None:
        """Store texts by their keys, durably, all or none."""


class RecreatedTopic:
    """Looks at a topic that was seen missing before anything is published to it.

    Args:
        topic: ``projects/P/topics/T``.
        notes: The sink's own file; None to remember nothing across restarts.
    """

    def __init__(self, topic: str, notes: Notes | None) -> None:
        self._topic = topic
        self._notes = notes
        # Of another topic, if PUBSUB_TOPIC was changed since.
        self.missing = notes is not None and self._noted(notes)
        """Whether it was seen missing, and nothing was accepted since."""
        self._remembered = self.missing
        self._subscriptions: list[str] | None = None

    def _noted(self, notes: Notes) -> bool:
        return f'"{self._topic}"' in notes.remembered(MISSING)

    def seen_missing(self) -> None:
        """The service says that there is no such topic."""
        self.missing = True
        if not self._remembered:
            self._remembered = self._note(MISSING)

    def look(self, subscriptions: Callable[[], list[str]]) -> Fault | None:
        """Return why nothing may be published yet; None if it may.

        Args:
            subscriptions: Lists those of the topic, or raises CallError.
        """
        self._subscriptions = None
        try:
            self._subscriptions = subscriptions()
        except CallError as error:
            if error.code in NOT_CHECKABLE:
                return None
            problem = f"list the subscriptions of {self._topic}: {error}"
            if error.code == "NOT_FOUND":
                return Fault(FaultKind.HOLD, problem, create_topic(self._topic))
            hold = blame_grpc(error.code).value == "hold"
            return Fault(FaultKind.HOLD if hold else FaultKind.TRANSIENT, problem)
        if self._subscriptions:
            return None
        return Fault(
            FaultKind.HOLD,
            f"publish to {self._topic}: the topic was missing, is there again, and has no "
            "subscription: what is published now would reach no subscriber",
            f"create its subscriptions: {create_subscription(self._topic)}",
        )

    def accepted(self, first_seq: int) -> None:
        """Readings from ``first_seq`` on were accepted by the topic that was missing before."""
        self.missing = False
        known = fields(
            sink="pubsub",
            topic=self._topic,
            first_seq=first_seq,
            subscriptions=self._subscriptions or "not known",
        )
        if self._subscriptions:
            log.warning("the topic was created again; delivery goes on", extra=known)
        else:
            log.error(
                "the topic was created again and its subscriptions cannot be listed: readings from "
                "first_seq on reach only the subscriptions that it has now; the spool keeps them "
                "for SPOOL_RETENTION_HOURS",
                extra=known,
            )
        self._note(CREATED_AGAIN, first_seq)
        if self._notes is not None:
            with contextlib.suppress(SpoolError):
                self._notes.remember({MISSING: ""})
        self._remembered = False

    def _note(self, key: str, first_seq: int = 0) -> bool:
        """Note the topic, the time and a seq; return whether it is durable."""
        value = {"topic": self._topic, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        if first_seq:
            value["first_seq"] = str(first_seq)
            value["subscriptions"] = ", ".join(self._subscriptions or ["not known"])
        try:
            if self._notes is not None:
                self._notes.remember({key: msgspec.json.encode(value).decode()})
        except SpoolError as error:
            # This process still knows it; a full disk must not end the delivery.
            log.warning("cannot note what became of the topic: %s", error)
            return False
        return True


def create_topic(topic: str) -> str:
    """Return how to create a missing topic so that nothing is published past its subscribers."""
    project, name = topic.split("/")[1::2]
    return (
        f"create it: gcloud pubsub topics create {name} --project={project} and, before anything "
        f"is published, its subscriptions: {create_subscription(topic)} (stop forwarder-pubsub "
        "until they exist: a new topic has none, and what it takes before reaches no subscriber)"
    )


def create_subscription(topic: str) -> str:
    """Return the command that creates a subscription."""
    project, name = topic.split("/")[1::2]
    return (
        f"gcloud pubsub subscriptions create SUBSCRIPTION --topic={name} "
        f"--topic-project={project} --project={project} --enable-message-ordering"
    )
