"""A process under test: started with a clean environment, its output in a file."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
STOP_TIMEOUT_S = 40.0
_TAIL_CHARS = 6_000


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return ``variables`` and what any process needs, and nothing of the tests' own."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, **variables}


class Program:
    """One process at a time, which may be started anew.

    Args:
        name: For messages and the log file.
        command: Its argument list.
        environment: All of its variables.
        log: Where its output goes, over all its lives.
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self.environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0

    def start(self) -> None:
        """Start it; its log counts from here."""
        assert not self.running, f"{self.name} runs already"
        self._log_from = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=clean_environment(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end; return the exit code."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.wait(timeout_s)

    def stop(self) -> tuple[int, float]:
        """Ask it to end; return its exit code and how many seconds it took."""
        begun = time.monotonic()
        self.signal(signal.SIGTERM)
        return self.wait(), time.monotonic() - begun

    def kill(self) -> None:
        """Kill it with -9, if it runs."""
        if self.running:
            self.signal(signal.SIGKILL)
            self.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def log_text(self) -> str:
        """What its present, or last, life has written."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_from)
            return log.read().decode(errors="replace")

    def wait_for_log(self, text: str, timeout_s: float = 30.0) -> None:
        """Wait until it has written ``text``."""
        wait_until(
            lambda: text in self.log_text or not self.running, timeout_s, f"{self.name}: {text!r}"
        )
        assert text in self.log_text, f"{self.name} ended without having written {text!r}"

    def memory_kib(self, key: str = "VmRSS") -> int:
        """Return its resident memory; VmHWM for the most that it ever was."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        (line,) = [line for line in status.splitlines() if line.startswith(f"{key}:")]
        return int(line.split()[1])

    def last_words(self) -> str:
        """Return the end of its log, for a failure's report."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-_TAIL_CHARS:]
