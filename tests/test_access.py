"""forwarder/access.py: why there is no access token, by a token endpoint in small."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError

import forwarder.access
from forwarder.access import find_credentials, token_fault, why_no_token
from forwarder.faults import CLOCK_REMEDY, CREDENTIALS_REMEDY, FaultError
from forwarder.sink import FaultKind
from forwarder.writeapi import WriteApi
from lifecycle import load_settings
from tests.torture.token_server import Mood, TokenServer

SCOPES = ["https://www.googleapis.com/auth/pubsub"]
DETAILS = "Getting metadata from plugin failed with error: something"


def raised(error: GoogleAuthError, *causes: Exception) -> GoogleAuthError:
    """Return ``error`` as it is when the others stand behind it."""
    last: Exception = error
    for cause in causes:
        last.__cause__ = cause
        last = cause
    return error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RefreshError("invalid_grant: Invalid JWT Signature."), CREDENTIALS_REMEDY),
        (RefreshError("invalid_grant: account not found"), CREDENTIALS_REMEDY),
        (raised(RefreshError("404"), TransportError("no account")), CREDENTIALS_REMEDY),
        (RefreshError("Check your iat and exp values in the JWT claim."), CLOCK_REMEDY),
        (RefreshError("Token must be a short-lived token"), CLOCK_REMEDY),
        (RefreshError("internal_failure", retryable=True), None),
        (TransportError("Max retries exceeded"), None),
        (TransportError("invalid_grant is not said by a network"), None),
        (raised(RefreshError("x"), TransportError("x"), ConnectionError("metadata server")), None),
    ],
)
def test_what_a_person_can_mend_is_a_hold_and_what_time_mends_is_not(
    error: GoogleAuthError, remedy: str | None
) -> None:
    fault = token_fault(error)
    assert fault.kind is (FaultKind.HOLD if remedy else FaultKind.TRANSIENT)
    assert fault.remedy == (remedy or "")
    assert str(error) in fault.problem


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TokenServer]:
    with TokenServer() as server:
        server.make_key(tmp_path / "key.json")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
        yield server


@pytest.mark.parametrize(
    ("mood", "kind", "remedy"),
    [
        (Mood.GOOD, FaultKind.TRANSIENT, ""),
        (Mood.GONE, FaultKind.TRANSIENT, ""),
        (Mood.BROKEN, FaultKind.TRANSIENT, ""),
        (Mood.REVOKED, FaultKind.HOLD, CREDENTIALS_REMEDY),
        (Mood.SKEWED, FaultKind.HOLD, CLOCK_REMEDY),
    ],
)
def test_a_token_is_asked_for_to_learn_why_there_is_none(
    tokens: TokenServer, mood: Mood, kind: FaultKind, remedy: str
) -> None:
    tokens.mood = mood
    fault = why_no_token(find_credentials(SCOPES), DETAILS)
    assert (fault.kind, fault.remedy) == (kind, remedy)
    assert tokens.asked
    assert "timedatectl" in CLOCK_REMEDY


def test_a_token_endpoint_that_does_not_answer_is_left_soon(
    tokens: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.access, "TOKEN_DEADLINE_S", 0.05)
    tokens.mood = Mood.SILENT
    fault = why_no_token(find_credentials(SCOPES), DETAILS)
    assert fault.kind is FaultKind.TRANSIENT
    assert "read timeout=0.05" in fault.problem


def test_a_token_that_takes_for_ever_is_not_waited_for(
    tokens: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.access, "TOKEN_WAIT_S", 0.2)
    monkeypatch.setattr(forwarder.access, "TOKEN_DEADLINE_S", 1.0)
    tokens.mood = Mood.SILENT
    fault = why_no_token(find_credentials(SCOPES), DETAILS)
    assert fault.kind is FaultKind.TRANSIENT
    assert "no answer within" in fault.problem
    assert DETAILS in fault.problem


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"type": "service_account"}', '{"type": ["service_account"]}'],
)
def test_a_file_that_is_no_key_is_a_hold_until_it_is_one(
    tokens: TokenServer, tmp_path: Path, content: str
) -> None:
    find_credentials(SCOPES)
    (tmp_path / "key.json").write_text(content, encoding="utf-8")
    with pytest.raises(FaultError) as caught:
        find_credentials(SCOPES)
    assert caught.value.fault.kind is FaultKind.HOLD
    tokens.make_key(tmp_path / "key.json", "second")
    assert find_credentials(SCOPES)


def test_an_emulator_of_the_write_api_has_no_credentials_to_judge() -> None:
    environment = {"APP_ENV": "LOCAL", "BIGQUERY_STORAGE_EMULATOR_HOST": "localhost:1"}
    environment["BIGQUERY_EMULATOR_HOST"] = "http://localhost:1"
    api = WriteApi(load_settings(environment, "gate"), "projects/p/datasets/d/tables/t")
    assert api.access_fault(DETAILS) is None
