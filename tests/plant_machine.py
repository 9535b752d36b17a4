"""A machine with Debian's Mosquitto in a throw-away root, and a sensor at its broker."""

import re
from typing import TYPE_CHECKING

from tests.harness.systemd_root import SystemdRoot
from tests.harness.throwaway_root import CHECKOUT
from tests.harness.waiting import wait_until

if TYPE_CHECKING:
    from subprocess import CompletedProcess

DROP_IN = "/etc/mosquitto/conf.d/sluice.conf"
FORMER = f"{DROP_IN}.former"
MAIN = "/etc/mosquitto/mosquitto.conf"
LOG = "/var/log/mosquitto/mosquitto.log"
PASSWORDS = "/etc/mosquitto/passwd"
SECRET = "s3cret"  # noqa: S105 - a test's
TIMEOUT_S = 30.0
SOURCE = "/source"

SET_UP = f"""
. {SOURCE}/functions.sh
mkdir -p "$ETC"
exec 9>/run/installer.lock
flock -n 9
{{before}}
set_up_mosquitto
"""
PLANT = f"password_file {PASSWORDS}\nallow_anonymous false\n"


class Machine(SystemdRoot):
    """A machine with Debian's Mosquitto, and the part of install.sh that deals with it."""

    def prepare(self) -> None:
        """Lay out a checkout in which a test may change what is installed."""
        self.check("sh", "-c", f"mkdir {SOURCE} && cp -r {CHECKOUT}/[!.]* {SOURCE}")
        self.check("sh", "-c", f"sed '$d' {SOURCE}/install.sh > {SOURCE}/functions.sh")
        self.check("mosquitto_passwd", "-c", "-b", PASSWORDS, "sensor", SECRET)
        self.check("chown", "mosquitto:", PASSWORDS)
        self.check("sh", "-c", f": >{LOG}")
        self.check("chown", "mosquitto:", LOG)

    def set_up(self, before: str = "") -> "CompletedProcess[str]":
        """Do what install.sh does about Mosquitto; ``before`` is shell that comes before it."""
        return self.run("bash", "-c", SET_UP.format(before=before))

    def append(self, path: str, text: str) -> None:
        self.write(path, self.read(path) + text)

    def broker(self) -> int:
        """Return the service's process, of which there is one."""
        found = self.check("pgrep", "-r", "D,R,S", "-f", "-x", f"/usr/sbin/mosquitto -c {MAIN}")
        return int(found)

    def runs(self) -> bool:
        """Return whether the service's process runs."""
        return f"-c {MAIN}" in self.run("pgrep", "-r", "D,R,S", "-a", "-x", "mosquitto").stdout

    def reboot(self) -> None:
        """Stop the broker, and start it with what is on the disk now."""
        if self.runs():
            self.stop_mosquitto()
        self.start_mosquitto()

    def publishes(self, *options: str) -> bool:
        """Return whether a client may publish with these options of mosquitto_pub."""
        return self.run("mosquitto_pub", "-q", "1", "-t", "t", "-m", "m", *options).returncode == 0

    def configuration(self) -> dict[str, bytes]:
        """Return the content of every file of the broker's configuration."""
        found = self.check("find", "/etc/mosquitto", "-type", "f").split()
        return {name: self.path(name).read_bytes() for name in found}

    def has(self, path: str) -> bool:
        return self.run("test", "-e", path).returncode == 0


class Sensor:
    """A sensor that numbers what it publishes, and one who watches what arrives."""

    def __init__(self, machine: Machine, port: int) -> None:
        self._machine = machine
        client = f"-p {port} -u sensor -P {SECRET} -q 1 -t FCTS/FAE/FAE1/SolvExtract/PT-101"
        machine.start("sh", "-c", f"exec mosquitto_sub {client} -i watch", log="/run/got")
        self._wait_for_log(r" as watch ")
        numbers = "seq 1 100000 | while read -r n; do echo $n; sleep 0.02; done"
        machine.start("sh", "-c", f"{numbers} | mosquitto_pub {client} -i sensor -l")
        self.wait_for_more()

    def got(self) -> list[int]:
        # The last line may be a part of one.
        lines = self._machine.read("/run/got").rpartition("\n")[0].splitlines()
        return [int(line) for line in lines]

    def wait_for_more(self) -> None:
        """Wait until something arrives that was published after now."""
        enough = len(self.got()) + 10
        wait_until(lambda: len(self.got()) >= enough, TIMEOUT_S, "readings arrive")

    def was_never_interrupted(self) -> bool:
        """Return whether both kept their one connection, and all that was published arrived."""
        log = self._machine.read(LOG)
        connections = [len(re.findall(f" as {name} ", log)) for name in ("sensor", "watch")]
        got = self.got()
        return connections == [1, 1] and got == list(range(1, len(got) + 1))

    def _wait_for_log(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, self._machine.read(LOG)), TIMEOUT_S, pattern)
