"""What deploy/mosquitto.conf advises for sensors on the network, with a real Mosquitto.

Whatever it advises must refuse strangers on the outer listener, and must hand the collector what
was queued for it while it, or the broker, was away. per_listener_settings does not, since 2.0.12.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness import COLLECTOR, Rig, wait_until
from tests.harness.programs import ROOT
from tests.harness.waiting import HOST, free_port
from tests.test_e2e_tls import SECRET, Keys, keys, openssl

__all__ = ["keys"]

TOPIC = "FCTS/FAE/FAE1/SolvExtract/PT-101"
QUEUED = 500
TIMEOUT_S = 20.0
REFUSED_S = 3.0
CONFIGURATION = ROOT / "deploy" / "mosquitto.conf"


def recipes() -> dict[str, str]:
    """Return the options of each recipe in the installed file, by its heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in CONFIGURATION.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ---"):
            heading = ""
        elif match := re.match(r"# \(\d\) (\w[\w ]*)\.", line):
            heading = match[1]
            found[heading] = []
        elif heading and line.startswith("#   "):
            found[heading].append(line.removeprefix("#   "))
    return {name: "\n".join(lines) for name, lines in found.items()}


@dataclass
class Network:
    """A broker as the recipe has it, and who may connect from outside."""

    rig: Rig
    port: int
    ca: Path
    welcome: list[str]
    """The options of mosquitto_pub with which a sensor is let in."""
    strangers: dict[str, list[str]] = field(default_factory=dict)
    """And those with which nothing may be."""

    def _command(self, options: list[str]) -> list[str]:
        address = ["-h", HOST, "-p", str(self.port), "--cafile", str(self.ca)]
        return ["mosquitto_pub", *address, "-q", "1", "-t", TOPIC, *options]

    def publish(self, lines: str) -> None:
        """Publish each line as a sensor that is let in; return once they are acknowledged."""
        command = self._command([*self.welcome, "-l"])
        subprocess.run(command, input=lines, text=True, check=True, timeout=TIMEOUT_S)

    def is_refused(self, options: list[str]) -> bool:
        """Return whether the broker lets nothing in with these options."""
        command = self._command([*options, "-m", reading(0)])
        try:
            done = subprocess.run(command, check=False, capture_output=True, timeout=REFUSED_S)
        except subprocess.TimeoutExpired:
            return True  # refused within TLS, it tries again and again
        return done.returncode != 0


def reading(number: int) -> str:
    body = {"site_code": "FAE1", "sensor_id": "s", "timestamp": "2026-11-27T10:00:00Z"}
    return json.dumps(body | {"value": number}) + "\n"


def client_certificate(directory: Path, authority: Path, name: str) -> list[str]:
    """Return the options of a client whose certificate ``authority`` has signed."""
    openssl(
        directory, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.csr",
    )  # fmt: skip
    openssl(
        directory, "x509", "-req", "-in", f"{name}.csr", "-CA", str(authority), "-CAkey",
        str(authority.with_suffix(".key")), "-CAcreateserial", "-days", "2", "-out", f"{name}.crt",
    )  # fmt: skip
    return ["--cert", str(directory / f"{name}.crt"), "--key", str(directory / f"{name}.key")]


def password_file(directory: Path, *users: str) -> Path:
    path = directory / "passwords"
    for number, user in enumerate(users):
        create = [] if number else ["-c"]
        subprocess.run(
            ["mosquitto_passwd", *create, "-b", str(path), user, SECRET],
            check=True,
            capture_output=True,
        )
    return path


@pytest.fixture(params=["Client certificates", "Passwords"])
def network(request: pytest.FixtureRequest, keys: Keys, tmp_path: Path) -> Iterator[Network]:
    port = free_port()
    options = recipes()[request.param]
    for path, own in (
        ("/etc/mosquitto/certs/ca.crt", keys.ca),
        ("/etc/mosquitto/certs/server.crt", keys.certificate),
        ("/etc/mosquitto/certs/server.key", keys.key),
        ("/etc/mosquitto/passwd", tmp_path / "passwords"),
        ("listener 8883", f"listener {port} {HOST}"),
    ):
        options = options.replace(str(path), str(own))
    with Rig(APP_ENV="LOCAL") as rig:
        config = rig.directory / "broker" / "mosquitto.conf"
        text = config.read_text(encoding="utf-8")
        if request.param == "Passwords":
            password_file(tmp_path, "sensor", "sluice")
            secret = tmp_path / "secret"
            secret.write_text(SECRET, encoding="ascii")
            rig.programs[COLLECTOR].environment |= {
                "MQTT_USERNAME": "sluice",
                "MQTT_PASSWORD_FILE": str(secret),
            }
            # In the place that the recipe names, and nowhere else.
            assert len(re.findall(r"(?m)^allow_anonymous true$", text)) == 1
            text = re.sub(r"(?m)^allow_anonymous true$", lambda _: options, text)
            welcome = ["-u", "sensor", "-P", SECRET]
            strangers = {
                "no name": [],
                "a wrong password": ["-u", "sensor", "-P", "wrong"],
                "an unknown name": ["-u", "stranger", "-P", SECRET],
            }
        else:
            text += f"\n{options}\n"
            welcome = client_certificate(tmp_path, keys.ca, "sensor")
            strangers = {
                "no certificate": [],
                "another authority's": client_certificate(tmp_path, keys.stranger, "stranger"),
                "a name alone": ["-u", "sensor", "-P", SECRET],
            }
        config.write_text(text, encoding="utf-8")
        yield Network(rig, port, keys.ca, welcome, strangers)


def test_no_recipe_uses_per_listener_settings() -> None:
    text = CONFIGURATION.read_text(encoding="utf-8")
    assert list(recipes()) == ["Client certificates", "Passwords"]
    assert not re.search(r"(?m)^(#   )?per_listener_settings", text)
    assert all("per_listener_settings" not in options for options in recipes().values())


def test_strangers_are_refused_and_sensors_are_not(network: Network) -> None:
    network.rig.start(COLLECTOR)
    for who, options in network.strangers.items():
        assert network.is_refused(options), f"{who} was let in"
    network.publish(reading(1))

    wait_until(lambda: network.rig.books.counter("received") >= 1, TIMEOUT_S, "it is received")
    assert network.rig.books.counter("received") == 1, "nothing of the strangers'"


def test_what_was_queued_comes_after_a_restart_of_collector_and_broker(network: Network) -> None:
    rig = network.rig
    rig.start(COLLECTOR)
    for turn in range(2):
        assert rig.programs[COLLECTOR].stop()[0] == 0
        lines = "".join(reading(QUEUED * turn + n) for n in range(QUEUED))
        network.publish(lines)
        if turn:
            assert rig.broker.stop()[0] == 0
            rig.broker.start()
        rig.start(COLLECTOR)

        wait_until(
            lambda turn=turn: rig.books.counter("spooled") >= QUEUED * (turn + 1),  # type: ignore[misc]
            TIMEOUT_S,
            f"turn {turn}: all that was queued is spooled",
        )
        assert '"session_resumed": true' in rig.programs[COLLECTOR].log_text
    assert rig.books.counter("spooled") == 2 * QUEUED
