"""A fake of Google Cloud Pub/Sub: gRPC on a real socket, strict, and fast.

Publisher: Publish, CreateTopic, GetTopic, DeleteTopic, ListTopicSubscriptions. Subscriber:
CreateSubscription, GetSubscription, DeleteSubscription, Pull, Acknowledge,
ModifyAckDeadline. Requests are parsed with the raw protobuf classes; proto-plus
would cost more than all the rest together.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qs

import grpc
from google.protobuf.message import DecodeError, Message
from google.pubsub_v1 import types

from tests.fakes.faults import Delay, FaultPlan, Hang, LoseAnswer
from tests.fakes.in_flight import InFlight, Violation
from tests.fakes.publish_rules import PublishRules, Refusal, WireMessage, check_request
from tests.fakes.topics import ReceivedMessage, TopicStore

HOST = "127.0.0.1"
# Hung requests hold a worker each; more than this at once would block the others.
WORKERS = 64
# Above the limit of the service, so that the fake and not gRPC refuses a big request.
MAX_WIRE_BYTES = 64 * 1024 * 1024
# For load, one request in so many is judged message by message, the first one among them.
LOAD_JUDGED_EVERY = 20
# The service answers a pull without messages after a while; a test has no patience.
PULL_WAIT_S = 1.0

_PublishRequest = types.PublishRequest.pb()
_PublishResponse = types.PublishResponse.pb()
_Topic = types.Topic.pb()
_GetTopicRequest = types.GetTopicRequest.pb()
_DeleteTopicRequest = types.DeleteTopicRequest.pb()
_ListTopicSubscriptionsRequest = types.ListTopicSubscriptionsRequest.pb()
_ListTopicSubscriptionsResponse = types.ListTopicSubscriptionsResponse.pb()
_Subscription = types.Subscription.pb()
_GetSubscriptionRequest = types.GetSubscriptionRequest.pb()
_DeleteSubscriptionRequest = types.DeleteSubscriptionRequest.pb()
_PullRequest = types.PullRequest.pb()
_PullResponse = types.PullResponse.pb()
_AcknowledgeRequest = types.AcknowledgeRequest.pb()
_ModifyAckDeadlineRequest = types.ModifyAckDeadlineRequest.pb()

_EMPTY = b""  # google.protobuf.Empty on the wire
_NAME = re.compile(
    r"projects/[^/]+/(topics|subscriptions)/(?!goog)[A-Za-z][A-Za-z0-9._~+%-]{2,254}"
)

_Handler = Callable[[bytes, grpc.ServicerContext], bytes]


@dataclass(frozen=True, slots=True)
class Abort:
    """Answer with this status; the request is not carried out."""

    code: grpc.StatusCode
    details: str


class PubSubFaults(FaultPlan):
    """Faults for the requests to come.

    A request whose caller leaves during a delay is not carried out: gRPC tells the
    server of it. For a request in doubt there is `lose_answer`.

    Attributes:
        poison: a predicate on a message's data. A request with such a message is
            refused as a whole, as a topic with a schema does.
        keys: faults by ordering key, for every publish request of that key.
    """

    def __init__(self) -> None:
        super().__init__("Publish")
        self.poison: Callable[[bytes], bool] | None = None
        self.keys: dict[str, Abort | Hang] = {}

    def refuse_key(self, key: str, code: grpc.StatusCode, details: str = "") -> None:
        """Answer every publish request of one ordering key with `code`."""
        self.keys[key] = Abort(code, details)

    def hang_key(self, key: str) -> None:
        """Leave every publish request of one ordering key without an answer."""
        self.keys[key] = Hang()

    def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        times: int | None = 1,
        calls: set[str] | None = None,
    ) -> None:
        """Answer the next `times` requests with `code`."""
        self.add(Abort(code, details), times, calls)

    def clear(self) -> None:
        """Forget every fault, the poison too, and let go of what hangs."""
        self.poison = None
        self.keys = {}
        super().clear()


class FakePubSub:
    """A Pub/Sub server on 127.0.0.1, usable as a context manager.

    Args:
        port: where to listen; 0 takes a free port and keeps it for restarts.
        topics: full names of topics that exist from the start.
        keep: False is for load: no messages are kept, only counts and the last `seq` of each
            key, and of most requests only the size and the number of messages are judged.
    """

    def __init__(self, port: int = 0, *, topics: Iterable[str] = (), keep: bool = True) -> None:
        self.port = port
        self.publisher_only = False
        """Whether the caller has roles/pubsub.publisher and no right to look."""
        self.faults = PubSubFaults()
        self._keep = keep
        self._store = TopicStore(keep=keep)
        self._in_flight = InFlight()
        self._rules = PublishRules()
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None
        for topic in topics:
            self.create_topic(topic)

    def __enter__(self) -> Self:
        """Start to serve."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop to serve."""
        self.stop()

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        return f"{HOST}:{self.port}"

    @property
    def violations(self) -> list[Violation]:
        """Each time two requests of one ordering key were in flight at once."""
        return list(self._in_flight.violations)

    @property
    def most_at_once(self) -> int:
        """How many publish requests were under way at once, at the most."""
        return self._in_flight.most_at_once

    @property
    def count(self) -> int:
        """How many messages were received, over all topics."""
        return self._store.count(None)

    @property
    def requests(self) -> int:
        """How many publish requests were stored."""
        return self._store.requests()

    def start(self) -> Self:
        """Listen, on the port of last time if there was one; return once it is open."""
        if self._server is not None:
            raise RuntimeError(f"already serving at {self.address}")
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="fake-pubsub")
        server = grpc.server(
            self._pool,
            handlers=self._handlers(),
            options=[
                ("grpc.so_reuseport", 0),  # a port that is taken must be an error
                ("grpc.max_receive_message_length", MAX_WIRE_BYTES),
                ("grpc.max_send_message_length", MAX_WIRE_BYTES),
                # The official clients ping; a server that calls that abuse hangs up.
                ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self.port = server.add_insecure_port(self.address)
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        """Go away: connections are refused, calls under way fail. The store stays."""
        if self._server is None or self._pool is None:
            return
        stopped = self._server.stop(grace=None)
        self.faults.release()
        stopped.wait()
        self._pool.shutdown()
        self._server = None
        self._pool = None

    def create_topic(self, topic: str) -> None:
        """Create a topic, named projects/P/topics/T; unlike the API, of any length."""
        self._store.create_topic(topic)

    def delete_topic(self, topic: str) -> None:
        """Delete a topic with its messages."""
        self._store.delete_topic(topic)

    def create_subscription(self, name: str, topic: str) -> None:
        """Create an ordered subscription, named projects/P/subscriptions/S."""
        self._store.create_subscription(name, topic, ordered=True, ack_deadline_s=10)

    def topics(self) -> list[str]:
        """Return the names of all topics."""
        return self._store.topics()

    def topic_count(self, topic: str) -> int:
        """Return how many messages the topic received."""
        return self._store.count(topic)

    def messages(self, topic: str) -> list[ReceivedMessage]:
        """Return the topic's messages in order of arrival."""
        return self._store.messages(topic)

    def by_key(self, topic: str) -> dict[str, list[ReceivedMessage]]:
        """Return the topic's messages of each ordering key, in order of arrival."""
        keys: dict[str, list[ReceivedMessage]] = {}
        for message in self._store.messages(topic):
            keys.setdefault(message.ordering_key, []).append(message)
        return keys

    def last_seq(self, topic: str) -> dict[str, str]:
        """Return the attribute `seq` of the newest message of each ordering key."""
        return self._store.last_seq(topic)

    def wait_for(self, count: int, timeout_s: float, topic: str | None = None) -> bool:
        """Block until `count` messages are there; return whether they are."""
        return self._store.wait_for(count, timeout_s, topic)

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        publisher: dict[str, _Handler] = {
            "Publish": self._publish,
            "CreateTopic": self._create_topic,
            "GetTopic": self._get_topic,
            "DeleteTopic": self._delete_topic,
            "ListTopicSubscriptions": self._list_topic_subscriptions,
        }
        subscriber: dict[str, _Handler] = {
            "CreateSubscription": self._create_subscription,
            "GetSubscription": self._get_subscription,
            "DeleteSubscription": self._delete_subscription,
            "Pull": self._pull,
            "Acknowledge": self._acknowledge,
            "ModifyAckDeadline": self._modify_ack_deadline,
        }
        services = {"Publisher": publisher, "Subscriber": subscriber}
        return [
            grpc.method_handlers_generic_handler(
                f"google.pubsub.v1.{service}",
                {
                    call: grpc.unary_unary_rpc_method_handler(self._guarded(call, handler))
                    for call, handler in calls.items()
                },
            )
            for service, calls in services.items()
        ]

    def _guarded(self, call: str, handler: _Handler) -> _Handler:
        """Wrap a handler so that its refusals become the call's status."""

        def serve(request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                if call == "Publish":  # meets its faults itself, once it is known for which key
                    return handler(request, context)
                lose = self._meet_fault(call, context)
                answer = handler(request, context)
                if lose:
                    raise _lost()
            except Refusal as refusal:
                context.abort(refusal.code, refusal.details)
                raise
            except DecodeError:
                context.abort(grpc.StatusCode.INTERNAL, "Failed parsing the request.")
                raise
            return answer

        return serve

    def _meet_fault(self, call: str, context: grpc.ServicerContext) -> bool:
        """Let the planned fault happen; return True if the answer shall be lost later."""
        return self._meet(self.faults.take(call), context)

    def _meet(self, fault: object, context: grpc.ServicerContext) -> bool:
        if fault is None:
            return False
        if isinstance(fault, Abort):
            raise Refusal(fault.code, fault.details)
        if isinstance(fault, (Hang, Delay)):
            context.add_callback(self.faults.wake)
            delay_s = fault.delay_s if isinstance(fault, Delay) else None
            if not self.faults.hold(delay_s, lambda: not context.is_active()):
                raise Refusal(grpc.StatusCode.UNAVAILABLE, "The fake let go of a held request.")
        return isinstance(fault, LoseAnswer)

    def _publish(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        request = _PublishRequest.FromString(raw)
        messages = request.messages
        _check_routing(context, request.topic)
        key = messages[0].ordering_key if messages else ""
        call = self._in_flight.begin(request.topic, key, context)
        try:
            self._meet(self.faults.keys.get(key), context)
            lose = self._meet_fault("Publish", context)
            self._store.topic(request.topic)
            key = self._check(messages, len(raw))
            first_id = self._store.publish(request.topic, key, messages)
            if lose:
                raise _lost()
        finally:
            self._in_flight.end(call)
        ids = map(str, range(first_id, first_id + len(messages)))
        return _on_wire(_PublishResponse(message_ids=ids))

    def _check(self, messages: Sequence[WireMessage], size: int) -> str:
        poison = self.faults.poison
        if self._keep or poison is not None or self.requests % LOAD_JUDGED_EVERY == 0:
            return self._rules.check(messages, size, poison)
        return check_request(messages, size)

    def _create_topic(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        request = _Topic.FromString(raw)
        _check_name(request.name, "topics")
        self._store.create_topic(request.name)
        return raw

    def _get_topic(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        name = _GetTopicRequest.FromString(raw).topic
        self._store.topic(name)
        return _on_wire(_Topic(name=name))

    def _delete_topic(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        self._store.delete_topic(_DeleteTopicRequest.FromString(raw).topic)
        return _EMPTY

    def _list_topic_subscriptions(self, raw: bytes, context: grpc.ServicerContext) -> bytes:
        name = _ListTopicSubscriptionsRequest.FromString(raw).topic
        _check_routing(context, name)
        if self.publisher_only:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "User not authorized to perform this action.",
            )
        self._store.topic(name)
        found = self._store.subscriptions_of(name)
        return _on_wire(_ListTopicSubscriptionsResponse(subscriptions=found))

    def _create_subscription(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        request = _Subscription.FromString(raw)
        _check_name(request.name, "subscriptions")
        self._store.create_subscription(
            request.name,
            request.topic,
            ordered=request.enable_message_ordering,
            ack_deadline_s=request.ack_deadline_seconds,
        )
        return raw

    def _get_subscription(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        found = self._store.subscription(_GetSubscriptionRequest.FromString(raw).subscription)
        return _on_wire(
            _Subscription(
                name=found.name,
                topic=found.topic,
                enable_message_ordering=found.ordered,
                ack_deadline_seconds=found.ack_deadline_s,
            )
        )

    def _delete_subscription(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        self._store.delete_subscription(_DeleteSubscriptionRequest.FromString(raw).subscription)
        return _EMPTY

    def _pull(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        request = _PullRequest.FromString(raw)
        if request.max_messages < 1:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "The value for max_messages must be greater than 0.",
            )
        wait_s = 0.0 if request.return_immediately else PULL_WAIT_S
        response = _PullResponse()
        for ack_id, delivery in self._store.pull(
            request.subscription, request.max_messages, wait_s
        ):
            response.received_messages.add(
                ack_id=ack_id, message=delivery.message, delivery_attempt=delivery.attempt
            )
        return _on_wire(response)

    def _acknowledge(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        request = _AcknowledgeRequest.FromString(raw)
        self._store.acknowledge(request.subscription, request.ack_ids)
        return _EMPTY

    def _modify_ack_deadline(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        request = _ModifyAckDeadlineRequest.FromString(raw)
        self._store.set_ack_deadline(
            request.subscription, request.ack_ids, request.ack_deadline_seconds
        )
        return _EMPTY


def _on_wire(message: Message) -> bytes:
    wire: bytes = message.SerializeToString()
    return wire


def _lost() -> Refusal:
    return Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def _check_routing(context: grpc.ServicerContext, topic: str) -> None:
    """Refuse a call that the front ends would route by another name than its own.

    They decode the header's value, so it has to be percent-encoded. A call without the header
    is taken, as the service does.
    """
    sent = dict(context.invocation_metadata()).get("x-goog-request-params")
    if sent is not None and parse_qs(sent, strict_parsing=True).get("topic") != [topic]:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"The routing header does not name the resource of the request: {sent}",
        )


def _check_name(name: str, collection: str) -> None:
    match = _NAME.fullmatch(name)
    if match is None or match[1] != collection:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT, f"Invalid [{collection}] name: (name={name})"
        )
