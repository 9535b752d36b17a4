"""What install.sh and its files promise, tried on the real programs."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
INSTALL = ROOT / "install.sh"
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-demo.lock")
AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")

as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs namespaces or other users")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name, which every user may enter."""
    with tempfile.TemporaryDirectory(prefix="sluice-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        yield Path(name)


def run(*command: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


# --------------------------------------------------------------------------- the locks


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / lock).read_text()
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z0-9,-]+\])?==([^ ]+)", text, re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_versions_and_hashes_and_no_address(lock: str) -> None:
    allowed = re.compile(
        r"#([^/\\:]|deploy/lock\.sh)*"  # a comment, which names no other path and no address
        r"|[a-z0-9-]+(\[[a-z0-9,-]+\])?==[0-9a-z.]+"
        r"( ; [a-z_]+ (==|!=) '\w+'( and [a-z_]+ (==|!=) '\w+')*)? \\"
        r"|    --hash=sha256:[0-9a-f]{64}( \\)?"
    )
    odd = [line for line in (ROOT / lock).read_text().splitlines() if not allowed.fullmatch(line)]
    assert odd == []


def test_the_locks_agree_with_each_other_and_with_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runtime, dev, demo = (pins(lock) for lock in LOCKS)
    assert runtime.items() <= dev.items()
    assert runtime.items() <= demo.items() <= (dev | runtime).items()
    wanted = [(runtime, text) for text in project["dependencies"]]
    wanted += [(dev, text) for text in project["optional-dependencies"]["dev"]]
    for lock, text in wanted:
        requirement = Requirement(text)
        assert lock[canonicalize_name(requirement.name)] in requirement.specifier
    assert "amqtt" in demo
    assert "amqtt" not in runtime


def extras_of(lock: str) -> dict[str, set[str]]:
    text = (ROOT / lock).read_text()
    found = re.findall(r"^([a-z0-9-]+)(?:\[([a-z0-9,-]+)\])?==", text, re.MULTILINE)
    return {name: set(extras.split(",")) - {""} for name, extras in found}


def needs(name: str, extras: set[str]) -> list[Requirement]:
    """Return what a distribution requires here, when it is installed with these extras."""
    told = map(Requirement, importlib.metadata.requires(name) or ())
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [
        one
        for one in told
        if one.marker is None or any(one.marker.evaluate(where) for where in environments)
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_all_that_its_packages_require_extras_included(lock: str) -> None:
    """``pip --require-hashes`` without ``--no-deps`` refuses a lock that does not."""
    locked, versions = extras_of(lock), pins(lock)
    # Debian 12's pip counts NAME and NAME[EXTRA] as two things.
    plain = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / lock).read_text(), re.MULTILINE))
    assert plain == set(locked)
    missing = [
        f"{name} requires {one}"
        for name, extras in locked.items()
        # Not installed here: for another Python or another system.
        if is_installed(name)
        for one in needs(name, extras)
        if versions.get(canonicalize_name(one.name), "") not in one.specifier
        or not {canonicalize_name(extra) for extra in one.extras}
        <= locked[canonicalize_name(one.name)]
    ]
    assert missing == []


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_the_tests_run_on_what_is_locked() -> None:
    listed = run(sys.executable, "-m", "pip", "list", "--format=freeze").stdout.splitlines()
    pairs = [line.split("==") for line in listed if "==" in line]
    installed: dict[str, str] = {canonicalize_name(name): version for name, version in pairs}
    locked = pins("requirements.lock")
    # No part of what runs; the environment's own may be older.
    del locked["pip"]
    assert {name: installed.get(name) for name in locked} == locked


# ----------------------------------------------------------------- refusals, and their advice


def refusal(result: "subprocess.CompletedProcess[str]") -> str:
    """Return the message of a refusal; it is never a surprise, and it ends at once."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "nobody foresaw" not in result.stderr
    return result.stderr


def test_help_names_every_option_and_fits_80_columns() -> None:
    text = run(INSTALL, "--help").stdout
    options = ("--demo", "--seconds", "--dir", "--broker", "--uninstall", "--version")
    for word in (*options, "MQTT_BROKER"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--install"], "unknown argument: --install"),
        (["--demo", "--seconds"], "--seconds needs a value"),
        (["--demo", "--seconds", "soon"], "--seconds soon: a whole number"),
        (["--demo", "--broker", "kafka"], "--broker kafka: mosquitto or amqtt"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: list[str], words: str) -> None:
    assert words in refusal(run(INSTALL, *arguments))


def test_the_demo_never_starts_in_a_directory_that_holds_something_else(directory: Path) -> None:
    (directory / "spool").mkdir()
    (directory / "spool" / "precious").touch()
    assert "not a demo's directory" in refusal(run(INSTALL, "--demo", "--dir", directory))
    assert (directory / "spool" / "precious").exists()


@as_root
def test_installing_needs_root(directory: Path) -> None:
    script = directory / "install.sh"
    shutil.copy(INSTALL, script)
    assert "sudo ./install.sh" in refusal(run(*AS_NOBODY, script))


def in_own_mounts(preparation: str, *command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run ``command`` where ``preparation`` has mounted something for it alone."""
    return run("unshare", "--mount", "sh", "-ec", f'{preparation}\nexec "$@"', "sh", *command)


@as_root
def test_another_distribution_is_refused(directory: Path) -> None:
    release = directory / "os-release"
    release.write_text("ID=fedora\nVERSION_ID=40\n")
    result = in_own_mounts(f"mount --bind {release} /etc/os-release", INSTALL)
    assert "not Debian 12 but 'fedora 40'" in refusal(result)


@as_root
def test_a_small_disk_is_refused(directory: Path) -> None:
    mount = f"mount -t tmpfs -o size=64M none {directory}"
    result = in_own_mounts(mount, INSTALL, "--demo", "--dir", directory)
    assert re.search(r"the disk is too small: .* has 6\d MiB free, 512 MiB", refusal(result))


@as_root
def test_no_network_is_named_as_such_and_a_second_try_starts_over(directory: Path) -> None:
    result = run(
        *("unshare", "--net", INSTALL, "--demo", "--dir", directory),
        PIP_RETRIES="1",
        PIP_NO_CACHE_DIR="1",
    )
    message = refusal(result)
    assert "pip cannot install requirements.lock: the network" in message
    assert "HTTPS_PROXY" in message
    assert list(directory.glob("venvs/*/.complete")) == []


# ---------------------------------------------------------------------------- Mosquitto


class Mosquitto:
    """Debian's own main configuration with our drop-in, on another port and directory."""

    def __init__(self, directory: Path, port: int) -> None:
        self.port = port
        self.database = directory / "mosquitto.db"
        drop_in = (ROOT / "deploy" / "mosquitto.conf").read_text()
        assert "listener 1883 127.0.0.1\n" in drop_in
        (directory / "conf.d").mkdir()
        (directory / "conf.d" / "sluice.conf").write_text(
            drop_in.replace("listener 1883 ", f"listener {port} ")
        )
        main = Path("/etc/mosquitto/mosquitto.conf").read_text()
        for debian, here in (
            ("/var/lib/mosquitto/", f"{directory}/"),
            ("/etc/mosquitto/conf.d", f"{directory}/conf.d"),
            ("/run/mosquitto/mosquitto.pid", f"{directory}/pid"),
            ("/var/log/mosquitto/mosquitto.log", f"{directory}/log"),
        ):
            assert debian in main
            main = main.replace(debian, here)
        self._config = directory / "mosquitto.conf"
        self._config.write_text(main + ("\nuser root\n" if os.getuid() == 0 else "\n"))

    @contextlib.contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program
        process = subprocess.Popen([program, "-c", self._config])
        try:
            wait_for(lambda: process.poll() is not None or self._answers())
            assert process.poll() is None, "Mosquitto refused the configuration"
            yield process
        finally:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def subscribe(self, *more: str) -> "subprocess.CompletedProcess[str]":
        session = ("--disable-clean-session", "-i", "collector", "-q", "1", "-t", "#")
        return run("mosquitto_sub", "-p", str(self.port), *session, *more)

    def publish(self, *more: str | Path) -> "subprocess.CompletedProcess[str]":
        return run("mosquitto_pub", "-p", str(self.port), "-q", "1", "-t", "a/b", *more)


@pytest.fixture
def mosquitto(directory: Path) -> Mosquitto:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Mosquitto(directory, probe.getsockname()[1])


def test_queued_messages_survive_a_killed_mosquitto_once_they_are_saved(
    mosquitto: Mosquitto,
) -> None:
    with mosquitto.running() as process:
        assert mosquitto.subscribe("-E").returncode == 0
        assert mosquitto.publish("-m", "precious").returncode == 0
        # autosave_interval: 5 s.
        wait_for(lambda: mosquitto.database.exists() and saved(mosquitto.database, b"precious"))
        process.kill()
        process.wait()
    with mosquitto.running():
        assert mosquitto.subscribe("-C", "1", "-W", "10").stdout == "precious\n"


def saved(database: Path, payload: bytes) -> bool:
    return payload in database.read_bytes()


def test_far_more_than_the_default_thousand_are_queued(
    mosquitto: Mosquitto, directory: Path
) -> None:
    lines = directory / "lines"
    lines.write_text("".join(f"{number}\n" for number in range(5_000)))
    with mosquitto.running():
        mosquitto.subscribe("-E")
        for number in range(3):
            part = lines.read_text().splitlines()[number * 1000 : number * 1000 + 1000]
            feed = subprocess.run(
                ["mosquitto_pub", "-p", str(mosquitto.port), "-q", "1", "-t", "a/b", "-l"],
                input="\n".join(part) + "\n",
                text=True,
                check=False,
                timeout=60,
            )
            assert feed.returncode == 0
        got = mosquitto.subscribe("-C", "3000", "-W", "20").stdout.splitlines()
    assert got == [str(number) for number in range(3_000)]


def test_a_packet_above_the_limit_is_refused_aloud_and_one_above_ours_passes(
    mosquitto: Mosquitto, directory: Path
) -> None:
    payload = directory / "payload"
    with mosquitto.running():
        payload.write_bytes(b"x" * (256 * 1024 + 1))
        assert mosquitto.publish("-f", payload).returncode == 0
        payload.write_bytes(b"x" * (1024 * 1024 + 1))
        assert mosquitto.publish("-f", payload).returncode != 0


def test_only_this_machine_can_connect(mosquitto: Mosquitto) -> None:
    with mosquitto.running():
        addresses = {
            line.split()[3] for line in run("ss", "-ltnH").stdout.splitlines() if line.split()
        }
    assert {a for a in addresses if a.endswith(f":{mosquitto.port}")} == {
        f"127.0.0.1:{mosquitto.port}"
    }


# ---------------------------------------------------------------------------- supervisord

STUB = """
import os, sys, time
print("settings:", open(os.environ["SLUICE_ENV_FILE"]).read(), flush=True)
{body}
"""


@pytest.fixture
def supervised(directory: Path) -> Iterator[Path]:
    """supervisord.conf with stubs: one is misconfigured, one's disk fails, one is well."""
    (directory / "venv").symlink_to(sys.prefix)
    for name in ("run", "log", "etc", "app", "app/collector", "app/forwarder"):
        (directory / name).mkdir()
    (directory / "etc" / "sluice.env").write_text("here")
    shutil.copy(ROOT / "supervisord.conf", directory)
    (directory / "app/collector/__main__.py").write_text(STUB.format(body="sys.exit(78)"))
    body = "time.sleep(5 if sys.argv[1] == 'pubsub' else 1000)\nsys.exit(75)"
    (directory / "app/forwarder/__main__.py").write_text(STUB.format(body=body))
    supervisord = Path(sys.executable).with_name("supervisord")
    process = subprocess.Popen([supervisord, "-n", "-s", "-c", directory / "supervisord.conf"])
    yield directory
    process.terminate()
    assert process.wait(60) == 0
    assert not (directory / "run" / "supervisor.sock").exists()


def status(directory: Path, program: str) -> str:
    supervisorctl = Path(sys.executable).with_name("supervisorctl")
    result = run(supervisorctl, "-c", directory / "supervisord.conf", "status", program)
    return result.stdout


def test_a_wrong_setting_becomes_fatal_and_a_failing_disk_never_does(supervised: Path) -> None:
    log = supervised / "log" / "supervisord.log"
    wait_for(lambda: "FATAL" in status(supervised, "collector"), timeout_s=60)
    # By then the other has failed more often than startretries, had those counted.
    wait_for(lambda: log.read_text().count("exited: forwarder-pubsub (exit status 75") >= 3)
    assert "gave up: forwarder-pubsub" not in log.read_text()
    assert log.read_text().count("exited: collector (exit status 78") == 6
    assert "RUNNING" in status(supervised, "forwarder-bigquery")
    assert "settings: here" in (supervised / "log" / "forwarder-bigquery.log").read_text()
    assert (supervised / "run" / "supervisor.sock").stat().st_mode & 0o777 == 0o770
