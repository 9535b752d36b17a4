"""What install.sh does to the Mosquitto it finds, with the real one, in throw-away roots."""

import re

import pytest

from tests.broker_machine import (
    CLOSED,
    CONF_D,
    DROP_IN,
    LOG,
    MAIN,
    PENDING,
    SENSOR,
    SHIPPED,
    TIMEOUT_S,
    TRIAL,
    Machine,
    debian,
    machine,
    occupy,
)
from tests.harness.throwaway_root import INSTALL, needs_throwaway_root
from tests.harness.waiting import wait_until

__all__ = ["debian", "machine"]

pytestmark = needs_throwaway_root()

NOT_AUTHORISED = 5

# What Docker gives, so far as install.sh has a use for it; above all, not sys_ptrace.
CONTAINER_RIGHTS = ("chown", "dac_override", "fowner", "kill", "setgid", "setuid", "setpcap")


# ------------------------------------------------------------------- the plant's own broker


def test_a_plants_broker_serves_its_sensors_while_sluice_is_installed() -> None:
    with Machine() as plant:
        plant.prepare()
        plant.write(MAIN, plant.read(MAIN) + f"\nlistener 1883\n{CLOSED}")
        plant.start_mosquitto()
        before, process = plant.settings(), plant.service()
        sensor = f"-h 127.0.0.1 -i sensor -q 1 -t a/b {' '.join(SENSOR)}"
        plant.start("bash", "-c", f"mosquitto_sub {sensor} -i reader > /run/received")
        wait_until(lambda: "as reader" in plant.read(LOG), TIMEOUT_S, "a reader is there")
        numbers = "n=0; while sleep 0.02; do echo $((n++)); done"
        plant.start("bash", "-c", f"({numbers}) | mosquitto_pub {sensor} -l")

        def received() -> list[str]:
            return plant.read("/run/received").splitlines()

        wait_until(lambda: len(received()) > 10, TIMEOUT_S, "the sensor publishes")
        done = plant.run(INSTALL)
        count = len(received())
        wait_until(lambda: len(received()) > count + 10, TIMEOUT_S, "it still does")

        assert done.returncode == 0, done.stdout + done.stderr
        assert received() == [str(number) for number in range(len(received()))]
        assert plant.read(LOG).count("as sensor") == 1, "it never had to connect again"
        assert plant.service() == process
        assert plant.settings() == before
        assert plant.publishes(1883) == NOT_AUTHORISED
        assert f"{MAIN}:15: listener 1883" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80

        # What it says then, and docs/operations.md, step by step.
        plant.check("mosquitto_passwd", "-b", "/etc/mosquitto/passwd", "sluice", "gate")
        plant.check("pkill", "-HUP", "-f", f"^/usr/sbin/mosquitto -c {MAIN}")
        known_to_sluice = "/etc/sluice/mqtt-password"
        plant.check("install", "-m", "0640", "-g", "sluice", "/dev/null", known_to_sluice)
        plant.write(known_to_sluice, "gate", mode=0o640)
        for line in (
            "MQTT_BROKER=localhost",
            "MQTT_USERNAME=sluice",
            f"MQTT_PASSWORD_FILE={known_to_sluice}",
        ):
            assert f"  {line}\n" in done.stdout
            plant.check(
                "sed", "-i", f"s|^#{line.partition('=')[0]}=.*|{line}|", "/etc/sluice/sluice.env"
            )
        plant.check("/usr/local/bin/supervisorctl", "restart", "collector")
        wait_until(
            lambda: "as sluice-plant" in plant.read(LOG), TIMEOUT_S, "the collector is let in"
        )
        assert plant.read(LOG).count("as sensor") == 1, "nor was it for that"


# Each is what a plant may have set, and what has to be said of it.
OWN = {
    "a listener before conf.d": (MAIN, f"listener 1884\n{CLOSED}\n%s", f"{MAIN}:1: listener"),
    "a file in conf.d": (
        f"{CONF_D}/plant.conf",
        f"# ours\n\nlistener 1884\n{CLOSED}",
        f"{CONF_D}/plant.conf:3: listener 1884",
    ),
    "a hidden file": (f"{CONF_D}/.x.conf", f"listener 1884\n{CLOSED}", f"{CONF_D}/.x.conf:1: l"),
    "a limit alone": (MAIN, "%s\nmax_connections 50\n", f"{MAIN}:15: max_connections 50"),
    "another directory": (MAIN, "%s\ninclude_dir /etc/mosquitto/certs\n", ":15: include_dir"),
    "CRLF": (MAIN, "%s\r\nmax_connections 50\r\n", f"{MAIN}:15: max_connections 50"),
    "another place of the queue": (
        MAIN,
        f"persistence true\npersistence_location /srv\nlog_dest file {LOG}\ninclude_dir {CONF_D}",
        f'{MAIN}: without "persistence_location /var/lib/mosquitto/"',
    ),
    "another unit": (
        "/etc/systemd/system/mosquitto.service.d/override.conf",
        "[Service]\nExecStart=\nExecStart=/usr/sbin/mosquitto -c /srv/plant.conf\n",
        "override.conf:3:ExecStart=/usr/sbin/mosquitto -c /srv/plant.conf",
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_whatever_is_not_debians_is_the_plants(machine: Machine, case: str) -> None:
    path, text, said = OWN[case]
    machine.write(path, text.replace("%s", machine.read(MAIN)))
    machine.check("mkdir", "-p", "/srv")
    port = 1884 if "listener 1884" in text else 1883
    machine.start_mosquitto(port)
    before, process = machine.settings(), machine.service()

    code, output = machine.set_up()

    assert code == 0, output
    assert said in output
    assert "docs/operations.md" in output
    assert f"MQTT_PORT={port}\n" in output
    assert machine.settings() == before
    assert machine.service() == process
    assert machine.publishes(port) == (NOT_AUTHORISED if port == 1884 else 0)


def test_another_process_on_the_port_is_the_plants_broker(machine: Machine) -> None:
    machine.write("/srv/plant.conf", f"listener 1883\n{CLOSED}")
    machine.start("/usr/sbin/mosquitto", "-c", "/srv/plant.conf")
    machine.wait_for_port(1883)

    code, output = machine.set_up()

    assert code == 0, output
    assert re.search(r"port 1883: taken by mosquitto \(process \d+\)", output)
    assert "A broker answers on 127.0.0.1:1883" in output
    assert not machine.has(DROP_IN)
    assert machine.publishes(1883, *SENSOR) == 0


def test_an_upgrade_never_widens_and_names_what_is_open(debian: Machine) -> None:
    debian.ship(SHIPPED + "# of the release before\n")
    assert debian.set_up()[0] == 0
    debian.write(f"{CONF_D}/plant.conf", f"{CLOSED}\nlistener 1884\n")
    debian.stop_mosquitto()
    debian.start_mosquitto(1884)
    assert debian.publishes(1884) == 0, "our drop-in is read last, and opens it"
    debian.ship(SHIPPED)
    before, process = debian.settings(), debian.service()

    code, output = debian.set_up()

    assert code == 0, output
    opens = SHIPPED.splitlines().index("allow_anonymous true") + 1
    place = f"  {CONF_D}/plant.conf:4: listener 1884 ({DROP_IN}:{opens}: allow_anonymous true)"
    assert place in output.splitlines()
    assert f"{DROP_IN}:{opens - 1}" not in output, "our own listener is this machine's only"
    assert debian.settings() == before
    assert debian.service() == process


@pytest.mark.parametrize(
    "closed",
    [
        "listener 1884\nrequire_certificate true\n",  # recipe (1)
        f"listener 1884\n{CLOSED}",  # the last line counts, in a file after ours
    ],
)
def test_what_is_closed_is_not_called_open(debian: Machine, closed: str) -> None:
    assert debian.set_up()[0] == 0
    debian.write(f"{CONF_D}/tls.conf", closed)
    code, output = debian.set_up()
    assert code == 0, output
    assert f"{CONF_D}/tls.conf:1: listener 1884" in output
    assert "warning" not in output


# --------------------------------------------------------------- Mosquitto as Debian ships it


def test_debians_broker_gets_the_drop_in_once(debian: Machine) -> None:
    # Another broker of the same user, on the same machine, is none of install.sh's business.
    debian.write("/srv/second.conf", "listener 1890 127.0.0.1\nallow_anonymous true\n")
    debian.start("/usr/sbin/mosquitto", "-c", "/srv/second.conf")
    debian.wait_for_port(1890)
    second = set(debian.processes("mosquitto", "mosquitto")) - set(debian.service())
    former = debian.service()

    code, output = debian.set_up()

    assert (code, output) == (0, "Mosquitto answers on 127.0.0.1:1883\n")
    assert debian.serves_with_ours()
    process = debian.service()
    assert process != former
    assert not debian.has(PENDING)

    assert debian.set_up() == (0, "Mosquitto answers on 127.0.0.1:1883\n")
    assert debian.service() == process, "nothing was changed, so it was not restarted"
    assert second < set(debian.processes("mosquitto", "mosquitto"))


def test_it_does_so_with_the_rights_that_root_has_in_a_container(debian: Machine) -> None:
    rights = ("setpriv", f"--bounding-set=-all,{','.join(f'+{name}' for name in CONTAINER_RIGHTS)}")
    (process,) = debian.service()
    assert debian.run(*rights, "readlink", f"/proc/{process}/fd/0").returncode != 0, (
        "it sees too much"
    )

    assert debian.set_up(within=rights) == (0, "Mosquitto answers on 127.0.0.1:1883\n")

    assert debian.serves_with_ours()
    assert debian.service() != [process]


def test_an_upgrade_changes_our_drop_in_and_never_an_edited_one(debian: Machine) -> None:
    debian.ship(SHIPPED + "# of the release before\n")
    assert debian.set_up()[0] == 0
    debian.ship(SHIPPED)
    assert debian.set_up()[0] == 0
    assert debian.serves_with_ours()
    debian.write(DROP_IN, edited := SHIPPED + "max_connections 50\n")
    process = debian.service()

    code, output = debian.set_up()

    assert code == 0
    assert "was edited here" in output
    assert debian.read(DROP_IN) == edited
    assert debian.service() == process


def test_a_drop_in_that_mosquitto_refuses_never_gets_to_the_broker(debian: Machine) -> None:
    line = SHIPPED.count("\n") + 1
    debian.ship(SHIPPED + "nonsense true\n")
    before, process = debian.settings(), debian.service()

    code, output = debian.set_up()

    assert code == 1
    assert 'Unknown configuration variable "nonsense"' in output
    assert f"{DROP_IN}:{line}" in output
    assert "the running broker was not touched" in output
    assert debian.settings() == before
    assert debian.service() == process
    assert not debian.has(TRIAL)


@pytest.mark.parametrize("former", [None, SHIPPED])
def test_a_drop_in_with_which_the_broker_does_not_come_up_is_taken_back(
    debian: Machine, former: str | None
) -> None:
    if former:
        assert debian.set_up()[0] == 0
    occupy(debian)
    before = debian.settings()

    code, output = debian.set_up()

    assert code == 1
    assert "Address already in use" in output
    assert "does not come up" in output
    assert "Mosquitto runs again with the configuration before." in output
    assert debian.settings() == before
    assert debian.publishes(1883) == 0
    assert not debian.has(PENDING)
    # And once the reason is gone, it is as if that had never been.
    debian.ship(SHIPPED)
    assert debian.set_up()[0] == 0
    assert debian.serves_with_ours()
