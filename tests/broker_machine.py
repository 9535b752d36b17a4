"""A throw-away root with Debian's Mosquitto, for the broker's part of install.sh."""

from collections.abc import Iterator, Sequence

import pytest

from tests.harness.programs import ROOT
from tests.harness.throwaway_root import ThrowawayRoot
from tests.harness.waiting import wait_until

MAIN = "/etc/mosquitto/mosquitto.conf"
CONF_D = "/etc/mosquitto/conf.d"
DROP_IN = f"{CONF_D}/sluice.conf"
PENDING = "/etc/sluice/mosquitto/pending"
TRIAL = "/run/sluice-mosquitto-trial"
LOG = "/var/log/mosquitto/mosquitto.log"
SHIPPED = (ROOT / "deploy/mosquitto.conf").read_text(encoding="utf-8")
SENSOR = ("-u", "sensor", "-P", "secret")
CLOSED = "allow_anonymous false\npassword_file /etc/mosquitto/passwd\n"
TIMEOUT_S = 20.0

# The trial, which has other ports, is in order, and the real start is not.
OCCUPIED = "listener 1885 127.0.0.2\n"
OCCUPANT = (
    "import socket, time; s = socket.create_server(('127.0.0.2', 1885)); time.sleep(10_000)",
)


class Machine(ThrowawayRoot):
    """A throw-away root with Debian's Mosquitto, and a checkout in /copy that can be changed."""

    def prepare(self) -> None:
        """Lay out the checkout: install.sh without its last line, so that it can be sourced."""
        self.check("mkdir", "/copy")
        self.check("cp", "-r", "/checkout/deploy", "/copy/deploy")
        script = (ROOT / "install.sh").read_text(encoding="utf-8")
        assert script.endswith('\nmain "$@"\n')
        self.write("/copy/install.sh", script.removesuffix('main "$@"\n'))
        self.check("mkdir", "-p", "/etc/sluice")
        self.check("mosquitto_passwd", "-c", "-b", "/etc/mosquitto/passwd", *SENSOR[1::2])

    def ship(self, text: str) -> None:
        """Let the checkout have this drop-in."""
        self.write("/copy/deploy/mosquitto.conf", text)

    def set_up(self, before: str = "", within: Sequence[str] = ()) -> tuple[int, str]:
        """Run the broker's part of install.sh; return its code and all that it said."""
        script = f". /copy/install.sh\n{before}\nset_up_mosquitto"
        done = self.run(*within, "bash", "-c", script)
        return done.returncode, done.stdout + done.stderr

    def settings(self) -> dict[str, bytes]:
        """Return every file of the broker's configuration."""
        files = self.check("find", "/etc/mosquitto", "-type", "f").split()
        return {name: self.path(name).read_bytes() for name in files}

    def has(self, path: str) -> bool:
        """Return whether that file or directory is there."""
        return self.run("test", "-e", path).returncode == 0

    def service(self) -> list[int]:
        """Return the process of the service's broker."""
        found = self.run("pgrep", "-f", f"^/usr/sbin/mosquitto -c {MAIN}")
        return [int(word) for word in found.stdout.split()]

    def publishes(self, port: int, *options: str) -> int:
        """Publish one message at QoS 1 and return the code: 0 if it was acknowledged."""
        message = ("-p", str(port), "-q", "1", "-t", "a/b", "-m", "x")
        return self.run("mosquitto_pub", "-h", "127.0.0.1", *message, *options).returncode

    def serves_with_ours(self) -> bool:
        """Return whether the broker that runs has read our drop-in, which is in force."""
        last_start = self.read(LOG).rpartition(" starting\n")[2]
        local_only = "Starting in local only mode" in last_start
        return self.publishes(1883) == 0 and not local_only and self.read(DROP_IN) == SHIPPED


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(environment=False) as root:
        root.prepare()
        yield root


@pytest.fixture
def debian(machine: Machine) -> Machine:
    """With its Mosquitto as Debian ships it, running."""
    machine.start_mosquitto()
    assert "local only mode" in machine.read(LOG)
    return machine


def occupy(machine: Machine) -> None:
    """Ship a drop-in with one more listener, whose address another program has."""
    machine.start("python3", "-c", *OCCUPANT)
    wait_until(
        lambda: machine.run("bash", "-c", "exec 3<>/dev/tcp/127.0.0.2/1885").returncode == 0,
        TIMEOUT_S,
        "the other program has its port",
    )
    machine.ship(SHIPPED + OCCUPIED)
