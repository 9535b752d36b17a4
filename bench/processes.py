"""Real processes and what they cost, from /proc."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_CPUCLOCK_SCHED = 2


class BenchError(Exception):
    """A run that proves nothing: something did not arrive, did not start, or did not end."""


@dataclass(frozen=True)
class Usage:
    """What a process has used since its start."""

    cpu_s: float
    rss_bytes: int
    written_bytes: int
    """Bytes that it caused to be sent to the disk (/proc/PID/io, write_bytes)."""


class Process:
    """A process of the benchmark, with its output in a file.

    Args:
        name: For the log file and for messages.
        command: Argument list.
        directory: Where the log goes.
        environ: Added to our own environment.
        code: The checkout that it runs in.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        environ: Mapping[str, str] | None = None,
        code: Path = ROOT,
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self._log_file: IO[bytes] = self.log.open("ab")
        self._popen = subprocess.Popen(  # noqa: S603 - our own argument lists
            command,
            cwd=code,
            env={**os.environ, **(environ or {})},
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
        )
        self.pid = self._popen.pid

    @classmethod
    def python(
        cls,
        name: str,
        arguments: Sequence[str],
        directory: Path,
        environ: Mapping[str, str] | None = None,
        code: Path = ROOT,
    ) -> "Process":
        """Start ``python -m ARGUMENTS`` with this interpreter."""
        return cls(name, [sys.executable, "-m", *arguments], directory, environ, code)

    def usage(self) -> Usage:
        """Return what it has used so far."""
        stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        statm = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()
        io = dict(
            line.split(": ")
            for line in Path(f"/proc/{self.pid}/io").read_text(encoding="ascii").splitlines()
        )
        return Usage(
            (int(stat[11]) + int(stat[12])) / _TICKS_PER_S,
            int(statm[1]) * _PAGE_BYTES,
            int(io["write_bytes"]),
        )

    def cpu_ns(self) -> int:
        """Return the processor time of all its threads, to the nanosecond.

        Those that have ended count too: gRPC and Google's clients start threads for single calls.
        The clock ticks of :meth:`usage` are too coarse for a process that sleeps.
        """
        # What clock_getcpuclockid(3) returns; Python has it for threads only.
        return time.clock_gettime_ns(~self.pid << 3 | _CPUCLOCK_SCHED)

    def wake_ups(self) -> int:
        """Return how often its living threads have slept and been woken."""
        woken = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                for line in (task / "status").read_text(encoding="utf-8").splitlines():
                    if line.startswith("voluntary_ctxt_switches:"):
                        woken += int(line.split()[1])
        return woken

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._popen.send_signal(number)

    def say(self, line: str) -> None:
        """Write a line to its standard input."""
        if self._popen.stdin is None:
            raise BenchError(f"{self.name} has no standard input")
        self._popen.stdin.write(line.encode() + b"\n")
        self._popen.stdin.flush()

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_output(self, text: str, timeout_s: float) -> str:
        """Wait until it has printed ``text``; return all output."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output():
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} did not print {text!r}:\n{self.output()[-2000:]}")
            if not self.running and text not in self.output():
                raise BenchError(f"{self.name} ended early:\n{self.output()[-2000:]}")
            time.sleep(0.005)
        return self.output()

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.name} did not end:\n{self.output()[-2000:]}") from None

    def stop(self, timeout_s: float = 15.0) -> None:
        """End it by SIGTERM, and by SIGKILL if that does not help."""
        if self.running:
            self._popen.send_signal(signal.SIGTERM)
            try:
                self._popen.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        self._log_file.close()


@contextlib.contextmanager
def running(*processes: Process) -> Iterator[tuple[Process, ...]]:
    """Stop the processes at the end, last one first."""
    try:
        yield processes
    finally:
        for process in reversed(processes):
            process.stop()


def pause(seconds: float) -> None:
    """Sleep, where a measurement needs time to pass and not an event."""
    select.select([], [], [], seconds)
