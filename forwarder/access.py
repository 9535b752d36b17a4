"""Google's credentials: found, and judged when no access token can be had with them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import google.auth
from google.auth.credentials import Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError
from google.auth.transport.requests import Request

from forwarder import authorities
from forwarder.certificates import certificate_fault, refused_certificate
from forwarder.faults import (
    CREDENTIALS_REMEDY,
    PLUGIN_FAILURE,
    FaultError,
    access_hold,
    credentials_remedy,
)
from forwarder.keyfile import file_fault, is_of_a_file, key_file_fault, missing_file_remedy
from forwarder.sharedcall import SharedCall
from forwarder.sink import Fault, FaultKind

TOKEN_DEADLINE_S = 5.0
"""Of each request for a token that is made to learn why there is none; google-auth tries three
times, and gives each of the host's addresses so long."""

TOKEN_WAIT_S = 30.0
"""For all of that, and for the host's name."""

_tokens: SharedCall[None] = SharedCall("an access token")
"""Of the process: nobody else gives up waiting, and asks again."""

_checks: SharedCall[None] = SharedCall("an access token")
"""The same for checks, whose credentials are those of now."""


def find_credentials(scopes: Sequence[str], key_file: str = "") -> Credentials:
    """Return the credentials that the environment names, read again; the authorities as well.

    Args:
        scopes: What they are for.
        key_file: What GOOGLE_APPLICATION_CREDENTIALS names, if anything.

    Raises:
        FaultError: There are none, or they cannot be had now.
    """
    authorities.renewed()
    if key_file and (fault := key_file_fault(key_file)) is not None:
        raise FaultError(fault)
    try:
        credentials, _ = google.auth.default(scopes=scopes)
    except DefaultCredentialsError as error:
        # In google-auth's first words alone: what else it carries may quote the key file itself.
        words = str(error.args[0] if error.args else type(error).__name__)
        remedy = missing_file_remedy(words) or CREDENTIALS_REMEDY
        raise FaultError(access_hold(f"no credentials: {words}", remedy)) from error
    except (AttributeError, KeyError, TypeError) as error:
        # google-auth does not look whether the file's JSON is an object of texts.
        problem = f"no credentials: the key file is none ({type(error).__name__})"
        raise FaultError(access_hold(problem, CREDENTIALS_REMEDY)) from error
    except (GoogleAuthError, OSError, ValueError) as error:
        # Some kinds of credentials already call the network when they are made.
        raise FaultError(cannot_build(error)) from error
    return credentials


def cannot_build(error: Exception) -> Fault:
    """Return the fault to report when a client cannot be made for the time being."""
    problem = f"cannot build the client: {error}"
    return access_fault(error) or Fault(FaultKind.TRANSIENT, problem)


def access_fault(error: BaseException, host: str = "", port: int = 443) -> Fault | None:
    """Return the fault to report for a file or a certificate; None if it is of another kind.

    A person has to act on both, and libraries tell of both as of a network that is down.

    Args:
        error: What a library has raised.
        host: Who was called, if the error does not say.
        port: Its port.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and is_of_a_file(cause):
            return file_fault(cause)
        cause = cause.__cause__
    return certificate_fault(str(error), host, port)


def token_fault(error: Exception) -> Fault:
    """Return the fault to report for an access token that could not be had.

    A revoked or expired key wants a person; a network that is down, or a token endpoint that
    is away, wants time.
    """
    if (fault := access_fault(error)) is not None:
        return fault
    problem = f"no access token: {type(error).__name__}: {error}"
    if isinstance(error, RefreshError) and not error.retryable and not _of_the_network(error):
        words = str(error)
        return access_hold(problem, missing_file_remedy(words) or credentials_remedy(words))
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
    try:
        fault = _refused_token(credentials, _tokens)
    except TimeoutError as error:
        return Fault(FaultKind.TRANSIENT, f"{error}; {details}")
    return fault or Fault(FaultKind.TRANSIENT, f"no access token, a moment ago: {details}")


def _refused_token(
    credentials: Credentials, tokens: SharedCall[None], *, fresh: bool = False
) -> Fault | None:
    """Ask for a token; return why there is none. Raises TimeoutError."""
    request: Any = partial(Request(), timeout=TOKEN_DEADLINE_S)
    try:
        tokens.result(partial(credentials.refresh, request), TOKEN_WAIT_S, fresh=fresh)
    except TimeoutError:
        raise  # no answer yet, of no kind
    except (GoogleAuthError, OSError, ValueError) as error:  # the latter two of files that it reads
        return token_fault(error)
    return None


def grpc_fault(details: str, target: str, credentials: Credentials | None) -> Fault | None:
    """Return the fault to report for a call that could not be made; None for any other.

    Args:
        details: The words of its status.
        target: HOST:PORT.
        credentials: Those of the call; None for an emulator.
    """
    if credentials is None:
        return None
    if PLUGIN_FAILURE in details:
        return why_no_token(credentials, details)
    host, _, port = target.rpartition(":")
    return certificate_fault(details, host.strip("[]"), int(port))


def why_no_access(scopes: Sequence[str], key_file: str, target: str = "") -> Fault | None:
    """Find out whether a delivery could have what it takes: credentials, a token, a trusted host.

    Nothing of it is kept, so it may be asked in any thread.

    Args:
        scopes: What the credentials are for.
        key_file: What GOOGLE_APPLICATION_CREDENTIALS names, if anything.
        target: HOST:PORT of a gRPC service, if there is one.

    Returns:
        What is missing; None if nothing is.
    """
    try:
        credentials = find_credentials(scopes, key_file)
        fault = _refused_token(credentials, _checks, fresh=True)
        return fault or (refused_certificate(target, authorities.renewed()) if target else None)
    except FaultError as error:
        return error.fault
    except TimeoutError as error:
        return Fault(FaultKind.TRANSIENT, str(error))
