"""The same system under a real supervisord, with the repository's supervisord.conf."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.harness.programs import ROOT, Program, clean_environment
from tests.harness.rig import PROGRAMS, Rig
from tests.harness.waiting import wait_until

CONTROL_TIMEOUT_S = 60.0
START_TIMEOUT_S = 60.0
ORPHANS_TIMEOUT_S = 30.0


class Supervisor(Program):
    """A supervisord for one rig, in the rig's directory, laid out as the installed system."""

    def __init__(self, rig: Rig) -> None:
        root = rig.directory
        self._config = root / "supervisord.conf"
        shutil.copyfile(ROOT / "supervisord.conf", self._config)
        (root / "app").symlink_to(ROOT)
        (root / "venv").symlink_to(sys.prefix)
        for name in ("etc", "run", "log"):
            (root / name).mkdir()
        settings = "".join(f"{name}={value}\n" for name, value in rig.variables.items())
        (root / "etc" / "sluice.env").write_text(settings, encoding="utf-8")
        command = [str(_tool("supervisord")), "-n", "-s", "-c", str(self._config)]
        super().__init__("supervisord", command, {}, root / "supervisord.log")
        self._rig = rig

    def start(self) -> None:
        """Start it and wait until all programs run and the collector has its session."""
        super().start()
        self.wait_until_running()
        self._rig.wait_for_session()

    def control(self, *arguments: str) -> str:
        """Return what ``supervisorctl`` says."""
        result = subprocess.run(
            [_tool("supervisorctl"), "-c", self._config, *arguments],
            capture_output=True,
            text=True,
            timeout=CONTROL_TIMEOUT_S,
            check=False,
            env=clean_environment({}),
        )
        return result.stdout + result.stderr

    def wait_until_running(self) -> None:
        """Wait until each program has run long enough to count as started."""
        wait_until(
            lambda: {n for n, state in self.states().items() if state == "RUNNING"} >= {*PROGRAMS},
            START_TIMEOUT_S,
            "supervisorctl status shows all programs RUNNING",
        )

    def states(self) -> dict[str, str]:
        """Return what ``supervisorctl status`` shows for each program."""
        return dict(
            re.findall(r"^([\w-]+) +([A-Z]+) ", self.control("status") + "\n", re.MULTILINE)
        )

    def pid_of(self, name: str) -> int:
        """Return a program's process id; 0 if it does not run."""
        return int(self.control("pid", name).strip())

    def pids(self) -> dict[str, int]:
        """Return every program's process id."""
        return {name: self.pid_of(name) for name in PROGRAMS}

    @contextmanager
    def supervising(self, *, wait: bool = True) -> Iterator[Self]:
        """Start it, and at the end leave nothing of it running, whatever happened.

        Args:
            wait: Whether all programs run before this goes on.
        """
        try:
            (self.start if wait else super().start)()
            yield self
        finally:
            try:
                if self.running:
                    self.stop()
                wait_until(lambda: not self.orphans(), ORPHANS_TIMEOUT_S, "all programs have ended")
            finally:
                self.kill()
                for pid in self.orphans():
                    os.kill(pid, signal.SIGKILL)

    def orphans(self) -> list[int]:
        """Return the process ids in the lock files, as far as those processes live."""
        locks = self._rig.spool_dir.glob("*.lock")
        pids = [int(lock.read_text(encoding="ascii") or 0) for lock in locks]
        return [pid for pid in pids if pid and _is_ours(pid)]


def _tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _is_ours(pid: int) -> bool:
    """Return whether the process is one of Sluice's, and not another with a reused id."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"collector" in command or b"forwarder" in command
