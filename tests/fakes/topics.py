"""The store behind the Pub/Sub fake: topics, what was published, subscriptions.

Nothing is done per message when a request is stored: the parsed request is kept
as it is, and messages are made of it when a test asks. That keeps the fake out
of the way of what is measured against it.
"""

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc
from google.pubsub_v1.types import PubsubMessage

from tests.fakes.publish_rules import Refusal, WireMessage
from tests.fakes.subscriptions import Delivery, Subscription

_MESSAGE = PubsubMessage.pb()
# Ids have a fixed width so that an answer's size does not depend on a run's length.
FIRST_MESSAGE_ID = 10**15
DELETED_TOPIC = "_deleted-topic_"
"""What the service shows as the topic of a subscription whose topic was deleted."""


@dataclass(frozen=True, slots=True)
class ReceivedMessage:
    """One message as the topic received it."""

    data: bytes
    attributes: Mapping[str, str]
    ordering_key: str
    message_id: str
    published_at: float  # time.monotonic() of the request that brought it


@dataclass(frozen=True, slots=True)
class _Batch:
    messages: Sequence[WireMessage]
    first_id: int
    published_at: float


@dataclass(slots=True)
class _Topic:
    count: int = 0
    requests: int = 0
    batches: list[_Batch] = field(default_factory=list)
    last_seq: dict[str, str] = field(default_factory=dict)


class TopicStore:
    """Thread-safe; outlives the server in front of it."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._changed = threading.Condition()
        self._topics: dict[str, _Topic] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._next_id = FIRST_MESSAGE_ID
        self._clock = time.monotonic

    def create_topic(self, name: str) -> None:
        """Create an empty topic, or refuse with ALREADY_EXISTS."""
        with self._changed:
            if name in self._topics:
                raise _already_exists(name)
            self._topics[name] = _Topic()

    def topic(self, name: str) -> _Topic:
        """Return the topic, or refuse with NOT_FOUND."""
        try:
            return self._topics[name]
        except KeyError:
            raise _not_found(name) from None

    def delete_topic(self, name: str) -> None:
        """Delete the topic and all that it holds."""
        with self._changed:
            self.topic(name)
            del self._topics[name]
            for subscription in self._subscriptions.values():
                if subscription.topic == name:
                    # It stays, and a topic that is created again does not get it back.
                    subscription.topic = DELETED_TOPIC

    def topics(self) -> list[str]:
        """Return the names of all topics."""
        with self._changed:
            return list(self._topics)

    def publish(self, name: str, key: str, messages: Sequence[WireMessage]) -> int:
        """Store one checked request; return the id of its first message."""
        with self._changed:
            topic = self.topic(name)
            first_id = self._next_id
            self._next_id += len(messages)
            topic.count += len(messages)
            topic.requests += 1
            seq = messages[-1].attributes.get("seq")
            if seq is not None:
                topic.last_seq[key] = seq
            if self._keep:
                topic.batches.append(_Batch(messages, first_id, self._clock()))
            if self._subscriptions:
                self._offer(name, messages, first_id)
            self._changed.notify_all()
            return first_id

    def messages(self, name: str) -> list[ReceivedMessage]:
        """Return everything the topic received, in order of arrival."""
        with self._changed:
            batches = list(self.topic(name).batches)
        return [
            ReceivedMessage(
                message.data,
                dict(message.attributes),
                message.ordering_key,
                str(batch.first_id + offset),
                batch.published_at,
            )
            for batch in batches
            for offset, message in enumerate(batch.messages)
        ]

    def wait_for(self, count: int, timeout_s: float, name: str | None) -> bool:
        """Block until the topic (or all together) holds `count` messages."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count(name) >= count, timeout=timeout_s)

    def count(self, name: str | None) -> int:
        """Return how many messages the topic (or all together) received."""
        if name is not None:
            return self.topic(name).count
        return sum(topic.count for topic in list(self._topics.values()))

    def requests(self) -> int:
        """Return how many publish requests were stored."""
        return sum(topic.requests for topic in list(self._topics.values()))

    def last_seq(self, name: str) -> dict[str, str]:
        """Return, for each ordering key, the attribute `seq` of its newest message."""
        with self._changed:
            return dict(self.topic(name).last_seq)

    def create_subscription(
        self, name: str, topic: str, *, ordered: bool, ack_deadline_s: int
    ) -> None:
        """Create a subscription to what is published from now on."""
        with self._changed:
            self.topic(topic)
            if name in self._subscriptions:
                raise _already_exists(name)
            self._subscriptions[name] = Subscription(name, topic, ordered, ack_deadline_s or 10)

    def subscription(self, name: str) -> Subscription:
        """Return the subscription, or refuse with NOT_FOUND."""
        try:
            return self._subscriptions[name]
        except KeyError:
            raise _not_found(name) from None

    def subscriptions_of(self, topic: str) -> list[str]:
        """Return the names of the topic's subscriptions."""
        with self._changed:
            return [s.name for s in self._subscriptions.values() if s.topic == topic]

    def delete_subscription(self, name: str) -> None:
        """Delete the subscription and what waits in it."""
        with self._changed:
            self.subscription(name)
            del self._subscriptions[name]

    def pull(self, name: str, limit: int, wait_s: float) -> list[tuple[str, Delivery]]:
        """Hand messages out; block up to `wait_s` for the first one."""
        with self._changed:
            subscription = self.subscription(name)
            handed: list[tuple[str, Delivery]] = []

            def found() -> bool:
                handed.extend(subscription.pull(limit, self._clock()))
                return bool(handed)

            self._changed.wait_for(found, timeout=wait_s)
            return handed

    def acknowledge(self, name: str, ack_ids: Sequence[str]) -> None:
        """Forget what was delivered under these ids."""
        with self._changed:
            self.subscription(name).acknowledge(ack_ids)
            self._changed.notify_all()

    def set_ack_deadline(self, name: str, ack_ids: Sequence[str], deadline_s: float) -> None:
        """Give these deliveries `deadline_s` from now."""
        with self._changed:
            self.subscription(name).set_deadline(ack_ids, self._clock() + deadline_s)
            self._changed.notify_all()

    def _offer(self, topic: str, messages: Sequence[WireMessage], first_id: int) -> None:
        subscribed = [s for s in self._subscriptions.values() if s.topic == topic]
        for subscription, (number, message) in itertools.product(
            subscribed, enumerate(messages, first_id)
        ):
            copy = _MESSAGE()
            copy.CopyFrom(message)
            copy.message_id = str(number)
            copy.publish_time.GetCurrentTime()
            subscription.offer([Delivery(number, message.ordering_key, copy)])


def _not_found(name: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.NOT_FOUND, f"Resource not found (resource={name.rpartition('/')[2]})."
    )


def _already_exists(name: str) -> Refusal:
    return Refusal(
        grpc.StatusCode.ALREADY_EXISTS,
        f"Resource already exists in the project (resource={name.rpartition('/')[2]}).",
    )
