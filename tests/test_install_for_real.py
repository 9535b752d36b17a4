"""install.sh from its first line to its last, in a throw-away root that has no systemd."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.harness.programs import ROOT
from tests.harness.throwaway_root import CHECKOUT, INSTALL, ThrowawayRoot, needs_throwaway_root

pytestmark = needs_throwaway_root()

SETTINGS = "/etc/sluice/sluice.env"
SPOOL = Path("/var/lib/sluice")
CONTROL = "/usr/local/bin/supervisorctl"
PROGRAMS = ("collector", "forwarder-bigquery", "forwarder-pubsub", "restarter")
SOON_S = 30.0


@pytest.fixture
def fresh() -> Iterator[ThrowawayRoot]:
    """A machine that has never had Sluice."""
    with ThrowawayRoot() as root:
        yield root


@pytest.fixture(scope="module")
def shared() -> Iterator[ThrowawayRoot]:
    with ThrowawayRoot() as root:
        root.check(INSTALL)
        yield root


@pytest.fixture
def installed(shared: ThrowawayRoot) -> ThrowawayRoot:
    """A machine where Sluice runs; tests may share it, so each leaves it so."""
    shared.check("/opt/sluice/app/deploy/start.sh")
    wait_until(lambda: running(shared) == set(PROGRAMS), SOON_S, "all programs run")
    return shared


def running(root: ThrowawayRoot) -> set[str]:
    lines = root.run(CONTROL, "status").stdout.splitlines()
    return {line.split()[0] for line in lines if " RUNNING " in line}


def pids(root: ThrowawayRoot) -> set[str]:
    return set(re.findall(r"pid (\d+)", root.run(CONTROL, "status").stdout))


def all_ended(root: ThrowawayRoot) -> bool:
    return root.run("pgrep", "--runstates", "D,R,S,T,t,I", "-u", "sluice").returncode == 1


def spooled(root: ThrowawayRoot, directory: Path = SPOOL) -> int:
    query = "SELECT coalesce(sum(value), 0) FROM counter WHERE name = 'spooled'"
    database = str(directory / "spool.db")
    as_sluice = ("runuser", "-u", "sluice", "--")
    return int(root.run(*as_sluice, "sqlite3", "-readonly", database, query).stdout or 0)


# ------------------------------------------------------------------- twice, under load

LOAD = """
import json, pathlib, sys, time
sys.path.insert(0, "/checkout")
from demo.simulator import Simulator
simulator = Simulator("127.0.0.1", 1883)
simulator.connect()
simulator.announce()
simulator.start()
while not pathlib.Path("/run/enough").exists():
    time.sleep(0.05)
simulator.stop(30)
published = simulator.published()
print(json.dumps({"good": published.good, "unacked": published.unacked}), flush=True)
"""


def test_an_upgrade_under_load_loses_nothing_and_an_uninstall_keeps_the_data(
    fresh: ThrowawayRoot,
) -> None:
    first = fresh.run(INSTALL)
    assert first.returncode == 0, first.stdout + first.stderr
    assert max(map(len, first.stdout.splitlines())) <= 80
    assert fresh.check("stat", "-c", "%a %U:%G", SETTINGS) == "640 root:sluice\n"
    assert fresh.check("stat", "-c", "%a %U:%G", SPOOL) == "2750 sluice:sluice\n"
    assert fresh.check("stat", "-c", "%a %U", "/run/sluice-install.lock") == "600 root\n"
    settings = fresh.read(SETTINGS) + "\n# the operator was here\n"
    fresh.write(SETTINGS, settings, mode=0o640)
    fresh.start("/opt/sluice/venv/bin/python", "-c", LOAD, log="/run/load.log")
    wait_until(lambda: spooled(fresh) > 0, SOON_S, "readings come")
    second = fresh.run(INSTALL)
    assert second.returncode == 0, second.stdout + second.stderr
    fresh.write("/run/enough", "")
    published = json.loads(
        wait_until(lambda: fresh.read("/run/load.log"), SOON_S, "the simulator ends")
    )
    assert published["good"] > 100
    assert published["unacked"] == 0
    wait_until(lambda: spooled(fresh) >= published["good"], SOON_S, "all are spooled")
    assert spooled(fresh) == published["good"]
    assert fresh.read(SETTINGS) == settings
    assert running(fresh) == set(PROGRAMS)
    assert fresh.run(INSTALL, "--uninstall").returncode == 0
    assert spooled(fresh) == published["good"]
    assert not fresh.path("/opt/sluice").exists()
    assert not fresh.path(CONTROL).exists()


# ---------------------------------------------------------------------- killed in between

KILLED_BEFORE = (
    ("install.sh", "  create_directories$"),
    ("deploy/settings.sh", r'  enter_setting "\$new" INSTANCE_ID'),
    ("deploy/settings.sh", r'  mv "\$new" "\$file"'),
    ("install.sh", "    set_up_mosquitto$"),
    ("install.sh", r'  mv "\$PREFIX/app.new" "\$PREFIX/app"'),
    ("install.sh", "  write_wrapper$"),
    ("install.sh", "  start_sluice$"),
    ("install.sh", "  conclude$"),
)
"""Where install.sh is killed; the last two leave new code that does not run yet, or runs."""


def killed_at(root: ThrowawayRoot, number: int) -> None:
    file, line = KILLED_BEFORE[number]
    copy = f"/root/checkout-{number}"
    if not root.path(copy).exists():
        root.check("cp", "-R", CHECKOUT, copy)
        text = root.read(f"{copy}/{file}")
        assert re.search(rf"^{line}", text, re.MULTILINE), f"{file} has no line {line} any more"
        killed = re.sub(rf"^{line}", r"kill -KILL $$\n\g<0>", text, count=1, flags=re.MULTILINE)
        root.write(f"{copy}/{file}", killed, mode=0o755)
    result = root.run(f"{copy}/install.sh")
    assert result.returncode in {137, -9}, result.stdout + result.stderr


def test_killed_at_any_step_it_works_when_run_again(fresh: ThrowawayRoot) -> None:
    for number in range(len(KILLED_BEFORE)):
        killed_at(fresh, number)
        # Whole or not at all.
        written = fresh.path(SETTINGS)
        assert not written.exists() or "\nINSTANCE_ID=plant\n" in fresh.read(SETTINGS)
    # The last kill was behind the start: what follows are upgrades of what runs.
    wait_until(lambda: running(fresh) == set(PROGRAMS), SOON_S, "all programs run")
    settings = fresh.read(SETTINGS) + "\n# the operator was here\n"
    fresh.write(SETTINGS, settings, mode=0o640)
    for number, (file, _) in enumerate(KILLED_BEFORE):
        if file == "install.sh":  # only a first installation writes settings
            killed_at(fresh, number)
    result = fresh.run(INSTALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert running(fresh) == set(PROGRAMS)
    assert fresh.read(SETTINGS) == settings
    assert not list(fresh.path("/etc/sluice").glob("sluice.env.*"))
    left = {p.name for p in fresh.path("/opt/sluice").iterdir()}
    assert left == {"app", "etc", "log", "run", "supervisord.conf", "venv", "venvs"}


# -------------------------------------------------------------------------------- the lock


@pytest.mark.parametrize("owner", ["nobody", "root"])
def test_a_link_in_the_directory_that_all_may_write_is_not_followed(
    owner: str, installed: ThrowawayRoot
) -> None:
    installed.write("/root/victim", "precious")
    for name in ("sluice-install.lock", "sluice-install"):
        installed.check("ln", "-sfn", "/root/victim", f"/run/lock/{name}")
        installed.check("chown", "-h", owner, f"/run/lock/{name}")
    with wrong_settings(installed):
        # It has taken its lock by then: nor can another user keep it from that.
        assert "APP_ENV: 'NONE' is wrong" in installed.run(INSTALL).stderr
    assert installed.read("/root/victim") == "precious"


def test_two_at_once_are_refused_and_only_root_can_hold_the_lock(
    installed: ThrowawayRoot,
) -> None:
    lock = "/run/sluice-install.lock"
    as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")
    assert installed.run(*as_nobody, "flock", "-n", lock, "true").returncode != 0
    installed.start("flock", lock, "sh", "-c", "touch /run/held; sleep 60")
    wait_until(installed.path("/run/held").exists, SOON_S, "the lock is held")
    for arguments in ((), ("--uninstall",)):
        result = installed.run(INSTALL, *arguments)
        assert result.returncode == 1
        assert "another install.sh is running" in result.stderr
    installed.check("pkill", "-f", "sleep 60")
    assert running(installed) == set(PROGRAMS)


# ---------------------------------------------------------------------------- the settings


@contextlib.contextmanager
def wrong_settings(
    root: ThrowawayRoot, text: str = "APP_ENV=NONE\r\nMQTT_PORT=0\n"
) -> Iterator[None]:
    """Settings that are refused, for a while."""
    file = root.path(SETTINGS)
    before = file.read_bytes()
    file.write_bytes(text.encode())
    try:
        yield
    finally:
        file.write_bytes(before)


def test_what_the_programs_refuse_is_refused_in_their_words_before_anything_stops(
    installed: ThrowawayRoot,
) -> None:
    before = pids(installed)
    with wrong_settings(installed):
        result = installed.run(INSTALL)
    assert result.returncode == 1
    assert "APP_ENV: 'NONE' is wrong; expected LOCAL, DEV, PPRD or PRD" in result.stderr
    assert "MQTT_PORT: '0' is wrong; expected a port number from 1 to 65535" in result.stderr
    assert "what runs was not touched" in result.stderr
    assert pids(installed) == before


def test_a_password_file_that_only_root_can_read_is_refused(installed: ThrowawayRoot) -> None:
    installed.write("/etc/sluice/password", "secret", mode=0o600)
    text = "APP_ENV=LOCAL\nMQTT_USERNAME=sluice\nMQTT_PASSWORD_FILE=/etc/sluice/password\n"
    with wrong_settings(installed, text):
        result = installed.run(INSTALL)
    assert result.returncode == 1
    assert "MQTT_PASSWORD_FILE: '/etc/sluice/password' is wrong" in result.stderr
    assert "Read as the user sluice" in result.stderr


def test_a_wrong_first_answer_leaves_no_settings_behind(fresh: ThrowawayRoot) -> None:
    result = fresh.run(INSTALL, env={"MQTT_BROKER": "plant", "MQTT_PORT": "70000"})
    assert result.returncode == 1
    assert "MQTT_PORT: '70000' is wrong" in result.stderr
    assert list(fresh.path("/etc/sluice").iterdir()) == []


WINDOWS = (
    "# written on Windows\r\n"
    "MQTT_BROKER=ignored.example\r\n"
    "export APP_ENV = 'LOCAL'   # a comment\r\n"
    'MQTT_BROKER = "127.0.0.1"\r\n'
    "MQTT_PORT = 1884\r\n"
    "SPOOL_DIR = /srv/data/spool\r\n"
)


def test_settings_are_read_as_the_programs_read_them_and_a_missing_broker_is_told(
    fresh: ThrowawayRoot,
) -> None:
    fresh.write(SETTINGS, WINDOWS, mode=0o600)
    result = fresh.run(INSTALL)
    # The operator's own broker is not there yet.
    assert result.returncode == 1
    assert "Sluice is installed, but does not work yet" in result.stderr
    assert "not connected to the broker 127.0.0.1:1884" in result.stderr
    assert "refused" in result.stderr
    assert fresh.path(SETTINGS).read_bytes() == WINDOWS.encode()
    assert fresh.check("stat", "-c", "%a %U:%G", SETTINGS) == "640 root:sluice\n"
    assert [p.name for p in fresh.path("/srv/data").iterdir()] == ["spool"]
    assert fresh.path("/srv/data/spool/spool.db").exists()
    # No broker of ours where one was named.
    assert not fresh.path("/etc/mosquitto/conf.d/sluice.conf").exists()
    assert running(fresh) == set(PROGRAMS)


# ------------------------------------------------------------------- files of another owner


def test_files_that_root_has_copied_back_belong_to_sluice_again_and_no_other_does(
    installed: ThrowawayRoot,
) -> None:
    copied = ("spool.db", "pubsub.db", "bigquery.db-wal", "collector.lock", "identity.json")
    installed.check(CONTROL, "stop", "all")
    for name in copied:
        installed.check("chown", "root:root", SPOOL / name)
        installed.check("chmod", "600", SPOOL / name)
    # What a hostile program of that user might leave for root to give away, and another's file.
    installed.write("/root/victim", "precious", mode=0o600)
    installed.check("ln", "-s", "/root/victim", SPOOL / "evil.lock")
    installed.write("/var/lib/linked", "precious", mode=0o600)
    installed.check("ln", "/var/lib/linked", SPOOL / "hard.lock")
    installed.write(SPOOL / "notes.txt", "root's own", mode=0o600)
    installed.check(CONTROL, "start", "collector")
    log = "/var/log/sluice/collector.log"
    hint = f"sudo chown sluice:sluice {SPOOL}/collector.lock"
    wait_until(lambda: hint in installed.read(log), SOON_S, "the file is named, with the command")
    result = installed.run(INSTALL)
    assert result.returncode == 0, result.stdout + result.stderr
    owners = installed.check("stat", "-c", "%U:%G %a", *(SPOOL / name for name in copied))
    assert owners.splitlines() == ["sluice:sluice 640"] * len(copied)
    for name in copied:
        assert f"{SPOOL}/{name} belonged to root:root, and belongs to sluice now" in result.stdout
    assert (
        f"{SPOOL}/hard.lock belongs to root:root and has several names: it stays" in result.stderr
    )
    for kept in ("/root/victim", "/var/lib/linked", SPOOL / "notes.txt"):
        assert installed.check("stat", "-c", "%U %a", kept) == "root 600\n"
    assert running(installed) == set(PROGRAMS)
    installed.check("rm", SPOOL / "evil.lock", SPOOL / "hard.lock", SPOOL / "notes.txt")


def test_a_directory_that_holds_other_things_is_not_taken(installed: ThrowawayRoot) -> None:
    installed.write("/srv/other/precious", "x", mode=0o600)
    before = pids(installed)
    with wrong_settings(installed, "APP_ENV=LOCAL\nSPOOL_DIR=/srv/other\n"):
        result = installed.run(INSTALL)
    assert result.returncode == 1
    assert "install -d -m 2750 -o sluice -g sluice /srv/other/sluice" in result.stderr
    assert installed.check("stat", "-c", "%U", "/srv/other", "/srv/other/precious") == "root\n" * 2
    assert pids(installed) == before


# ------------------------------------------------------------------- what works, what does not


def test_a_program_that_ends_again_and_again_is_no_success(installed: ThrowawayRoot) -> None:
    installed.check(CONTROL, "stop", "all")
    installed.check("rm", SPOOL / "collector.lock")
    installed.check("mkdir", SPOOL / "collector.lock")
    result = installed.run(INSTALL)
    installed.check("rmdir", SPOOL / "collector.lock")
    assert result.returncode == 1, result.stdout
    assert "Sluice is installed, but does not work yet" in result.stderr
    assert "collector (exit status 75)" in result.stderr
    # supervisorctl's exit code 3 is no failure of the script's own.
    assert "nobody foresaw" not in result.stderr
    assert set(re.findall(r"\| (\S*) does not stay up", result.stderr)) <= set(PROGRAMS)
    assert f"Is a directory: '{SPOOL}/collector.lock'" in result.stderr
    wait_until(lambda: running(installed) == set(PROGRAMS), SOON_S, "it goes on by itself")


# --------------------------------------------------------------------- supervisord is away


def test_without_supervisord_the_command_says_how_to_start_it(installed: ThrowawayRoot) -> None:
    installed.check(CONTROL, "shutdown")
    wait_until(lambda: all_ended(installed), SOON_S, "all have ended")
    # As after a restart of the machine.
    installed.check("rm", "-rf", "/run/sluice")
    refused = installed.run(CONTROL, "status")
    assert refused.returncode == 4
    (command,) = re.findall(r"Start it: +sudo (.*)", refused.stderr)
    assert command in (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    assert installed.run(*command.split()).returncode == 0
    wait_until(lambda: running(installed) == set(PROGRAMS), SOON_S, "all programs run")
    before = pids(installed)
    assert installed.run(*command.split()).returncode == 0
    assert pids(installed) == before


def test_a_killed_supervisord_and_a_stranger_are_told_apart(installed: ThrowawayRoot) -> None:
    as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")
    stranger = installed.run(*as_nobody, CONTROL, "status")
    assert stranger.returncode == 4
    assert "usermod -aG sluice nobody" in stranger.stderr
    assert "does not run" not in stranger.stderr
    # What supervisorctl itself refuses is not the supervisord's absence.
    assert "does not run" not in installed.run(CONTROL, "start", "no-such-program").stderr
    installed.check("pkill", "-KILL", "-u", "sluice")
    wait_until(lambda: "Start it:" in installed.run(CONTROL, "status").stderr, SOON_S, "it says so")


def test_a_start_waits_for_a_supervisord_that_is_still_ending(installed: ThrowawayRoot) -> None:
    before = pids(installed)
    installed.check(CONTROL, "shutdown")
    # Its socket is what another one would be told by; the orderly end takes a while.
    installed.check("rm", "-rf", "/run/sluice")
    installed.check("/opt/sluice/app/deploy/start.sh")
    wait_until(lambda: running(installed) == set(PROGRAMS), SOON_S, "all programs run")
    assert not pids(installed) & before
    supervisords = installed.check("pgrep", "-u", "sluice", "-f", "bin/supervisord -c").split()
    assert len(supervisords) == 1
