"""A throw-away Debian: an overlay over this machine's own root, in namespaces of its own.

What runs in it has the machine's real packages, users and databases of apt and dpkg, a process
table, a network of its own (``lo`` alone, so every port is free), and no systemd. What it writes
is in memory and gone with it; nothing of the machine is touched. It is there in some milliseconds,
and everything in it ends with the test, however that ends.

There is no network, so ``install.sh`` finds its Python environment there already, as another
``install.sh`` built it that had the network: see :func:`opt_with_environment`.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, Self

import pytest

from tests.harness.programs import ROOT
from tests.harness.waiting import wait_until

CHECKOUT = Path("/checkout")
"""Where the repository is in a throw-away root, read-only."""

INSTALL = CHECKOUT / "install.sh"
RUN_TIMEOUT_S = 120.0
START_TIMEOUT_S = 20.0
BUILD_TIMEOUT_S = 300.0
_SCRIPT = Path(__file__).with_suffix(".sh")
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}

Network = Literal["own", "machine"]


class ThrowawayRoot:
    """One of them; a context manager.

    Args:
        environment: Whether ``/opt`` has Sluice's Python environment; it is empty otherwise.
        network: Its own, with nothing but ``lo``; or the machine's, whose ports it shares.
    """

    def __init__(self, *, environment: bool = True, network: Network = "own") -> None:
        self._opt = [opt_with_environment()] if environment else []
        self._own_network = network == "own"
        self._process: subprocess.Popen[str] | None = None
        self._init = 0
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """Make it."""
        with tempfile.TemporaryDirectory(prefix="sluice-root-") as place:
            # Its end, and so that of all in it, does not depend on this process's good will.
            guard = ("setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child", "--fork")
            namespaces = ["--mount", "--pid", "--ipc", "--uts"]
            namespaces += ["--net"] if self._own_network else []
            self._process = subprocess.Popen(
                [*guard, *namespaces, _SCRIPT, place, ROOT, *self._opt],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            if self._process.stdout.readline() != "ready\n":
                self._process.kill()
                said = self._process.communicate()[1]
                raise AssertionError(f"no throw-away root could be made: {said}")
            # Mounted in its own namespace only, so the directory can go.
        pid = self._process.pid
        self._init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii"))
        return self

    def __exit__(self, *_: object) -> None:
        """End all that runs in it."""
        assert self._process is not None
        # The end of the first process is the end of all; "unshare" waits for it.
        os.kill(self._init, signal.SIGKILL)
        self._process.communicate(timeout=START_TIMEOUT_S)
        for process in self._started:
            process.wait(START_TIMEOUT_S)

    def path(self, path: str | Path) -> Path:
        """Return where the file of this root is seen from outside.

        A link to an absolute path leads outside there; so do not follow one.
        """
        return Path(f"/proc/{self._init}/root") / Path(path).relative_to("/")

    def write(self, path: str | Path, content: str | bytes, mode: int = 0o644) -> None:
        """Write a file, root's; its directories are made."""
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        file.chmod(mode)

    def read(self, path: str | Path) -> str:
        """Return the text of a file."""
        return self.path(path).read_text(encoding="utf-8", errors="replace")

    def run(
        self,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end, as root, with a clean environment and ``env``.

        Its output does not go through a pipe: a service that it leaves behind may keep it open.
        """
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out,
            tempfile.TemporaryFile("w+", errors="replace") as err,
        ):
            code = subprocess.run(
                self._inside(command, env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=timeout_s,
                check=False,
            ).returncode
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def check(self, *command: str | Path, env: Mapping[str, str] | None = None) -> str:
        """Run a command that has to succeed; return its standard output."""
        result = self.run(*command, env=env)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def start(
        self, *command: str | Path, env: Mapping[str, str] | None = None, log: str = "/dev/null"
    ) -> "subprocess.Popen[bytes]":
        """Start a command, which runs until it ends or the root does; a kill does not reach it.

        Args:
            command: What to run.
            env: Its variables besides the few that every process has.
            log: The file of this root that gets its output.
        """
        with self.path(log).open("ab") as output:
            process = subprocess.Popen(
                self._inside(command, env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._started.append(process)
        return process

    def listens(self, port: int) -> bool:
        """Return whether a connection to that port of the root's 127.0.0.1 is accepted."""
        return self.run("bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}").returncode == 0

    def wait_for_port(self, port: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until connections to that port are accepted."""
        wait_until(lambda: self.listens(port), timeout_s, f"a listener on port {port}")

    def processes(self, user: str, name: str) -> list[int]:
        """Return the ids, in this root, of a user's processes of that name; zombies left out."""
        found = self.run("pgrep", "--runstates", "D,R,S,T,t,I", "-u", user, "-x", name)
        return [int(word) for word in found.stdout.split()]

    def start_mosquitto(self, port: int = 1883) -> None:
        """Start Debian's Mosquitto as its service does: as root, from /etc/mosquitto."""
        self.check("install", "-d", "-o", "mosquitto", "-g", "mosquitto", "/run/mosquitto")
        self.start("/usr/sbin/mosquitto", "-c", "/etc/mosquitto/mosquitto.conf")
        self.wait_for_port(port)

    def stop_mosquitto(self) -> None:
        """Stop the service's Mosquitto and wait for its end."""
        self.run("pkill", "-TERM", "-u", "mosquitto", "-x", "mosquitto")
        wait_until(
            lambda: not self.processes("mosquitto", "mosquitto"),
            START_TIMEOUT_S,
            "the end of mosquitto",
        )

    def _inside(self, command: Sequence[str | Path], env: Mapping[str, str]) -> list[str | Path]:
        variables = [f"{name}={value}" for name, value in (_ENVIRONMENT | dict(env)).items()]
        namespaces = ["--mount", "--pid", "--ipc", "--uts"]
        namespaces += ["--net"] if self._own_network else []
        enter = ["nsenter", f"--target={self._init}", *namespaces, "--root"]
        return [*enter, "env", "--chdir=/", "-i", *variables, *command]


@cache
def why_impossible() -> str:
    """Return why no throw-away root can be made here; empty where it can."""
    if os.getuid() != 0:
        return "a throw-away root needs root"
    release = Path("/etc/os-release").read_text(encoding="utf-8")
    if not re.search(r"^ID=debian$", release, re.MULTILINE):
        return "a throw-away root is made of Debian, and this machine is not"
    try:
        with ThrowawayRoot(environment=False) as root:
            root.check("true")
    except AssertionError as error:
        return f"namespaces or overlays are not allowed here: {error}"
    return ""


def needs_throwaway_root() -> pytest.MarkDecorator:
    """Return the mark of tests that need one."""
    return pytest.mark.skipif(bool(why_impossible()), reason=why_impossible())


@cache
def opt_with_environment() -> Path:
    """Return a directory that is as ``/opt`` once ``install.sh`` has built its environment.

    It is built once per lock and Python, with the machine's network, and then kept in the user's
    cache directory.
    """
    shell = "\n".join(p.read_text() for p in (ROOT / "install.sh", *ROOT.glob("deploy/**/*.sh")))
    recipe = re.search(r"^build_venv\(\).*?^\}", shell, re.MULTILINE | re.DOTALL)
    assert recipe is not None, "install.sh has no build_venv any more"
    python = subprocess.check_output(["/usr/bin/python3", "-VV"])
    lock = (ROOT / "requirements.lock").read_bytes()
    key = hashlib.sha256(lock + python + recipe[0].encode()).hexdigest()[:16]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sluice-tests"
    cached.mkdir(mode=0o700, parents=True, exist_ok=True)
    opt = cached / f"environment-{key}"
    with _locked(cached / "lock"):
        if not opt.exists():
            _build(opt)
    return opt


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(opt: Path) -> None:
    passed_on = ("PIP_", "SSL_CERT_", "REQUESTS_CA_")
    pip = {name: value for name, value in os.environ.items() if name.startswith(passed_on)}
    proxies = {n: v for n, v in os.environ.items() if n.upper().endswith("_PROXY")}
    new = opt.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    with ThrowawayRoot(environment=False, network="machine") as root:
        # Mounts of files (Docker) and links into /run (systemd-resolved) are not in the root.
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            content = Path(name).read_bytes()
            root.run("rm", "-f", name)
            root.write(name, content)
        # No broker, and ended before it starts anything: only the environment is wanted.
        broker = {"MQTT_BROKER": "127.0.0.1", "MQTT_PORT": "9"}
        installing = root.start(INSTALL, env=pip | proxies | broker, log="/run/build.log")
        venvs = root.path("/opt/sluice/venvs")
        wait_until(
            lambda: list(venvs.glob("*/.complete")) or installing.poll() is not None,
            BUILD_TIMEOUT_S,
            "Sluice's Python environment",
        )
        assert list(venvs.glob("*/.complete")), root.read("/run/build.log")
        root.run("pkill", "-KILL", "-f", str(INSTALL))
        shutil.copytree(venvs, new / "sluice/venvs", symlinks=True)
    new.rename(opt)
