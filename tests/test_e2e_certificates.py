"""Certificates that are renewed in place, refused, or about to expire, with a real Mosquitto."""

import re
import signal
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from collector.tls import LOOK_INTERVAL_S, Tls
from lifecycle import load_settings
from spool import Condition, Conditions
from tests.collector_parts import Clock
from tests.harness import COLLECTOR, Rig, wait_until
from tests.test_e2e_broker_health import (
    health,
    restart_broker,
    wait_for_row,
    wait_until_well,
)
from tests.test_e2e_tls import openssl

READINGS = 30
SOON_S = 20.0
LONG_DAYS = 90
TLS_1_2 = (
    "openssl_conf = all\n[all]\nssl_conf = ssl\n[ssl]\nsystem_default = limits\n"
    "[limits]\nMaxProtocol = TLSv1.2\n"
)


@dataclass(frozen=True)
class Plant:
    """An authority, and what it has issued; each file may be issued again in its place."""

    directory: Path

    def authority(self, days: int = LONG_DAYS, name: str = "ca") -> None:
        openssl(
            self.directory, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", str(days),
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt",
        )  # fmt: skip

    def issue(
        self, name: str, days: int = LONG_DAYS, authority: str = "ca", subject: str = "IP:127.0.0.1"
    ) -> None:
        (self.directory / "names").write_text(f"subjectAltName={subject}\n", encoding="ascii")
        openssl(
            self.directory, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        openssl(
            self.directory, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.crt",
            "-CAkey", f"{authority}.key", "-CAcreateserial", "-days", str(days), "-extfile",
            "names", "-out", f"{name}.crt",
        )  # fmt: skip

    def __getitem__(self, file: str) -> Path:
        """Return the path of a file."""
        return self.directory / file


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    made = Plant(tmp_path)
    made.authority()
    made.issue("broker")
    made.issue("gate")
    return made


@pytest.fixture
def rig(plant: Plant) -> Iterator[Rig]:
    """A broker with a second listener that asks for client certificates."""
    variables: dict[str, str] = {
        "MQTT_TLS_CA_FILE": str(plant["ca.crt"]),
        "MQTT_TLS_CERT_FILE": str(plant["gate.crt"]),
        "MQTT_TLS_KEY_FILE": str(plant["gate.key"]),
    }
    with Rig(APP_ENV="LOCAL") as rig:
        rig.programs[COLLECTOR].environment |= variables
        config = rig.directory / "broker" / "mosquitto.conf"
        port = rig.broker.port + 1
        text = config.read_text(encoding="utf-8")
        config.write_text(
            f"{text}\nlistener {port} 127.0.0.1\nrequire_certificate true\n"
            f"cafile {plant['ca.crt']}\ncertfile {plant['broker.crt']}\n"
            f"keyfile {plant['broker.key']}\n",
            encoding="utf-8",
        )
        rig.programs[COLLECTOR].environment["MQTT_PORT"] = str(port)
        yield rig


def test_certificates_renewed_in_place_need_no_restart_of_the_collector(
    rig: Rig, plant: Plant
) -> None:
    rig.start(COLLECTOR)
    rig.publish(READINGS)
    rig.wait_until_spooled()
    for name in ("ca", "stranger"):  # the same name again, then one of another name
        plant.authority(name=name)
        plant["ca.crt"].write_bytes(plant[f"{name}.crt"].read_bytes())
        plant["ca.key"].write_bytes(plant[f"{name}.key"].read_bytes())
        plant.issue("broker")
        plant.issue("gate")
        restart_broker(rig)
        rig.publish(READINGS)
        rig.wait_until_spooled()
        wait_until_well(rig)
    assert rig.books.counter("spooled") == 3 * READINGS
    assert rig.programs[COLLECTOR].log_text.count('"message": "started"') == 1


@pytest.mark.parametrize("file", ["ca.crt", "gate.crt", "gate.key"])
def test_a_file_that_is_missing_or_half_written_is_named_and_tried_again(
    rig: Rig, plant: Plant, file: str
) -> None:
    rig.start(COLLECTOR)
    collector = rig.programs[COLLECTOR]
    whole = plant[file].read_bytes()
    plant[file].write_bytes(whole[: len(whole) // 2])
    broken = plant[file].rename(plant[f"{file}.broken"])
    restart_broker_process_only(rig, plant, file, whole)
    collector.wait_for_log(f"={plant[file]}: No such file")
    broken.rename(plant[file])
    told = f"cannot use the (file|client certificate) of [^;]*{re.escape(str(plant[file]))}"
    wait_until(
        lambda: [
            line
            for line in collector.log_text.splitlines()
            if re.search(told, line) and "No such file" not in line
        ],
        SOON_S,
        "the half file is told of",
    )
    wait_until(
        lambda: str(plant[file]) in health(rig)["broker_disconnected"]["detail"], SOON_S, "so too"
    )
    plant[file].write_bytes(whole)
    wait_until_well(rig)
    assert collector.log_text.count('"message": "started"') == 1


def restart_broker_process_only(rig: Rig, plant: Plant, file: str, whole: bytes) -> None:
    """Restart the broker with files of its own, so that only the collector misses one."""
    own = plant[f"of-the-broker-{file}"]
    own.write_bytes(whole)
    config = rig.directory / "broker" / "mosquitto.conf"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(str(plant[file]), str(own)), encoding="utf-8")
    restart_broker(rig)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("fault", ["none", "expired", "stranger"])
def test_a_client_certificate_that_the_broker_refuses_is_named(
    rig: Rig, plant: Plant, version: str, fault: str
) -> None:
    collector = rig.programs[COLLECTOR]
    if version == "1.2":
        plant["openssl.cnf"].write_text(TLS_1_2, encoding="ascii")
        collector.environment["OPENSSL_CONF"] = str(plant["openssl.cnf"])
    if fault == "none":
        del collector.environment["MQTT_TLS_CERT_FILE"], collector.environment["MQTT_TLS_KEY_FILE"]
    elif fault == "expired":
        plant.issue("gate", days=-1)
    else:
        plant.authority(name="stranger")
        plant.issue("gate", authority="stranger")
    rig.broker.start()
    collector.start()
    row = wait_for_row(rig, "broker_refuses")
    assert row["severity"] == "CRITICAL"
    if fault == "none":
        assert "without a certificate" in row["detail"]
        assert "set MQTT_TLS_CERT_FILE and MQTT_TLS_KEY_FILE" in row["remedy"]
        return
    assert f"MQTT_TLS_CERT_FILE={plant['gate.crt']} (CN=gate, issued by CN=" in row["detail"]
    expected = "expired at 20" if fault == "expired" else "is valid until 20"
    assert expected in row["detail"]
    plant.issue("gate")
    wait_until_well(rig)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("expired", r"certificate has expired: the broker's own expired \(CN=broker\) at 20"),
        ("name", r"is for gate\.plant, 10\.0\.0\.9, and not for MQTT_BROKER=127\.0\.0\.1"),
        ("stranger", r"the authority of the broker's certificate, CN=stranger, is not in MQTT_TLS"),
    ],
)
def test_a_brokers_certificate_that_is_not_accepted_is_explained(
    rig: Rig, plant: Plant, fault: str, told: str
) -> None:
    if fault == "expired":
        plant.issue("broker", days=-1)
    elif fault == "name":
        plant.issue("broker", subject="DNS:gate.plant,IP:10.0.0.9")
    else:
        plant.authority(name="stranger")
        plant.issue("broker", authority="stranger")
    rig.broker.start()
    collector = rig.programs[COLLECTOR]
    collector.start()
    row = wait_for_row(rig, "broker_refuses")
    assert re.search(told, row["detail"]), row["detail"]
    plant.issue("broker")
    rig.broker.signal(signal.SIGHUP)
    wait_until_well(rig)


@pytest.mark.parametrize("file", ["ca", "gate", "broker"])
def test_a_certificate_that_expires_soon_is_in_health_until_it_is_renewed(
    rig: Rig, plant: Plant, file: str
) -> None:
    if file == "ca":
        plant.authority(days=5)
        plant.issue("broker")
        plant.issue("gate")
    else:
        plant.issue(file, days=5)
    rig.start(COLLECTOR)
    row = wait_for_row(rig, "certificate_expires")
    assert row["severity"] == "WARNING"
    named = {
        "ca": f"an authority in MQTT_TLS_CA_FILE={plant['ca.crt']} (CN=ca) expires at 20",
        "gate": f"MQTT_TLS_CERT_FILE={plant['gate.crt']} (CN=gate) expires at 20",
        "broker": "the broker's own certificate (CN=broker) expires at 20",
    }
    assert row["detail"].startswith(named[file])
    assert set(health(rig)) == {"certificate_expires"}
    collector = rig.programs[COLLECTOR]
    if file == "ca":
        plant.authority()
    for name in ("broker", "gate"):
        plant.issue(name)
    restart_broker(rig)
    wait_until_well(rig)
    lines = [line for line in collector.log_text.splitlines() if "a certificate of the" in line]
    assert len(lines) == 1, "once a day at most"
    assert '"WARNING"' in lines[0]


class Seen:
    """What the view would show."""

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self._conditions.store(self)
        self.rows: list[Condition] = []

    def set_conditions(self, conditions: Iterable[Condition]) -> bool:
        self.rows = list(conditions)
        return True

    def now(self) -> list[tuple[str, str]]:
        self._conditions.store(self)
        return [(one.name, one.severity) for one in self.rows]


def test_a_connection_that_lasts_is_looked_at_each_hour_and_forgets_what_was_renewed(
    rig: Rig, plant: Plant
) -> None:
    plant.issue("broker", days=20)
    rig.broker.start()
    conditions, clock, moment = Conditions(), Clock(), [datetime.now(UTC)]
    seen = Seen(conditions)
    settings = load_settings(rig.programs[COLLECTOR].environment, "host")
    tls = Tls(settings, conditions, now=lambda: moment[0], clock=clock)
    tls.context()
    tls.connected(ssl.PEM_cert_to_DER_cert(plant["broker.crt"].read_text(encoding="ascii")))
    assert seen.now() == []
    moment[0] += timedelta(days=10)
    tls.turn()
    assert seen.now() == [], "not before the hour is over"
    clock.now_s += LOOK_INTERVAL_S
    tls.turn()
    assert seen.now() == [("certificate_expires", "WARNING")]
    moment[0] += timedelta(days=11)
    clock.now_s += LOOK_INTERVAL_S
    tls.turn()
    assert seen.now() == [("certificate_expires", "CRITICAL")]
    plant.issue("broker")
    rig.broker.signal(signal.SIGHUP)

    def forgotten() -> bool:
        clock.now_s += LOOK_INTERVAL_S
        tls.turn()
        return seen.now() == []

    wait_until(forgotten, SOON_S, "the broker's renewed certificate is seen")


def test_an_authority_that_is_being_replaced_may_expire_in_the_file(rig: Rig, plant: Plant) -> None:
    plant.authority(days=3, name="old")
    both = plant["ca.crt"].read_bytes() + plant["old.crt"].read_bytes()
    plant["ca.crt"].write_bytes(both)
    rig.start(COLLECTOR)
    wait_until_well(rig)
    assert "expires" not in rig.programs[COLLECTOR].log_text
