"""What a service's refusal means: the one table for gRPC codes and HTTP statuses."""

from enum import Enum

from forwarder.sink import Fault, FaultKind


class Blame(Enum):
    """Who has to act after a refused request."""

    NOBODY = "transient"
    """It will pass: try again."""
    OPERATOR = "hold"
    """Configuration or permission: hold until somebody mends it."""
    ROWS = "rows"
    """One of the rows in the request: find it."""


TRANSIENT_CODES = frozenset(
    {
        "ABORTED",
        "CANCELLED",
        "DEADLINE_EXCEEDED",
        "INTERNAL",
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "UNKNOWN",
    }
)
"""https://cloud.google.com/pubsub/docs/reference/error-codes: those worth another try."""

HOLD_CODES = frozenset(
    {"NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED", "FAILED_PRECONDITION", "UNIMPLEMENTED"}
)
ROW_CODES = frozenset({"INVALID_ARGUMENT", "OUT_OF_RANGE"})

TRANSIENT_REASONS = frozenset(
    {
        "backendError",
        "internalError",
        "quotaExceeded",
        "rateLimitExceeded",
        "timeout",
        "jobBackendError",
        "jobInternalError",
        "jobRateLimitExceeded",
        "tableUnavailable",
    }
)
"""https://cloud.google.com/bigquery/docs/error-messages: those that pass by themselves. A
quota counts among them, although it comes as HTTP 403."""

HTTP_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
HTTP_HOLD = frozenset({401, 402, 403, 404, 407})
HTTP_ROWS = frozenset({400, 413})

PLUGIN_FAILURE = "Getting metadata from plugin failed"
_NETWORK_WORDS = (
    "ConnectionError",
    "TransportError",
    "Max retries",
    "timed out",
    "Timeout",
    "resolve",
    "Connection refused",
    "unreachable",
)


def blame_grpc(code: str) -> Blame:
    """Return who has to act after a call ended with the gRPC status ``code``."""
    if code in HOLD_CODES:
        return Blame.OPERATOR
    return Blame.ROWS if code in ROW_CODES else Blame.NOBODY


def blame_http(status: int, reason: str) -> Blame:
    """Return who has to act after an HTTP error with BigQuery's ``reason``.

    Args:
        status: The HTTP status.
        reason: ``error.errors[0].reason``; empty if there is none.
    """
    if reason in TRANSIENT_REASONS or status in HTTP_TRANSIENT:
        return Blame.NOBODY
    if status in HTTP_HOLD:
        return Blame.OPERATOR
    return Blame.ROWS if status in HTTP_ROWS else Blame.NOBODY


def credential_fault(details: str) -> Fault | None:
    """Return a fault that names the credentials, if ``details`` is about them.

    A revoked or expired key arrives as UNAVAILABLE with this text, and so does a network
    that is down while a token has to be renewed: the former wants a person, the latter time.
    """
    if PLUGIN_FAILURE not in details:
        return None
    network = any(word in details for word in _NETWORK_WORDS) and "invalid_grant" not in details
    return Fault(
        FaultKind.TRANSIENT if network else FaultKind.HOLD,
        f"no access token could be had (credentials): {details}",
        "" if network else CREDENTIALS_REMEDY,
    )


def credentials_problem(error: Exception) -> str:
    """Return why there are no credentials, in google-auth's first words alone.

    What else such an error carries may quote the key file itself.
    """
    return f"no credentials: {error.args[0] if error.args else type(error).__name__}"


CREDENTIALS_REMEDY = (
    "check GOOGLE_APPLICATION_CREDENTIALS: the key may be revoked, expired or unreadable; list "
    "keys with: gcloud iam service-accounts keys list --iam-account=ACCOUNT"
)
