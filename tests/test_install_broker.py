"""What install.sh does with the Mosquitto of a machine, in throw-away roots.

A plant's broker keeps its configuration, its process and its clients at every moment, and nothing
is opened that was closed. Where the broker is as Debian ships it, Sluice's drop-in comes in only
if it works, and is taken back if it turns out not to.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.systemd_root import needs_systemd
from tests.harness.throwaway_root import INSTALL, needs_throwaway_root
from tests.harness.waiting import wait_until
from tests.plant_machine import (
    DROP_IN,
    FORMER,
    LOG,
    MAIN,
    PASSWORDS,
    PLANT,
    SECRET,
    SOURCE,
    TIMEOUT_S,
    Machine,
    Sensor,
)

pytestmark = needs_throwaway_root()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """One on which systemd does not run (a container)."""
    with Machine(environment=False) as made:
        made.prepare()
        yield made


@pytest.fixture
def server(machine: Machine) -> Machine:
    """One on which it does."""
    machine.boot("mosquitto")
    return machine


@pytest.fixture(
    params=["without systemd", pytest.param("with systemd", marks=needs_systemd())],
)
def either(machine: Machine, request: pytest.FixtureRequest) -> Machine:
    """Both, one after the other."""
    if request.param == "with systemd":
        machine.boot("mosquitto")
    return machine


def plants_files(port: int) -> dict[str, tuple[str, str]]:
    listener = f"listener {port}\n{PLANT}"
    return {
        "in mosquitto.conf": (MAIN, listener),
        "in conf.d": ("/etc/mosquitto/conf.d/plant.conf", listener),
        "in a hidden file": ("/etc/mosquitto/conf.d/.plant.conf", listener),
        "in another directory": ("/etc/mosquitto/plant.d/plant.conf", listener),
    }


@pytest.mark.parametrize(
    ("where", "port"),
    [
        *((where, 1883) for where in plants_files(0)),
        ("in mosquitto.conf", 1884),
        ("in conf.d", 1884),
    ],
)
def test_a_plants_broker_goes_on_as_it_is(machine: Machine, where: str, port: int) -> None:
    file, settings = plants_files(port)[where]
    if file != MAIN:
        machine.write(file, "")
    if "plant.d" in file:
        text = machine.read(MAIN)
        assert "include_dir /etc/mosquitto/conf.d" in text
        machine.write(MAIN, text.replace("/etc/mosquitto/conf.d", str(Path(file).parent)))
    machine.append(file, settings)
    if port == 1884:
        bridge = "connection hub\naddress 192.0.2.1\nremote_password hush\ntopic x out\n"
        machine.append(file, bridge)
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
    assert "hush" not in done.stdout
    # A restart of the machine changes nothing of that.
    machine.stop_mosquitto()
    machine.start_mosquitto(port)
    assert machine.publishes("-p", str(port), "-u", "sensor", "-P", SECRET)
    assert not machine.publishes("-p", str(port)), "without a password"


def test_debians_broker_gets_the_drop_in_and_keeps_it_without_another_restart(
    either: Machine,
) -> None:
    # Comments are no settings.
    either.append(MAIN, "\n# the operator was here\n")
    either.write("/etc/mosquitto/conf.d/notes.conf", "# nothing\n\n")
    either.start_mosquitto()
    before = either.broker()

    first = either.set_up()

    assert first.returncode == 0, first.stdout + first.stderr
    installed = either.broker()
    assert installed != before, "with the new configuration"
    assert either.read(DROP_IN) == either.read(f"{SOURCE}/deploy/mosquitto.conf")
    assert either.publishes()
    assert not either.has(FORMER)

    second = either.set_up()

    assert second.returncode == 0, second.stdout + second.stderr
    assert either.broker() == installed
    assert "Mosquitto answers on 127.0.0.1:1883" in second.stdout


def test_a_broker_that_does_not_run_is_started(either: Machine) -> None:
    for _ in range(2):
        assert either.set_up().returncode == 0
        assert either.publishes()
        either.stop_mosquitto()


def test_settings_that_mosquitto_refuses_never_reach_the_broker(either: Machine) -> None:
    either.start_mosquitto()
    before, broker = either.configuration(), either.broker()
    either.append(f"{SOURCE}/deploy/mosquitto.conf", "no_such_setting true\n")

    done = either.set_up()

    assert done.returncode == 1
    assert "the broker was not touched" in done.stderr
    assert "no_such_setting" in done.stderr.split("Mosquitto says:")[1].split("install.sh:")[0]
    assert either.configuration() == before
    assert either.broker() == broker


@pytest.mark.parametrize("former", ["none", "an older one of ours"])
def test_settings_with_which_the_broker_does_not_come_up_are_taken_back(
    either: Machine, former: str
) -> None:
    ours = f"{SOURCE}/deploy/mosquitto.conf"
    either.start_mosquitto()
    if former != "none":
        assert either.set_up().returncode == 0
    before = either.configuration()
    # A port that the trial does not need, and another program has.
    either.write("/run/other.conf", "listener 1999 127.0.0.1\nuser nobody\n")
    either.start("/usr/sbin/mosquitto", "-c", "/run/other.conf")
    either.wait_for_port(1999)
    either.append(ours, "listener 1999 127.0.0.1\n")

    done = either.set_up()

    assert done.returncode == 1
    assert "It runs again as before" in done.stderr
    assert "Address already in use" in done.stderr
    after = either.configuration()
    assert after == before
    assert either.publishes()
    assert either.listens(1999), "the other program is left alone"

    either.run("pkill", "-u", "nobody", "-x", "mosquitto")
    again = either.set_up()
    assert again.returncode == 0, again.stderr
    assert either.publishes("-p", "1999")


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

    done = machine.set_up()

    assert done.returncode == 0, done.stderr
    assert "apt-get" not in done.stdout, "the package would start one more, at each boot"
    assert f"in use by mosquitto (process {other})" in done.stdout
    assert "takes clients without a password" in done.stdout
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
    machine.append(f"{SOURCE}/deploy/mosquitto.conf", "max_connections 77\n")

    assert machine.set_up().returncode == 0

    assert machine.read(DROP_IN).endswith("max_connections 77\n")


def test_other_comments_in_our_drop_in_are_no_reason_for_a_restart(machine: Machine) -> None:
    machine.start_mosquitto()
    assert machine.set_up().returncode == 0
    broker = machine.broker()
    machine.append(f"{SOURCE}/deploy/mosquitto.conf", "# a newer version\n")

    assert machine.set_up().returncode == 0

    assert machine.read(DROP_IN).endswith("# a newer version\n")
    assert machine.broker() == broker


@pytest.mark.parametrize(
    ("plants", "state"),
    [
        (f"listener 1884\n{PLANT}", "opened"),
        (f"listener 1884\nrequire_certificate true\n{PLANT}", "closed"),
        (f"listener 1884\npassword_file {PASSWORDS}\n", "opened"),
    ],
)
@pytest.mark.parametrize("name", ["plant.conf", "z-plant.conf"])
def test_an_older_drop_in_of_ours_that_opens_the_plants_listener_is_told(
    machine: Machine, plants: str, state: str, name: str
) -> None:
    machine.start_mosquitto()
    assert machine.set_up().returncode == 0
    if "require_certificate" not in plants:
        machine.stop_mosquitto()
    machine.write(f"/etc/mosquitto/conf.d/{name}", plants)
    before = machine.configuration()
    # Of several allow_anonymous lines the last one read counts.
    opened = state == "opened" and not (name > "sluice" and "allow_anonymous" in plants)

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


KILL = "{ kill -KILL $$; }"
AT_A_RENAME = 'mv() {{ [ "$3" != {0} ] || kill -KILL $$; command mv "$@"; }}'
MOMENTS = {
    "while it is tried": f"trial_is_decided() {KILL}",
    "before what was there is kept": AT_A_RENAME.format(FORMER),
    "before the new one is there": AT_A_RENAME.format(DROP_IN),
    "before the restart": f"restart_mosquitto() {KILL}",
    "amid the restart": f"""start-stop-daemon() {KILL}
        systemctl() {{ [ "$1" != restart ] || kill -KILL $$; command systemctl "$@"; }}""",
    "after the restart": f"broker_accepts() {KILL}",
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("at", ["a first installation", "an upgrade, and a reboot"])
def test_a_kill_at_any_moment_leaves_a_broker_that_starts_and_the_next_run_repairs(
    either: Machine, moment: str, at: str
) -> None:
    ours = f"{SOURCE}/deploy/mosquitto.conf"
    upgrade = at != "a first installation"
    either.start_mosquitto()
    if upgrade:
        assert either.set_up().returncode == 0
    either.append(ours, "max_connections 77\n")

    killed = either.set_up(MOMENTS[moment])

    assert killed.returncode in {-9, 137}, killed.stderr
    if upgrade:
        either.reboot()
        assert either.publishes()
    before = either.broker() if either.runs() else 0

    again = either.set_up()

    assert again.returncode == 0, again.stderr
    assert either.broker() != before, "it runs with what is on the disk"
    assert either.read(DROP_IN) == either.read(ours)
    assert either.publishes()
    assert not either.has(FORMER)


@needs_systemd()
@pytest.mark.parametrize(
    ("unit", "told"),
    [
        ("[Service]\nExecStart=\nExecStart=/usr/sbin/mosquitto -c /etc/plant.conf\n",
         "mosquitto.service runs: /usr/sbin/mosquitto -c /etc/plant.conf"),
        ("", "mosquitto.service is masked"),
    ],
)  # fmt: skip
def test_a_service_that_the_plant_has_changed_is_the_plants(
    server: Machine, unit: str, told: str
) -> None:
    server.write("/etc/plant.conf", f"listener 1884\n{PLANT}")
    if unit:
        server.write("/etc/systemd/system/mosquitto.service.d/plant.conf", unit)
        server.check("systemctl", "daemon-reload")
        server.start_mosquitto(1884)
    else:
        server.check("systemctl", "mask", "mosquitto")
    before = server.configuration()

    done = server.set_up()

    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    assert server.configuration() == before
    if unit:
        assert server.publishes("-p", "1884", "-u", "sensor", "-P", SECRET)
        assert not server.publishes("-p", "1884")
    else:
        assert not server.processes("mosquitto", "mosquitto")


@needs_systemd()
def test_a_service_that_systemd_refuses_to_start_again_is_started(server: Machine) -> None:
    server.start_mosquitto()
    # More starts than it allows in a while: as of a broker that fails again and again.
    wait_until(
        lambda: server.run("systemctl", "restart", "mosquitto").returncode != 0,
        TIMEOUT_S,
        "systemd has had enough",
    )
    assert not server.runs()

    assert server.set_up().returncode == 0

    assert server.publishes()


@needs_systemd()
def test_a_plants_broker_goes_on_as_it_is_under_systemd(server: Machine) -> None:
    server.append(MAIN, f"listener 1883\n{PLANT}")
    server.start_mosquitto()
    before, broker = server.configuration(), server.broker()
    sensor = Sensor(server, 1883)

    done = server.set_up()

    sensor.wait_for_more()
    assert done.returncode == 0, done.stderr
    assert "the plant's own" in done.stdout
    assert sensor.was_never_interrupted()
    assert server.broker() == broker
    assert server.configuration() == before


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
        assert machine.configuration() == before
        assert not machine.publishes(), "without a password"

        do_as_advised(machine, done.stdout)

        wait_until(
            lambda: re.search(r" as sluice-\S+ .*u'sluice'", machine.read(LOG)),
            TIMEOUT_S,
            "the collector is let in",
        )
        again = machine.run(INSTALL)
        sensor.wait_for_more()
        assert again.returncode == 0, again.stdout + again.stderr
        assert "the plant's own" not in again.stdout, "MQTT_BROKER is given"
        assert sensor.was_never_interrupted()
        assert machine.broker() == broker


def do_as_advised(machine: Machine, advice: str) -> None:
    """Do what install.sh has said, word by word but for the terminal's questions."""
    for command in (
        f"mosquitto_passwd -b {PASSWORDS} sluice {SECRET}",
        f"echo {SECRET} | install -m 0400 -o sluice /dev/stdin /etc/sluice/mqtt-password",
    ):
        machine.check("sh", "-c", command)
    assert "mosquitto_passwd PASSWORD_FILE_OF_THE_BROKER sluice" in advice
    assert "install -m 0400 -o sluice /dev/stdin /etc/sluice/mqtt-password" in advice
    # Which is what "systemctl reload mosquitto" does.
    machine.check("kill", "-HUP", str(machine.broker()))
    settings = re.findall(r"(?m)^ {4}(MQTT_[A-Z_]+=\S+)$", advice)
    assert len(settings) == 4
    machine.append("/etc/sluice/sluice.env", "\n".join(["", *settings, ""]))
    machine.check("supervisorctl", "restart", "collector")
