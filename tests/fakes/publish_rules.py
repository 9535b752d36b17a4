"""What Pub/Sub documents about a publish request, as one function that refuses.

Google's emulator enforces almost none of this, which is why a client that was
only ever tested against it fails in production.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import grpc

MAX_MESSAGES = 1_000
MAX_REQUEST_BYTES = 10_000_000
MAX_ORDERING_KEY_BYTES = 1_024
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_KEY_BYTES = 256
MAX_ATTRIBUTE_VALUE_BYTES = 1_024
# Attribute keys found good, so that each is looked at once and not per message.
# Bounded: a client that makes keys up must not make the fake grow.
MAX_KNOWN_KEYS = 10_000

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_SEE_QUOTAS = "Refer to https://cloud.google.com/pubsub/quotas for more information."


class Refusal(Exception):  # noqa: N818 - an answer of the service, not a mishap of the fake
    """The service's answer to a request that it does not carry out."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class WireMessage(Protocol):
    """The part of a raw `PubsubMessage` that the rules look at."""

    data: bytes
    ordering_key: str
    attributes: Mapping[str, str]

    def ByteSize(self) -> int:  # noqa: N802 - protobuf's own name
        """Return the length of the message on the wire."""


class PublishRules:
    """Checks requests; remembers good attribute keys, which makes it fast."""

    def __init__(self) -> None:
        self._good_keys: set[str] = set()

    def check(
        self,
        messages: Sequence[WireMessage],
        request_bytes: int,
        poison: Callable[[bytes], bool] | None,
    ) -> str:
        """Raise `Refusal` unless the service would take the request; return its ordering key."""
        key = check_request(messages, request_bytes)
        good_keys = self._good_keys
        for message in messages:
            if message.ordering_key != key:
                raise Refusal(
                    _INVALID,
                    "In a single publish request, all messages must have no ordering key or they "
                    "must all have the same ordering key.",
                )
            attributes = message.attributes
            if not good_keys.issuperset(attributes):
                self._check_keys(attributes)
            # A message that is short as a whole has no long value, nor too many of them.
            count = len(attributes)
            if message.ByteSize() > MAX_ATTRIBUTE_VALUE_BYTES or count > MAX_ATTRIBUTES:
                _check_values(attributes)
            if not count and not message.data:
                raise Refusal(
                    _INVALID,
                    "One or more messages in the publish request is empty. Each message must "
                    "contain either non-empty data, or at least one attribute.",
                )
            if poison is not None and poison(message.data):
                raise Refusal(
                    _INVALID, "Invalid data in message: Message failed schema validation."
                )
        return key

    def _check_keys(self, attributes: Mapping[str, str]) -> None:
        for key in attributes:
            length = len(key.encode())
            if length > MAX_ATTRIBUTE_KEY_BYTES:
                raise Refusal(
                    _INVALID,
                    f'The attribute "{key}" in the request has a key that is too long. The length '
                    f"is {length} characters, but the maximum allowed is "
                    f"{MAX_ATTRIBUTE_KEY_BYTES}. {_SEE_QUOTAS}",
                )
            if key.startswith("goog"):
                raise Refusal(
                    _INVALID, f'The attribute key "{key}" begins with the reserved prefix "goog".'
                )
            if len(self._good_keys) < MAX_KNOWN_KEYS:
                self._good_keys.add(key)


def check_request(messages: Sequence[WireMessage], request_bytes: int) -> str:
    """Raise `Refusal` for what the request as a whole shows; return its ordering key."""
    count = len(messages)
    if not count:
        raise Refusal(_INVALID, "The request contains no messages.")
    if count > MAX_MESSAGES:
        raise Refusal(
            _INVALID,
            f"The value for message_count is too large. You passed {count} in the request, "
            f"but the maximum value is {MAX_MESSAGES}.",
        )
    if request_bytes > MAX_REQUEST_BYTES:
        raise Refusal(
            _INVALID, f"Request payload size exceeds the limit: {MAX_REQUEST_BYTES} bytes."
        )
    key = messages[0].ordering_key
    if len(key.encode()) > MAX_ORDERING_KEY_BYTES:
        raise Refusal(
            _INVALID,
            f"The ordering key is too long. The length is {len(key.encode())} bytes, "
            f"but the maximum allowed is {MAX_ORDERING_KEY_BYTES}. {_SEE_QUOTAS}",
        )
    return key


def _check_values(attributes: Mapping[str, str]) -> None:
    if len(attributes) > MAX_ATTRIBUTES:
        raise Refusal(
            _INVALID,
            f"The value for attributes_count is too large. You passed {len(attributes)} in the "
            f"request, but the maximum value is {MAX_ATTRIBUTES}.",
        )
    for key, value in attributes.items():
        length = len(value.encode())
        if length > MAX_ATTRIBUTE_VALUE_BYTES:
            raise Refusal(
                _INVALID,
                f'The attribute "{key}" in the request has a value that is too long. The length '
                f"is {length} characters, but the maximum allowed is "
                f"{MAX_ATTRIBUTE_VALUE_BYTES}. {_SEE_QUOTAS}",
            )
