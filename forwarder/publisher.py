"""The connection to Pub/Sub: its channel, where it leads, and the calls that are made over it."""

from collections.abc import Callable
from typing import NamedTuple

import grpc
from google.api_core.gapic_v1 import routing_header
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1 import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.types import ListTopicSubscriptionsRequest as _ListRequest
from google.pubsub_v1.types import ListTopicSubscriptionsResponse as _ListResponse

from forwarder import authorities
from forwarder.access import cannot_build, find_credentials, grpc_fault, why_no_access
from forwarder.faults import FaultError
from forwarder.sink import Fault
from lifecycle import Settings

CHANNEL_OPTIONS = (
    # A dead path is noticed after 40 s at the latest, not after the kernel's many minutes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A new channel must not inherit the dead connection of the one that it replaces.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
)
EMULATOR_OPTIONS = (
    *CHANNEL_OPTIONS,
    # It is on this machine or near it, without TLS: HTTPS_PROXY is not for it.
    ("grpc.enable_http_proxy", 0),
)
SCOPES = PublisherGrpcTransport.AUTH_SCOPES
LIST_METHOD = "/google.pubsub.v1.Publisher/ListTopicSubscriptions"

ListRequest = _ListRequest.pb()
ListResponse = _ListResponse.pb()


def routing(topic: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata by which Google's front ends route a call about ``topic``.

    Percent-encoded, as Google's own clients do it (https://google.aip.dev/client-libraries/4222):
    a topic's name may contain ``+`` and ``%``.
    """
    return (routing_header.to_grpc_metadata((("topic", topic),)),)


def is_global(settings: Settings) -> bool:
    """Return whether publishing goes to the endpoint that chooses a region for each request."""
    if settings.pubsub_emulator_host:
        return False
    host = settings.pubsub_endpoint.partition(":")[0]
    return host in {"", PublisherClient.DEFAULT_ENDPOINT}


def target(settings: Settings) -> str:
    """Return HOST:PORT of the service itself."""
    host = settings.pubsub_endpoint or PublisherClient.DEFAULT_ENDPOINT
    # A colon may be IPv6's.
    return host if host.rpartition(":")[2].isdigit() else f"{host}:443"


def missing_access(settings: Settings) -> Fault | None:
    """Return why nothing could be published now; None if nothing is seen. Of any thread.

    The topic is not looked at: who may publish to it need not be allowed to see it.
    """
    if settings.pubsub_emulator_host:
        return None
    return why_no_access(SCOPES, settings.google_application_credentials, target(settings))


def call_fault(settings: Settings, words: str, credentials: Credentials | None) -> Fault | None:
    """Return the fault to report for a call without a token or a trusted connection.

    Args:
        settings: Where it led.
        words: Of its status.
        credentials: Those of the call; None for an emulator.

    Returns:
        None for a call that failed in another way.
    """
    return grpc_fault(words, target(settings), credentials)


class Connection(NamedTuple):
    """A client with a channel of its own."""

    client: PublisherClient
    channel: grpc.Channel
    credentials: Credentials | None
    """None for an emulator."""

    def close(self) -> None:
        """Close the channel."""
        self.client.transport.close()


def connect(settings: Settings) -> Connection:
    """Return a new connection.

    Raises:
        FaultError: There are no credentials, or the client cannot be built now.
    """
    if settings.pubsub_emulator_host:
        channel = grpc.insecure_channel(settings.pubsub_emulator_host, options=EMULATOR_OPTIONS)
        transport = PublisherGrpcTransport(channel=channel, credentials=AnonymousCredentials())
        return Connection(PublisherClient(transport=transport), channel, None)
    host = target(settings)
    credentials = find_credentials(SCOPES, settings.google_application_credentials)
    try:
        channel = PublisherGrpcTransport.create_channel(
            host,
            credentials=credentials,
            scopes=SCOPES,
            ssl_credentials=grpc.ssl_channel_credentials(authorities.renewed()),
            options=CHANNEL_OPTIONS,
        )
    except (GoogleAuthError, OSError, ValueError) as error:
        raise FaultError(cannot_build(error)) from error
    transport = PublisherGrpcTransport(host=host, channel=channel)
    return Connection(PublisherClient(transport=transport), channel, credentials)


class CallError(Exception):
    """A call that ended with another status than OK."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


def subscription_lister(
    channel: grpc.Channel, topic: str, timeout_s: float
) -> Callable[[], list[str]]:
    """Return a function that lists the first subscriptions of ``topic``, or raises CallError."""
    call = channel.unary_unary(
        LIST_METHOD,
        request_serializer=ListRequest.SerializeToString,
        response_deserializer=ListResponse.FromString,
    )

    def subscriptions() -> list[str]:
        try:
            answer = call(ListRequest(topic=topic), timeout=timeout_s, metadata=routing(topic))
        except grpc.RpcError as error:
            raise CallError(error.code().name, error.details() or "") from error
        return list(answer.subscriptions)

    return subscriptions
