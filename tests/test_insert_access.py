"""The insertAll sink's way to the service: credentials, proxies, and whom it trusts."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import google.auth
import msgspec
import pytest
from google.auth.credentials import Credentials
from google.auth.exceptions import GoogleAuthError, RefreshError, TransportError

import forwarder.bqservice
from forwarder.__main__ import WATCHDOG_S
from forwarder.bigquery import DEADLINE_S, GIVE_BACK_AFTER_S, InsertAllSink
from forwarder.bqservice import CALL_WAIT_S, TableService
from forwarder.faults import FaultError
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.table import COLUMNS
from lifecycle import load_settings
from tests.fakes import FakeBigQuery
from tests.fakes.http1 import HOST, HttpServer, Reply, Request
from tests.fakes.relay import Proxy, Relay
from tests.insert_parts import Keys, made_keys
from tests.test_sink_contract import readings

TABLE = "p-1.d.readings"
PROXY_VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return made_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def fake() -> Iterator[FakeBigQuery]:
    with FakeBigQuery() as server:
        server.create_table(TABLE)
        yield server


ENVIRONMENT = {
    "APP_ENV": "DEV",
    "GCP_PROJECT_ID": "p-1",
    "BIGQUERY_DATASET": "d",
    "BIGQUERY_TABLE": "readings",
    "PUBSUB_ENABLED": "false",
    "BIGQUERY_WRITE_METHOD": "insert_all",
}


def made(endpoint: str) -> InsertAllSink:
    environment = {**ENVIRONMENT, "BIGQUERY_EMULATOR_HOST": endpoint}
    return InsertAllSink(load_settings(environment, "gate-1"))


class Account(Credentials):
    """Credentials whose tokens are numbered, and that need a new one for the first request."""

    def __init__(self) -> None:
        super().__init__()
        self.refreshed = 0
        self.error: GoogleAuthError | None = None

    def refresh(self, request: object) -> None:
        if self.error is not None:
            raise self.error
        assert callable(request)
        self.refreshed += 1
        self.token = f"token-{self.refreshed}"


@pytest.fixture
def account(fake: FakeBigQuery, monkeypatch: pytest.MonkeyPatch) -> Account:
    """Google's own endpoint and credentials, as far as the sink can tell."""
    found = Account()
    monkeypatch.setattr(google.auth, "default", lambda **_: (found, "p-1"))
    monkeypatch.setattr(forwarder.bqservice, "DEFAULT_ENDPOINT", fake.url)
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", fake.url)  # for Google's client
    return found


@pytest.fixture
def sink(account: Account) -> Iterator[InsertAllSink]:
    assert account
    opened = made("")
    yield opened
    opened.close()


def fault_of(delivery: Delivery, kind: FaultKind, rows: int) -> Fault:
    assert (len(delivery.retry), delivery.dead) == (rows, [])
    assert delivery.fault is not None
    assert delivery.fault.kind is kind
    return delivery.fault


def test_a_token_is_had_before_the_first_rows_and_kept(
    fake: FakeBigQuery, account: Account, sink: InsertAllSink
) -> None:
    for count in (1, 2, 3):
        assert sink.deliver(readings(1500)) == Delivery()
        assert fake.requests == 3 * count
    assert account.refreshed == 1


def test_a_token_that_expires_is_renewed_before_the_next_delivery(
    fake: FakeBigQuery, account: Account, sink: InsertAllSink
) -> None:
    assert sink.deliver(readings(1)) == Delivery()
    account.token = None
    assert sink.deliver(readings(1)) == Delivery()
    assert (account.refreshed, fake.requests) == (2, 2)


def test_a_token_that_is_refused_is_renewed_and_the_rows_are_inserted(
    fake: FakeBigQuery, account: Account, sink: InsertAllSink
) -> None:
    fake.faults.status(401, "authError", times=1)
    assert sink.deliver(readings(5)) == Delivery()
    assert (account.refreshed, fake.requests, fake.count) == (2, 2, 5)


def test_an_account_that_stays_refused_is_a_hold(
    fake: FakeBigQuery, account: Account, sink: InsertAllSink
) -> None:
    fake.faults.status(401, "authError", times=None)
    fault = fault_of(sink.deliver(readings(5)), FaultKind.HOLD, 5)
    assert "GOOGLE_APPLICATION_CREDENTIALS" in fault.remedy
    assert (account.refreshed, fake.requests) == (2, 2)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("error", [RefreshError("revoked"), TransportError("away")])
def test_a_token_that_cannot_be_had_keeps_the_rows(
    fake: FakeBigQuery,
    account: Account,
    sink: InsertAllSink,
    refused: bool,  # noqa: FBT001 - a parameter of the test
    error: GoogleAuthError,
) -> None:
    if refused:
        assert sink.deliver(readings(1)) == Delivery()
        fake.faults.status(401, "authError", times=1)
    account.error = error
    kind = FaultKind.HOLD if isinstance(error, RefreshError) else FaultKind.TRANSIENT
    fault = fault_of(sink.deliver(readings(5)), kind, 5)
    assert str(error) in fault.problem
    account.error = None
    assert sink.deliver(readings(5)) == Delivery()


def test_after_a_hold_the_credentials_are_read_anew(
    fake: FakeBigQuery, account: Account, sink: InsertAllSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key file may be another one by then."""
    assert sink.deliver(readings(1)) == Delivery()
    fake.faults.status(403, "accessDenied", times=1)
    fault_of(sink.deliver(readings(5)), FaultKind.HOLD, 5)
    other = Account()
    monkeypatch.setattr(google.auth, "default", lambda **_: (other, "p-1"))
    assert sink.deliver(readings(5)) == Delivery()
    assert (account.refreshed, other.refreshed) == (1, 1)


def test_an_emulator_that_wants_credentials_is_a_hold(fake: FakeBigQuery) -> None:
    """There are none to renew; only that must not hide what it said."""
    fake.faults.status(401, "authError", "who are you", times=None)
    sink = made(fake.url)
    fault = fault_of(sink.deliver(readings(5)), FaultKind.HOLD, 5)
    assert "who are you" in fault.problem
    sink.close()


def test_a_proxy_of_the_environment_is_used_for_rows_and_schema_alike(
    fake: FakeBigQuery, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Relay(fake.port, keys.server) as front, Proxy(front.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"{HOST}:{proxy.port}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(keys.authority))
        sink = made("https://localhost")
        assert sink.deliver(readings(5)) == Delivery()
        sink.close()
        asked = [head.splitlines()[0] for head in proxy.heads]
    assert asked == ["CONNECT localhost:443 HTTP/1.0"] * 2
    assert fake.count == 5


def test_a_name_that_needs_no_proxy_is_asked_itself(
    fake: FakeBigQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:1")  # where nobody listens
    monkeypatch.setenv("NO_PROXY", HOST)
    sink = made(fake.url)
    assert sink.deliver(readings(5)) == Delivery()
    sink.close()


def test_a_service_that_cannot_prove_its_name_gets_no_rows(fake: FakeBigQuery, keys: Keys) -> None:
    with Relay(fake.port, keys.server) as front:
        sink = made(f"https://localhost:{front.port}")
        sink._columns = COLUMNS  # noqa: SLF001 - Google's client would refuse it first
        fault = fault_of(sink.deliver(readings(5)), FaultKind.HOLD, 5)
        sink.close()
    assert f"the certificate of localhost:{front.port} is refused" in fault.problem
    assert "CLOUD_CA_FILE" in fault.remedy
    assert fake.requests == 0


def test_a_proxy_that_is_not_understood_is_a_hold_that_says_so(
    fake: FakeBigQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://proxy:1080")
    sink = made(fake.url)
    fault = fault_of(sink.deliver(readings(5)), FaultKind.HOLD, 5)
    assert "socks5://proxy" in fault.problem
    assert "HTTPS_PROXY" in fault.remedy
    sink.close()


@pytest.mark.parametrize(
    "body", [b"", b"<html>log in first</html>", b"[]", b"null", b'{"insertErrors": {"0": "bad"}}']
)
def test_a_success_that_is_not_the_services_delivers_nothing(body: bytes) -> None:
    def answer(request: Request) -> Reply:
        fields: list[Mapping[str, Any]] = [
            {"name": c.name, "type": c.sql_type, "mode": "NULLABLE"} for c in COLUMNS
        ]
        return Reply(200, body if request.method == "POST" else schema(fields))

    server = HttpServer(answer)
    server.start()
    sink = made(f"http://{HOST}:{server.port}")
    fault_of(sink.deliver(readings(5)), FaultKind.TRANSIENT, 5)
    sink.close()
    server.stop()


def schema(fields: list[Mapping[str, Any]]) -> bytes:
    """Return a table as tables.get describes it."""
    reference = {"projectId": "p-1", "datasetId": "d", "tableId": "readings"}
    return msgspec.json.encode({"tableReference": reference, "schema": {"fields": fields}})


class FarAccount(Account):
    """Has its tokens from a host that lets everybody wait."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.waiting = 0

    def refresh(self, request: object) -> None:
        self.waiting += 1
        assert self.answers.wait(10.0)
        super().refresh(request)


@pytest.mark.parametrize("call", ["session", "read_columns"])
def test_who_is_never_answered_is_told_so_and_asks_once(
    monkeypatch: pytest.MonkeyPatch, fake: FakeBigQuery, call: str
) -> None:
    account = FarAccount()
    monkeypatch.setattr(google.auth, "default", lambda **_: (account, "p-1"))
    monkeypatch.setattr(forwarder.bqservice, "DEFAULT_ENDPOINT", fake.url)
    monkeypatch.setenv("BIGQUERY_EMULATOR_HOST", fake.url)  # for Google's client
    monkeypatch.setattr(forwarder.bqservice, "CALL_WAIT_S", 0.2)
    service = TableService(load_settings(ENVIRONMENT, "gate-1"), DEADLINE_S, past_days=1825)
    for _ in range(3):
        with pytest.raises(FaultError, match="no answer within") as caught:
            getattr(service, call)()
        assert caught.value.fault.kind is FaultKind.TRANSIENT
    assert account.waiting == 1, "those who come later wait for the same answer"
    account.answers.set()
    deadline = time.monotonic() + 10.0
    while True:
        with contextlib.suppress(FaultError):
            getattr(service, call)()
            break
        assert time.monotonic() < deadline
    service.close()


def test_the_watchdog_waits_longer_than_any_lawful_silence() -> None:
    client_calls = 3 * CALL_WAIT_S  # a token, the schema, the table's creation
    last_request = 2 * DEADLINE_S + CALL_WAIT_S  # refused, and sent again with a new token
    schema_again = 3 * CALL_WAIT_S  # gone, made by somebody else, and read
    assert client_calls + GIVE_BACK_AFTER_S + last_request + schema_again < WATCHDOG_S
