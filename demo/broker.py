"""A broker for the demo, on a free port of the loopback interface."""

import contextlib
import getpass
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo import processes
from demo.errors import DemoError
from demo.layout import Layout

BrokerName = Literal["mosquitto", "amqtt"]

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 15.0
_GRACE_S = 0.3
_PORT_ATTEMPTS = 5
_POLL_S = 0.05
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Broker:
    """A running broker."""

    name: BrokerName
    port: int
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raise DemoError if the broker has ended."""
        if (code := self.process.poll()) is not None:
            raise DemoError(f"the broker ({self.name}) ended with code {code}")


@contextlib.contextmanager
def running_broker(name: BrokerName, layout: Layout) -> Iterator[Broker]:
    """Start a broker, and stop it at the end.

    Raises:
        DemoError: It does not start.
    """
    broker = _start(name, layout)
    try:
        yield broker
    finally:
        processes.stop(broker.process, _STOP_TIMEOUT_S)


def _start(name: BrokerName, layout: Layout) -> Broker:
    log = layout.log / "broker.log"
    command = _mosquitto if name == "mosquitto" else _amqtt
    # Nobody can reserve a port for another process: should it be taken in between, try again.
    for _ in range(_PORT_ATTEMPTS):
        port = _free_port()
        process = processes.start(command(layout, port), log)
        if _answers(process, port):
            return Broker(name, port, process)
        processes.stop(process, _STOP_TIMEOUT_S)
    raise DemoError(
        f"the broker ({name}) does not start; its last words are in {log}:\n"
        + log.read_text(errors="replace")[-1000:]
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((_HOST, port), 1):
            return _still_runs(process)
        time.sleep(_POLL_S)
    return False


def _still_runs(process: subprocess.Popen[bytes]) -> bool:
    """Say whether it was ours that answered: without the port, ours ends at once."""
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _mosquitto(layout: Layout, port: int) -> list[str | Path]:
    # Debian keeps it where an unprivileged user's PATH does not lead.
    program = shutil.which("mosquitto") or shutil.which(
        "mosquitto", path="/usr/sbin:/usr/local/sbin"
    )
    if program is None:
        raise DemoError("mosquitto is not installed; sudo apt-get install mosquitto")
    config = layout.broker / "mosquitto.conf"
    config.write_text(
        f"listener {port} {_HOST}\n"
        "allow_anonymous true\n"
        # Started by root, it would become the user mosquitto and lose access to its files.
        f"user {getpass.getuser()}\n"
        "persistence true\n"
        f"persistence_location {layout.broker}/\n"
        "autosave_interval 5\n"
        "max_inflight_messages 1000\n"
        "max_queued_messages 1000000\n"
        "log_dest stderr\n",
        encoding="utf-8",
    )
    return [program, "-c", config]


def _amqtt(layout: Layout, port: int) -> list[str | Path]:
    config = layout.broker / "amqtt.yaml"
    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    listeners = {"default": {"type": "tcp", "bind": f"{_HOST}:{port}"}}
    # Its file is YAML, of which JSON is a part.
    config.write_text(json.dumps({"listeners": listeners, "plugins": plugins}), encoding="utf-8")
    return [Path(sys.executable).with_name("amqtt"), "-c", config]
