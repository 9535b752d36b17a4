"""A firewall that inspects TLS, and credentials that are missing: told, also without readings."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forwarder.authorities import REQUESTS_VARIABLE, Authorities
from forwarder.faults import FaultError
from lifecycle import SettingsError, load_settings
from tests.harness import FORWARDERS, wait_until
from tests.torture.cloud_faults import METHODS
from tests.torture.google import HOSTS, Earnest, earnest
from tests.torture.tls_gate import Authority, TlsGate, server_context

READINGS = 50
SOON_S = 30.0
TOKEN_HOST = "oauth2.googleapis.com"  # noqa: S105 - a host


def wait_until_seen(system: Earnest, state: str, *words: str) -> None:
    """Wait until the operator sees of both sinks how they stand."""
    for sink in system.rig.sinks:

        def seen(sink: str = sink) -> bool:
            row = system.rig.books.backlog(sink)
            return row["state"] == state and all(word in row["detail"] for word in words)

        wait_until(seen, SOON_S, f"{sink} is {state}: {words}")


@contextmanager
def inspected(directory: Path, method: str, chosen: Path | None = None) -> Iterator[Earnest]:
    """A system whose firewall shows certificates of its own, for the tokens' host as well."""
    with earnest(directory, method) as system:
        for name in FORWARDERS:
            environment = system.rig.programs[name].environment
            environment["CLOUD_CA_FILE"] = str(chosen or "")
            del environment["REQUESTS_CA_BUNDLE"], environment["GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"]
        key = json.loads(system.key_file.read_text(encoding="utf-8"))
        port = int(key["token_uri"].rpartition(":")[2].partition("/")[0])
        ports = {**dict(zip(HOSTS, services(system), strict=True)), TOKEN_HOST: port}
        certificate = system.authority.issue("firewall", *HOSTS, TOKEN_HOST)
        with TlsGate(server_context(*certificate), ports) as gate:
            key["token_uri"] = f"https://{TOKEN_HOST}/token"
            system.key_file.write_text(json.dumps(key), encoding="utf-8")
            for name in FORWARDERS:
                system.rig.programs[name].environment["HTTPS_PROXY"] = gate.url
            system.gate = gate
            yield system


def services(system: Earnest) -> tuple[int, int, int]:
    cloud = system.rig.cloud
    return cloud.pubsub.port, cloud.bigquery.port, cloud.write_api.port


@pytest.mark.parametrize("method", METHODS)
def test_one_setting_is_for_tokens_rest_and_grpc_and_is_read_again(
    tmp_path: Path, method: str
) -> None:
    chosen = tmp_path / "chosen.crt"
    chosen.write_bytes(Authority(tmp_path, "stranger").certificate.read_bytes())
    with inspected(tmp_path, method, chosen) as system:
        system.rig.start()
        # No reading has come yet.
        wait_until_seen(
            system,
            "on hold",
            f"the certificate of {TOKEN_HOST}:443 is refused",
            "issuer CN=ca",
            "CLOUD_CA_FILE",
            "update-ca-certificates",
        )
        assert system.tokens.asked == 0
        system.rig.publish(READINGS)
        system.rig.wait_until_spooled()
        chosen.write_bytes(system.authority.certificate.read_bytes())
        system.rig.wait_until_delivered()
        system.rig.assert_nothing_lost()
        wait_until_seen(system, "delivering")
        assert {*HOSTS[:2], TOKEN_HOST} <= set(system.gate.accepted)


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"])
def test_a_standard_variable_is_for_all_three(tmp_path: Path, variable: str) -> None:
    with inspected(tmp_path, "storage") as system:
        for name in FORWARDERS:
            system.rig.programs[name].environment[variable] = str(system.authority.certificate)
        system.rig.start()
        system.rig.publish(READINGS)
        system.rig.wait_until_delivered()
        system.rig.assert_nothing_lost()


@pytest.mark.parametrize("method", METHODS)
def test_a_key_that_is_missing_is_told_without_a_reading_and_so_is_its_end(
    tmp_path: Path, method: str
) -> None:
    with earnest(tmp_path, method) as system:
        system.key_file.unlink()
        system.rig.start()
        wait_until_seen(system, "on hold", str(system.key_file), "install -o", "-m 0400")
        system.tokens.make_key(system.key_file)
        wait_until_seen(system, "delivering")
        assert system.tokens.asked, "it was tried"
        assert system.rig.cloud.received("pubsub") == []


def test_a_network_that_is_down_is_told_without_a_reading(tmp_path: Path) -> None:
    with earnest(tmp_path) as system:
        key = json.loads(system.key_file.read_text(encoding="utf-8"))
        right = key["token_uri"]
        key["token_uri"] = "http://127.0.0.1:9/token"  # noqa: S105 - an address
        system.key_file.write_text(json.dumps(key), encoding="utf-8")
        system.rig.start()
        wait_until_seen(system, "retrying", "no access token")
        key["token_uri"] = right
        system.key_file.write_text(json.dumps(key), encoding="utf-8")
        wait_until_seen(system, "delivering")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_without_any_variable_the_packaged_and_the_systems_list_are_trusted(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_list = tmp_path / "system.crt"
    system_list.write_bytes(authority.certificate.read_bytes())
    monkeypatch.setattr("forwarder.authorities.SYSTEM_LIST", system_list)
    environ: dict[str, str] = {}
    pem = Authorities(environ, None).renewed()
    assert authority.certificate.read_bytes().strip() in pem
    assert pem.count(b"BEGIN CERTIFICATE") > 50
    assert Path(environ[REQUESTS_VARIABLE]).read_bytes() == pem


def test_what_a_variable_names_takes_the_lists_place_and_ours_comes_on_top(
    authority: Authority, tmp_path: Path
) -> None:
    own = Authority(tmp_path, "own").certificate
    environ = {"SSL_CERT_FILE": str(authority.certificate)}
    trusted = Authorities(environ, own)
    assert "takes the place of the packaged and of the system's list" in trusted.notice
    first = trusted.renewed()
    assert first.count(b"BEGIN CERTIFICATE") == 2
    assert Path(environ[REQUESTS_VARIABLE]).read_bytes() == first
    own.write_bytes(Authority(tmp_path, "newer").certificate.read_bytes())
    second = trusted.renewed()
    assert second != first
    assert Path(environ[REQUESTS_VARIABLE]).read_bytes() == second


def test_variables_that_name_several_lists_are_all_trusted_and_warned_about(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other").certificate
    environ = {"SSL_CERT_FILE": str(authority.certificate), REQUESTS_VARIABLE: str(other)}
    trusted = Authorities(environ, None)
    assert str(other) in trusted.notice
    assert "CLOUD_CA_FILE" in trusted.notice
    assert trusted.renewed().count(b"BEGIN CERTIFICATE") == 2


@pytest.mark.parametrize("content", [None, b"", b"\x30\x82\x01\x0a", b"hello"])
def test_a_list_that_cannot_be_used_is_a_hold_and_never_the_usual_one(
    tmp_path: Path, content: bytes | None
) -> None:
    named = tmp_path / "named.crt"
    if content is not None:
        named.write_bytes(content)
    trusted = Authorities({"REQUESTS_CA_BUNDLE": str(named)}, None)
    with pytest.raises(FaultError) as caught:
        trusted.renewed()
    assert str(named) in caught.value.fault.problem
    assert "REQUESTS_CA_BUNDLE" in caught.value.fault.problem
    assert caught.value.fault.remedy


@pytest.mark.parametrize("content", [None, b"", b"\x30\x82\x01\x0a", b"hello"])
def test_a_setting_that_names_no_authority_is_refused_at_start(
    tmp_path: Path, content: bytes | None
) -> None:
    named = tmp_path / "named.crt"
    if content is not None:
        named.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_settings({"APP_ENV": "LOCAL", "CLOUD_CA_FILE": str(named)}, "host")
    (problem,) = caught.value.problems
    assert problem.startswith("CLOUD_CA_FILE: ")
    assert "PEM" in problem


def test_a_setting_that_names_an_authority_is_taken(authority: Authority) -> None:
    environ = {"APP_ENV": "LOCAL", "CLOUD_CA_FILE": str(authority.certificate)}
    loaded = load_settings(environ, "host")
    assert loaded.cloud_ca_file == authority.certificate
