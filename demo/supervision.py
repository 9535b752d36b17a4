"""supervisord, its three programs and the restarter."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo import processes
from demo.errors import DemoError
from demo.layout import Layout

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
"""Three programs, one after the other, up to stopwaitsecs each."""

_CONTROL_TIMEOUT_S = 30.0
_POLL_S = 0.25
_LOG_TAIL_CHARS = 1500


@dataclass(frozen=True)
class Supervisor:
    """A running supervisord."""

    layout: Layout
    process: subprocess.Popen[bytes]

    def status(self) -> str:
        """Return the output of ``supervisorctl status``."""
        result = subprocess.run(  # noqa: S603 - our own argument list, no shell
            [_program("supervisorctl"), "-c", self.layout.config, "status"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_CONTROL_TIMEOUT_S,
            env=processes.clean_environment(),
        )
        return (result.stdout or result.stderr).rstrip()

    def wait_until_running(self) -> str:
        """Wait for all programs; return the output of ``supervisorctl status``.

        Raises:
            DemoError: One of them gives up, or time is up.
        """
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            self.check()
            text = self.status()
            # supervisorctl's exit code counts STARTING as running.
            if all(" RUNNING " in line for line in text.splitlines()):
                return text
            if "FATAL" in text or time.monotonic() > deadline:
                raise DemoError(f"not all programs run:\n{text}\n{self._last_words(text)}")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Raise DemoError if supervisord has ended."""
        if (code := self.process.poll()) is not None:
            raise DemoError(
                f"supervisord ended with code {code}; see {self.layout.log}:\n"
                + _tail(self.layout.log / "supervisord.out")
            )

    def _last_words(self, status: str) -> str:
        """Return the ends of the logs of those that do not run."""
        names = [line.split()[0] for line in status.splitlines() if "RUNNING" not in line]
        logs = [self.layout.log / f"{name}.log" for name in names]
        return "\n".join(f"--- {log}\n{_tail(log)}" for log in logs if log.exists())


@contextlib.contextmanager
def running_supervisor(layout: Layout) -> Iterator[Supervisor]:
    """Start supervisord, and stop it with its programs at the end."""
    command: list[str | Path] = [_program("supervisord"), "-n", "-s", "-c", layout.config]
    process = processes.start(command, layout.log / "supervisord.out")
    try:
        yield Supervisor(layout, process)
    finally:
        processes.stop(process, _STOP_TIMEOUT_S)


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _tail(log: Path) -> str:
    try:
        return log.read_text(errors="replace")[-_LOG_TAIL_CHARS:]
    except OSError:
        return ""
