"""What install.sh does with the Mosquitto of a machine, in throw-away roots.

A plant's broker keeps its configuration, its process and its clients at every moment, and nothing
is opened that was closed. Where the broker is as Debian ships it, Sluice's drop-in comes in only
if it works, and is taken back if it turns out not to.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.throwaway_root import CHECKOUT, INSTALL, ThrowawayRoot, needs_throwaway_root
from tests.harness.waiting import wait_until

pytestmark = needs_throwaway_root()

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
. {SOURCE}/deploy/mosquitto-setup.sh
mkdir -p "$ETC"
{{before}}
set_up_mosquitto
"""
PLANT = f"password_file {PASSWORDS}\nallow_anonymous false\n"


class Machine(ThrowawayRoot):
    """A machine with Debian's Mosquitto, and the part of install.sh that deals with it."""

    def prepare(self) -> None:
        """Lay out a checkout in which a test may change what is installed."""
        self.check("sh", "-c", f"mkdir {SOURCE} && cp -r {CHECKOUT}/[!.]* {SOURCE}")
        self.check("sh", "-c", f"sed '$d' {SOURCE}/install.sh > {SOURCE}/functions.sh")
        self.check("mosquitto_passwd", "-c", "-b", PASSWORDS, "sensor", SECRET)
        self.check("chown", "mosquitto:", PASSWORDS)
        self.check("sh", "-c", f": >{LOG}")
        self.check("chown", "mosquitto:", LOG)

    def set_up(self, before: str = "") -> "subprocess.CompletedProcess[str]":
        """Do what install.sh does about Mosquitto; ``before`` is shell that comes before it."""
        return self.run("bash", "-c", SET_UP.format(before=before))

    def append(self, path: str, text: str) -> None:
        self.write(path, self.read(path) + text)

    def broker(self) -> int:
        """Return the process of the broker, of which there is one."""
        (pid,) = self.processes("mosquitto", "mosquitto")
        return pid

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
        feed = f"seq 1 100000 | while read -r n; do echo $n; sleep 0.02; done | mosquitto_pub {client} -l"
        machine.start("sh", "-c", f"{feed} -i sensor")
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


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(environment=False) as made:
        made.prepare()
        yield made


def plants_files(port: int) -> dict[str, tuple[str, str]]:
    listener = f"listener {port}\n{PLANT}"
    return {
        "in mosquitto.conf": (MAIN, listener),
        "in conf.d": ("/etc/mosquitto/conf.d/plant.conf", listener),
        "in a hidden file": ("/etc/mosquitto/conf.d/.plant.conf", listener),
        "in another directory": ("/etc/mosquitto/plant.d/plant.conf", listener),
    }


@pytest.mark.parametrize("port", [1883, 1884])
@pytest.mark.parametrize("where", plants_files(0))
def test_a_plants_broker_goes_on_as_it_is(machine: Machine, where: str, port: int) -> None:
    file, settings = plants_files(port)[where]
    if file != MAIN:
        machine.write(file, "")
    if "plant.d" in file:
        text = machine.read(MAIN)
        assert "include_dir /etc/mosquitto/conf.d" in text
        machine.write(MAIN, text.replace("/etc/mosquitto/conf.d", str(Path(file).parent)))
    machine.append(file, settings)
    machine.start_mosquitto(port)
    before, broker = machine.configuration(), machine.broker()
    sensor = Sensor(machine, port)

    done = machine.set_up()

    sensor.wait_for_more()
    assert done.returncode == 0, done.stdout + done.stderr
    assert sensor.was_never_interrupted()
    assert machine.broker() == broker
    assert machine.configuration() == before
    assert not machine.publishes("-p", str(port)), "without a password"
    assert "the plant's own" in done.stdout
    assert re.search(rf"{re.escape(file)}:\d+:listener {port}\n", done.stdout)
    for word in ("MQTT_USERNAME=sluice", "MQTT_PASSWORD_FILE=", "max_queued_messages 1000000"):
        assert word in done.stdout
    answers = "wants a user and a password" if port == 1883 else "does not speak MQTT on"
    assert answers in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    # A restart of the machine changes nothing of that.
    machine.stop_mosquitto()
    machine.start_mosquitto(port)
    assert machine.publishes("-p", str(port), "-u", "sensor", "-P", SECRET)
    assert not machine.publishes("-p", str(port)), "without a password"


def test_debians_broker_gets_the_drop_in_and_keeps_it_without_another_restart(
    machine: Machine,
) -> None:
    # Comments are no settings.
    machine.append(MAIN, "\n# the operator was here\n")
    machine.write("/etc/mosquitto/conf.d/notes.conf", "# nothing\n\n")
    machine.start_mosquitto()
    before = machine.broker()

    first = machine.set_up()

    assert first.returncode == 0, first.stdout + first.stderr
    installed = machine.broker()
    assert installed != before, "with the new configuration"
    assert machine.read(DROP_IN) == machine.read(f"{SOURCE}/deploy/mosquitto.conf")
    assert machine.publishes()
    assert not machine.has(FORMER)

    second = machine.set_up()

    assert second.returncode == 0, second.stdout + second.stderr
    assert machine.broker() == installed
    assert "Mosquitto answers on 127.0.0.1:1883" in second.stdout


def test_a_broker_that_does_not_run_is_started(machine: Machine) -> None:
    for _ in range(2):
        assert machine.set_up().returncode == 0
        assert machine.publishes()
        machine.stop_mosquitto()


def test_settings_that_mosquitto_refuses_never_reach_the_broker(machine: Machine) -> None:
    machine.start_mosquitto()
    before, broker = machine.configuration(), machine.broker()
    machine.append(f"{SOURCE}/deploy/mosquitto.conf", "no_such_setting true\n")

    done = machine.set_up()

    assert done.returncode == 1
    assert "the broker was not touched" in done.stderr
    assert "no_such_setting" in done.stderr.split("Mosquitto says:")[1].split("install.sh:")[0]
    assert machine.configuration() == before
    assert machine.broker() == broker


@pytest.mark.parametrize("former", ["none", "an older one of ours"])
def test_settings_with_which_the_broker_does_not_come_up_are_taken_back(
    machine: Machine, former: str
) -> None:
    ours = f"{SOURCE}/deploy/mosquitto.conf"
    machine.start_mosquitto()
    if former != "none":
        assert machine.set_up().returncode == 0
    before = machine.configuration()
    # A port that the trial does not need, and another program has.
    machine.write("/run/other.conf", "listener 1999 127.0.0.1\nuser nobody\n")
    machine.start("/usr/sbin/mosquitto", "-c", "/run/other.conf")
    machine.wait_for_port(1999)
    machine.append(ours, "listener 1999 127.0.0.1\n")

    done = machine.set_up()

    assert done.returncode == 1
    assert "It runs again as before" in done.stderr
    assert "Address already in use" in done.stderr
    after = machine.configuration()
    assert after == before
    assert machine.publishes()
    assert machine.listens(1999), "the other program is left alone"

    machine.run("pkill", "-u", "nobody", "-x", "mosquitto")
    again = machine.set_up()
    assert again.returncode == 0, again.stderr
    assert machine.publishes("-p", "1999")


@pytest.mark.parametrize("package", ["installed", "not installed"])
def test_another_program_on_the_port_is_the_plants_broker(machine: Machine, package: str) -> None:
    # The address does not matter: it is where the sensors publish.
    machine.write("/run/other.conf", "listener 1883 0.0.0.0\nallow_anonymous true\nuser nobody\n")
    machine.start("/usr/sbin/mosquitto", "-c", "/run/other.conf")
    machine.wait_for_port(1883)
    (other,) = machine.processes("nobody", "mosquitto")
    before = machine.configuration()
    if package != "installed":
        machine.check("dpkg", "--force-depends", "--purge", "mosquitto")
        before = machine.configuration()

    wanted = machine.set_up("mosquitto_wanted && echo install it || echo leave it")

    assert wanted.returncode == 0, wanted.stderr
    assert wanted.stdout.startswith("install it" if package == "installed" else "leave it")
    assert f"in use by mosquitto (process {other})" in wanted.stdout
    assert "takes clients without a password" in wanted.stdout
    assert machine.configuration() == before
    assert machine.processes("nobody", "mosquitto") == [other]


def test_a_drop_in_that_the_operator_has_edited_stays(machine: Machine) -> None:
    machine.start_mosquitto()
    assert machine.set_up().returncode == 0
    machine.append(DROP_IN, "# edited\n")
    machine.append(f"{SOURCE}/deploy/mosquitto.conf", "# a newer version\n")
    before, broker = machine.configuration(), machine.broker()

    done = machine.set_up()

    assert done.returncode == 0, done.stderr
    assert "was edited here: it stays as it is" in done.stdout
    assert machine.configuration() == before
    assert machine.broker() == broker


def test_our_drop_in_is_known_again_after_sluice_was_removed(machine: Machine) -> None:
    machine.start_mosquitto()
    assert machine.set_up().returncode == 0
    machine.append(f"{SOURCE}/deploy/mosquitto.conf", "# a newer version\n")

    assert machine.set_up().returncode == 0

    assert machine.read(DROP_IN).endswith("# a newer version\n")


@pytest.mark.parametrize(
    ("plants", "opened"),
    [
        (f"listener 1884\n{PLANT}", True),
        (f"listener 1884\nrequire_certificate true\n{PLANT}", False),
        (f"listener 1884\npassword_file {PASSWORDS}\n", True),
    ],
)
@pytest.mark.parametrize("name", ["plant.conf", "z-plant.conf"])
def test_an_older_drop_in_of_ours_that_opens_the_plants_listener_is_told(
    machine: Machine, plants: str, opened: bool, name: str
) -> None:
    machine.start_mosquitto()
    assert machine.set_up().returncode == 0
    if "require_certificate" not in plants:
        machine.stop_mosquitto()
    machine.write(f"/etc/mosquitto/conf.d/{name}", plants)
    before = machine.configuration()
    # Of several allow_anonymous lines the last one read counts.
    opened = opened and not (name > "sluice" and "allow_anonymous" in plants)

    done = machine.set_up()

    assert done.returncode == 0
    assert machine.configuration() == before
    number = machine.read(DROP_IN).splitlines().index("allow_anonymous true") + 1
    told = f"warning: {DROP_IN}:{number}:allow_anonymous true\n" in done.stderr
    assert told == opened
    if told:
        assert f"    /etc/mosquitto/conf.d/{name}:1:listener 1884\n" in done.stderr
    if "require_certificate" not in plants:
        # As it is with a real Mosquitto.
        machine.start_mosquitto(1884)
        assert machine.publishes("-p", "1884") == opened


MOMENTS = (
    "try_drop_in",
    "replace_file",
    "restart_mosquitto",
    "start-stop-daemon",
    "broker_accepts",
)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("former", ["none", "an older one of ours"])
def test_a_kill_at_any_moment_leaves_a_broker_that_starts_and_the_next_run_repairs(
    machine: Machine, moment: str, former: str
) -> None:
    ours = f"{SOURCE}/deploy/mosquitto.conf"
    machine.start_mosquitto()
    if former != "none":
        assert machine.set_up().returncode == 0
    machine.append(ours, "max_connections 77\n")

    killed = machine.set_up(f"{moment}() {{ kill -KILL $$; }}")

    assert killed.returncode == -9 or killed.returncode == 137
    # As it is now: by hand, or as the machine boots.
    if machine.processes("mosquitto", "mosquitto"):
        machine.stop_mosquitto()
        machine.start_mosquitto()
        assert machine.publishes()
        machine.stop_mosquitto()
    machine.start_mosquitto()
    assert machine.publishes()
    pid = machine.broker()

    again = machine.set_up()

    assert again.returncode == 0, again.stderr
    assert machine.broker() != pid, "it runs with what is on the disk"
    assert machine.read(DROP_IN) == machine.read(ours)
    assert machine.publishes()
    assert not machine.has(FORMER)


def test_a_whole_installation_at_a_plant_leaves_its_broker_alone() -> None:
    with Machine() as machine:
        machine.prepare()
        machine.append(MAIN, f"listener 1883\n{PLANT}")
        machine.start_mosquitto()
        before, broker = machine.configuration(), machine.broker()
        sensor = Sensor(machine, 1883)

        done = machine.run(INSTALL)

        sensor.wait_for_more()
        assert "the plant's own" in done.stdout, done.stdout + done.stderr
        assert machine.has("/opt/sluice/app")
        assert sensor.was_never_interrupted()
        assert machine.broker() == broker
        assert machine.configuration() == before
        assert not machine.publishes(), "without a password"
