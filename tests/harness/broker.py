"""A real Mosquitto, with the installed system's configuration, on a port of its own."""

import os
import re
import shutil
from pathlib import Path

from tests.harness.programs import ROOT, Program
from tests.harness.waiting import HOST, free_port, listens, wait_until

# Debian keeps it out of the PATH of everybody but root.
_MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
_START_TIMEOUT_S = 20.0


class Broker(Program):
    """Mosquitto with persistence; keeps its port and its files over restarts.

    Args:
        directory: Its own, made here.
        options: Replace those of deploy/mosquitto.conf; None takes one away.
    """

    def __init__(self, directory: Path, options: dict[str, str | None] | None = None) -> None:
        directory.mkdir()
        self.port = free_port()
        config = directory / "mosquitto.conf"
        config.write_text(_configuration(self.port, directory, options or {}), encoding="utf-8")
        super().__init__("mosquitto", [_MOSQUITTO, "-c", config], {}, directory / "mosquitto.log")

    def start(self) -> None:
        """Start it and wait until it serves."""
        super().start()
        wait_until(
            lambda: listens(self.port) or not self.running, _START_TIMEOUT_S, "Mosquitto serves"
        )
        assert self.running, f"Mosquitto ended: {self.last_words()}"


def _configuration(port: int, directory: Path, options: dict[str, str | None]) -> str:
    text = (ROOT / "deploy" / "mosquitto.conf").read_text(encoding="utf-8")
    text, found = re.subn(r"(?m)^listener .*$", f"listener {port} {HOST}", text)
    assert found == 1, "deploy/mosquitto.conf has one listener"
    for name, value in options.items():
        text, found = re.subn(rf"(?m)^{name} .*$", "" if value is None else f"{name} {value}", text)
        if not found and value is not None:
            text += f"\n{name} {value}\n"
    text += f"\npersistence_location {directory}/\nlog_dest stdout\n"
    # As root it would become the user mosquitto, who has no rights in this directory.
    return text + ("user root\n" if os.getuid() == 0 else "")
