"""TLS and passwords with a real Mosquitto: verified by default, and no secret is seen."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, Rig, wait_until

SECRET = "s3cret-of-the-plant"  # noqa: S105 - made for this test
READINGS = 50
SOON_S = 20.0


@dataclass(frozen=True)
class Keys:
    """Files of a certificate authority, and of a broker that it vouches for."""

    ca: Path
    stranger: Path
    certificate: Path
    key: Path


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Make them anew for each run."""
    directory = tmp_path_factory.mktemp("keys")
    directory.chmod(0o755)
    for name in ("ca", "stranger"):
        openssl(
            directory, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
            f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt",
        )  # fmt: skip
    openssl(
        directory, "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=broker",
        "-keyout", "broker.key", "-out", "broker.csr",
    )  # fmt: skip
    (directory / "names").write_text("subjectAltName=IP:127.0.0.1\n", encoding="ascii")
    openssl(
        directory, "x509", "-req", "-in", "broker.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
        "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "broker.crt",
    )  # fmt: skip
    (directory / "broker.key").chmod(0o644)
    return Keys(*(directory / n for n in ("ca.crt", "stranger.crt", "broker.crt", "broker.key")))


@pytest.fixture
def rig(keys: Keys, tmp_path: Path) -> Iterator[Rig]:
    """A broker with TLS for the collector, who has a password, beside the plain listener."""
    passwords = tmp_path / "passwords"
    subprocess.run(
        ["mosquitto_passwd", "-b", "-c", passwords, "gate", SECRET], check=True, capture_output=True
    )
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n", encoding="ascii")
    secret.chmod(0o600)
    with Rig(APP_ENV="LOCAL", MQTT_USERNAME="gate", MQTT_PASSWORD_FILE=str(secret)) as rig:
        port = _add_tls_listener(rig, keys, passwords)
        rig.programs[COLLECTOR].environment |= {
            "MQTT_PORT": str(port),
            "MQTT_TLS_CA_FILE": str(keys.ca),
        }
        yield rig


def _add_tls_listener(rig: Rig, keys: Keys, passwords: Path) -> int:
    config = rig.directory / "broker" / "mosquitto.conf"
    port = rig.broker.port + 1
    config.write_text(
        config.read_text(encoding="utf-8")
        + f"\nlistener {port} 127.0.0.1\npassword_file {passwords}\n"
        f"cafile {keys.ca}\ncertfile {keys.certificate}\nkeyfile {keys.key}\n",
        encoding="utf-8",
    )
    return port


def test_readings_come_through_tls_with_a_password_that_nobody_sees(rig: Rig) -> None:
    rig.start(COLLECTOR)
    rig.publish(READINGS)
    rig.wait_until_spooled()
    assert rig.books.counter("spooled") == READINGS
    proc = Path(f"/proc/{rig.programs[COLLECTOR].pid}")
    for text in (
        rig.programs[COLLECTOR].log_text.encode(),
        (proc / "cmdline").read_bytes(),
        (proc / "environ").read_bytes(),
    ):
        assert SECRET.encode() not in text


def test_a_broker_whose_certificate_nobody_vouches_for_is_refused(rig: Rig, keys: Keys) -> None:
    collector = rig.programs[COLLECTOR]
    collector.environment["MQTT_TLS_CA_FILE"] = str(keys.stranger)
    rig.broker.start()
    collector.start()
    collector.wait_for_log("check MQTT_TLS_CA_FILE")
    assert '"connected"' not in collector.log_text


def test_a_broker_under_another_name_is_refused(rig: Rig) -> None:
    collector = rig.programs[COLLECTOR]
    collector.environment["MQTT_BROKER"] = "localhost"
    rig.broker.start()
    collector.start()
    collector.wait_for_log("TLS with localhost")
    assert '"connected"' not in collector.log_text


def test_a_wrong_password_is_said_and_a_corrected_one_needs_no_restart(rig: Rig) -> None:
    collector = rig.programs[COLLECTOR]
    file = Path(collector.environment["MQTT_PASSWORD_FILE"])
    file.write_text("wrong", encoding="ascii")
    rig.broker.start()
    collector.start()
    collector.wait_for_log("check MQTT_USERNAME")
    file.write_text(SECRET, encoding="ascii")
    wait_until(lambda: '"connected"' in collector.log_text, SOON_S, "it connects")
