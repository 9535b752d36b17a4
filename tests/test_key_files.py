"""A file of credentials that cannot be used is a hold with the command that helps."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import google.auth.identity_pool
import google.oauth2.credentials
import google.oauth2.service_account
import pytest

from forwarder.access import find_credentials, token_fault, why_no_access, why_no_token
from forwarder.faults import FaultError
from forwarder.keyfile import account
from forwarder.sink import Fault, FaultKind
from tests.torture.token_server import TokenServer

SCOPES = ["https://www.googleapis.com/auth/pubsub"]
NOBODY = 65_534
LOADED = (google.auth.identity_pool, google.oauth2.credentials, google.oauth2.service_account)
"""Before this process becomes another user, who may not be able to read the libraries."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user may enter."""
    with tempfile.TemporaryDirectory(prefix="keys-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root reads everything; so be another for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def fault_with(key: Path, monkeypatch: pytest.MonkeyPatch) -> Fault:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with as_ordinary_user(), pytest.raises(FaultError) as caught:
        find_credentials(SCOPES, str(key))
    return caught.value.fault


def test_a_key_of_roots_own_is_a_hold_with_the_exact_command(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = place / "key.json"
    key.write_text("{}", encoding="utf-8")
    key.chmod(0o600 if os.geteuid() == 0 else 0)
    fault = fault_with(key, monkeypatch)
    with as_ordinary_user():
        user, group = account()
    assert fault.kind is FaultKind.HOLD
    assert f"cannot read {key}: Permission denied" in fault.problem
    assert f"chown {user}:{group} {key} && chmod 0400 {key}" in fault.remedy
    # The same where the settings do not say which file it is.
    with as_ordinary_user(), pytest.raises(FaultError) as caught:
        find_credentials(SCOPES)
    assert caught.value.fault == fault


@pytest.mark.parametrize("kind", ["directory", "missing", "below a file", "closed directory"])
def test_a_key_that_is_no_file_is_a_hold_that_says_what_to_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    key = place / "key.json"
    wanted = "install -o"
    if kind == "directory":
        key.mkdir()
        wanted = "is a directory"
    elif kind == "below a file":
        key.write_text("", encoding="utf-8")
        key /= "key.json"
    elif kind == "closed directory":
        (place / "own").mkdir(mode=0o700 if os.geteuid() == 0 else 0)
        key = place / "own" / "key.json"
        wanted = f"may not enter {place / 'own'}"
    fault = fault_with(key, monkeypatch)
    assert fault.kind is FaultKind.HOLD
    assert fault.of_access
    assert str(key) in fault.problem
    assert wanted in fault.remedy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"{", "is no key"),
        (b"\xff\xfe", "is no key"),
        (b"[1]", "is no key"),
        (b"{}", "is no key"),
        (b'{"type": "something"}', "valid type"),
        (b'{"type": "service_account"}', "no credentials"),
    ],
)
def test_a_file_that_is_no_key_is_a_hold(
    place: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    key = place / "key.json"
    key.write_bytes(content)
    fault = fault_with(key, monkeypatch)
    assert fault.kind is FaultKind.HOLD
    assert words in fault.problem
    assert fault.remedy


def workload_identity(place: Path, source: Path, token_url: str) -> Path:
    key = place / "key.json"
    account_of_elsewhere = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": token_url,
        "credential_source": {"file": str(source)},
    }
    key.write_text(json.dumps(account_of_elsewhere), encoding="utf-8")
    return key


@pytest.mark.parametrize("kind", ["unreadable", "missing", "directory"])
def test_the_file_that_a_workload_identity_names_is_judged_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = place / "token"
    if kind == "directory":
        source.mkdir()
    elif kind == "unreadable":
        source.write_text("a token", encoding="utf-8")
        source.chmod(0o600 if os.geteuid() == 0 else 0)
    key = workload_identity(place, source, "https://sts.googleapis.com/v1/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "p-1")
    with as_ordinary_user():
        credentials = find_credentials(SCOPES, str(key))
        faults = [
            why_no_token(credentials, "Getting metadata from plugin failed"),
            why_no_access(SCOPES, str(key)),
        ]
    for fault in faults:
        assert fault is not None
        assert fault.kind is FaultKind.HOLD
        assert str(source) in fault.problem
        assert str(source) in fault.remedy


def test_an_open_that_failed_for_want_of_descriptors_is_no_hold() -> None:
    assert token_fault(OSError(24, "Too many open files", "/etc/sluice/key.json")).kind is (
        FaultKind.TRANSIENT
    )


def test_a_key_that_was_corrected_is_used_at_the_next_try(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = place / "key.json"
    with TokenServer() as tokens:
        tokens.make_key(key)
        key.chmod(0o600 if os.geteuid() == 0 else 0)
        assert fault_with(key, monkeypatch).kind is FaultKind.HOLD
        key.chmod(0o444)
        with as_ordinary_user():
            assert why_no_access(SCOPES, str(key)) is None
        assert tokens.asked == 1
