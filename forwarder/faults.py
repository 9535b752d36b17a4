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


GRPC_CODES = {
    "ABORTED": Blame.NOBODY,
    "ALREADY_EXISTS": Blame.NOBODY,
    "CANCELLED": Blame.NOBODY,
    "DATA_LOSS": Blame.NOBODY,
    "DEADLINE_EXCEEDED": Blame.NOBODY,
    "FAILED_PRECONDITION": Blame.OPERATOR,
    "INTERNAL": Blame.NOBODY,
    "INVALID_ARGUMENT": Blame.ROWS,
    "NOT_FOUND": Blame.OPERATOR,
    "OUT_OF_RANGE": Blame.ROWS,
    "PERMISSION_DENIED": Blame.OPERATOR,
    "RESOURCE_EXHAUSTED": Blame.NOBODY,
    "UNAUTHENTICATED": Blame.OPERATOR,
    "UNAVAILABLE": Blame.NOBODY,
    "UNIMPLEMENTED": Blame.OPERATOR,
    "UNKNOWN": Blame.NOBODY,
}
"""https://cloud.google.com/pubsub/docs/reference/error-codes. Of a code that is not here nobody
knows that it is anybody's fault."""

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

HTTP_STATUSES = {
    400: Blame.ROWS,
    401: Blame.OPERATOR,
    402: Blame.OPERATOR,
    403: Blame.OPERATOR,
    404: Blame.OPERATOR,
    407: Blame.OPERATOR,
    413: Blame.ROWS,
}
"""All others pass by themselves, or are not known to be anybody's fault."""

PLUGIN_FAILURE = "Getting metadata from plugin failed"
"""Of a gRPC call that could not have an access token, for whatever reason."""

_CLOCK_WORDS = ("short-lived token", "reasonable timeframe", "iat and exp")
"""Google's, of a token request whose times are not of today. A key has no part in that."""


class FaultError(Exception):
    """Carries a fault from where it is found to where the delivery is reported."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def access_hold(problem: str, remedy: str) -> Fault:
    """Return the fault to report where every request lacks the same, until a person acts."""
    return Fault(FaultKind.HOLD, problem, remedy, of_access=True)


def blame_grpc(code: str) -> Blame:
    """Return who has to act after a call ended with the gRPC status ``code``."""
    return GRPC_CODES.get(code, Blame.NOBODY)


def blame_http(status: int, reason: str) -> Blame:
    """Return who has to act after an HTTP error with BigQuery's ``reason``.

    Args:
        status: The HTTP status.
        reason: ``error.errors[0].reason``; empty if there is none.
    """
    if reason in TRANSIENT_REASONS:
        return Blame.NOBODY
    return HTTP_STATUSES.get(status, Blame.NOBODY)


CREDENTIALS_REMEDY = (
    "check GOOGLE_APPLICATION_CREDENTIALS: the key may be revoked, expired or unreadable; list "
    "keys with: gcloud iam service-accounts keys list --iam-account=ACCOUNT"
)
CLOCK_REMEDY = (
    "this machine's clock is wrong: look at it with timedatectl, and let it be set by: "
    "timedatectl set-ntp true"
)


def credentials_remedy(words: str) -> str:
    """Return what to do about credentials that are refused in these words."""
    wrong_clock = any(part in words for part in _CLOCK_WORDS)
    return CLOCK_REMEDY if wrong_clock else CREDENTIALS_REMEDY
