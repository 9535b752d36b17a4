"""Google's credentials: found, and judged when no access token can be had with them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import google.auth
from google.auth.credentials import Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.auth.transport.requests import Request

from forwarder.faults import CREDENTIALS_REMEDY, FaultError, credentials_remedy
from forwarder.sharedcall import SharedCall
from forwarder.sink import Fault, FaultKind

TOKEN_DEADLINE_S = 5.0
"""Of each request for a token that is made to learn why there is none; google-auth tries three
times, and gives each of the host's addresses so long."""

TOKEN_WAIT_S = 30.0
"""For all of that, and for the host's name."""

_tokens: SharedCall[None] = SharedCall("an access token")
"""Of the process: nobody else gives up waiting, and asks again."""


def find_credentials(scopes: Sequence[str]) -> Credentials:
    """Return the credentials that the environment names, read anew.

    Args:
        scopes: What they are for.

    Raises:
        FaultError: There are none, or they cannot be had now.
    """
    try:
        credentials, _ = google.auth.default(scopes=scopes)
    except DefaultCredentialsError as error:
        # In google-auth's first words alone: what else it carries may quote the key file itself.
        words = error.args[0] if error.args else type(error).__name__
        raise FaultError(
            Fault(FaultKind.HOLD, f"no credentials: {words}", CREDENTIALS_REMEDY)
        ) from error
    except (AttributeError, KeyError, TypeError) as error:
        # google-auth does not look whether the file's JSON is an object of texts.
        problem = f"no credentials: the key file is none ({type(error).__name__})"
        raise FaultError(Fault(FaultKind.HOLD, problem, CREDENTIALS_REMEDY)) from error
    except (GoogleAuthError, OSError, ValueError) as error:
        # Some kinds of credentials already call the network when they are made.
        raise FaultError(cannot_build(error)) from error
    return credentials


def cannot_build(error: Exception) -> Fault:
    """Return the fault to report when a client cannot be made for the time being."""
    return Fault(FaultKind.TRANSIENT, f"cannot build the client: {error}")


def token_fault(error: GoogleAuthError) -> Fault:
    """Return the fault to report for an access token that could not be had.

    A revoked or expired key wants a person; a network that is down, or a token endpoint that
    is away, wants time.
    """
    problem = f"no access token: {type(error).__name__}: {error}"
    if isinstance(error, RefreshError) and not error.retryable and not _of_the_network(error):
        return Fault(FaultKind.HOLD, problem, credentials_remedy(str(error)))
    return Fault(FaultKind.TRANSIENT, problem)


def _of_the_network(error: BaseException) -> bool:
    """Return whether a broken connection stands behind it, as with a VM's metadata server."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, OSError) or _of_the_network(cause))


def why_no_token(credentials: Credentials, details: str) -> Fault:
    """Ask for a token, and return the fault to report for a call that could not have one.

    gRPC tells of a revoked key and of a network that is down with the same status, and in
    words alone; the error itself says which it is.

    Args:
        credentials: Those of the call.
        details: The words of its status.
    """
    request: Any = partial(Request(), timeout=TOKEN_DEADLINE_S)
    try:
        _tokens.result(partial(credentials.refresh, request), TOKEN_WAIT_S)
    except GoogleAuthError as error:
        return token_fault(error)
    except TimeoutError as error:
        return Fault(FaultKind.TRANSIENT, f"{error}; {details}")
    return Fault(FaultKind.TRANSIENT, f"no access token, a moment ago: {details}")
