"""Starting processes, and leaving none behind, whatever happens."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_KILL_WAIT_S = 5.0
_POLL_S = 0.02


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies.

    Without it, the programs of a supervisord killed with -9 would go to init and out of sight.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start ``command`` with its output in ``log``.

    It is out of reach of the terminal's Ctrl-C (the order of stopping is ours), and gets
    SIGTERM should this process be killed. Of our environment it sees only what any program
    needs: an APP_ENV exported in the user's shell must not reach the demo.
    """
    if setpriv := shutil.which("setpriv"):
        command = [setpriv, "--pdeathsig", "TERM", *command]
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own argument list, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
            env=clean_environment(),
        )


def clean_environment() -> dict[str, str]:
    """Return the variables that say nothing about Sluice."""
    kept = ("PATH", "HOME", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LANG": "C.UTF-8"}


def stop(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Ask ``process`` to stop and wait; say whether it did by itself in time."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def kill_descendants() -> list[int]:
    """Kill what is still running below this process; return the pids that were."""
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_WAIT_S
    while time.monotonic() < deadline:
        _reap()
        alive = set(descendants())
        if not alive:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= alive
        time.sleep(_POLL_S)
    return sorted(killed)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants() -> Iterator[int]:
    """Yield the pids of our children, their children and so on, zombies included."""
    parents = dict(_parents())
    for pid, parent in parents.items():
        ancestor: int | None = parent
        while ancestor is not None and ancestor != os.getpid():
            ancestor = parents.get(ancestor)
        if ancestor is not None:
            yield pid


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # A process may end while we look.
            with contextlib.suppress(OSError):
                after_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
                yield int(entry.name), int(after_name.split()[1])
