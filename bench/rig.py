"""What a comparison stands on: a directory, a broker, Sluice's processes, the spool's counters."""

import contextlib
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.processes import ROOT, BenchError, Process
from spool import sink_path, spool_path

START_TIMEOUT_S = 20.0

_MOSQUITTO_CONF = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence false
max_inflight_messages 1000
max_queued_messages 10000000
max_queued_bytes 0
set_tcp_nodelay true
log_type error
log_type warning
"""


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Rig:
    """One directory with everything that belongs to a run; gone afterwards.

    Args:
        directory: For everything.
        code: The checkout whose programs run; another one than ours to compare with.
    """

    def __init__(self, directory: Path, code: Path = ROOT) -> None:
        self.directory = directory
        self.code = code
        self.broker_port = free_port()
        self.spool_dir = directory / "spool"
        self._stack = contextlib.ExitStack()

    def start(self, process: Process) -> Process:
        """Have ``process`` stopped with the rig; return it."""
        self._stack.callback(process.stop)
        return process

    def broker(self) -> Process:
        """Start Mosquitto, nothing of it on the disk: it is the same for both sides."""
        binary = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
        if binary is None:
            raise BenchError("mosquitto is not installed: apt-get install mosquitto")
        conf = self.directory / "mosquitto.conf"
        conf.write_text(_MOSQUITTO_CONF.format(port=self.broker_port), encoding="ascii")
        process = self.start(Process("mosquitto", [binary, "-c", str(conf)], self.directory))
        wait_for(lambda: _listening(self.broker_port), "mosquitto listens", START_TIMEOUT_S)
        return process

    def environ(self, **more: str) -> dict[str, str]:
        """Return the environment of Sluice's processes."""
        return {
            "APP_ENV": "LOCAL",
            "MQTT_BROKER": "127.0.0.1",
            "MQTT_PORT": str(self.broker_port),
            "SPOOL_DIR": str(self.spool_dir),
            "INSTANCE_ID": "bench",
            "LOG_LEVEL": "WARNING",
            **more,
        }

    def collector(self, **more: str) -> Process:
        """Start the collector and wait until it has subscribed."""
        process = self.start(
            Process.python(
                "collector",
                ["collector"],
                self.directory,
                self.environ(LOG_LEVEL="INFO", **more),
                self.code,
            )
        )
        process.wait_output('"subscribed"', START_TIMEOUT_S)
        return process

    def forwarder(self, sink: str, **more: str) -> Process:
        """Start the forwarder of ``sink``."""
        return self.start(
            Process.python(
                f"forwarder-{sink}",
                ["forwarder", sink],
                self.directory,
                self.environ(**more),
                self.code,
            )
        )

    def publisher(
        self, count: int, first: int = 0, rate: float = 0.0, *, gated: bool = False
    ) -> Process:
        """Start a load generator that waits for a line before it begins.

        Args:
            count: Readings.
            first: Number of the first one.
            rate: Per second; 0 for as fast as possible.
            gated: Whether each line tells how many readings may have been sent by then.
        """
        process = self.start(
            Process.python(
                f"publish-{first}",
                [
                    "bench.publish",
                    f"--port={self.broker_port}",
                    f"--count={count}",
                    f"--first={first}",
                    f"--rate={rate}",
                    "--gated" if gated else "--wait",
                ],
                self.directory,
            )
        )
        process.wait_output("ready", 120.0)
        return process

    def spool_counter(self, name: str) -> int:
        """Return one of the collector's counters; 0 where it was never touched."""
        return _counter(spool_path(self.spool_dir), name)

    def sink_counter(self, sink: str, name: str = "delivered") -> int:
        """Return one of a forwarder's counters."""
        return _counter(sink_path(self.spool_dir, sink), name)

    def close(self) -> None:
        """Stop everything."""
        self._stack.close()


@contextlib.contextmanager
def rig(code: Path = ROOT) -> Iterator[Rig]:
    """Return a new rig for the programs of ``code``; stop and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as name:
        made = Rig(Path(name), code)
        try:
            yield made
        finally:
            made.close()


def wait_for(
    condition: Callable[[], bool], what: str, timeout_s: float, every_s: float = 0.005
) -> None:
    """Look every few milliseconds until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"in {timeout_s:.0f} s it did not happen that {what}")
        time.sleep(every_s)


def _listening(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _counter(path: Path, name: str) -> int:
    if not path.exists():
        return 0
    conn = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    try:
        row = conn.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()
    except sqlite3.OperationalError:
        return 0  # the file is being made
    finally:
        conn.close()
    return int(row[0]) if row else 0
