"""Google's own Pub/Sub emulator, where the Cloud SDK is installed."""

import shutil
from pathlib import Path

from tests.harness.programs import Program
from tests.harness.waiting import HOST, free_port, wait_until

# Where Google's Debian package puts it; its gcloud is a script elsewhere.
_DEBIAN_ROOT = Path("/usr/lib/google-cloud-sdk")
_COMMAND = Path("platform/pubsub-emulator/bin/cloud-pubsub-emulator")
_START_TIMEOUT_S = 60.0


def find_emulator() -> Path | None:
    """Return the emulator's start script; None where it, or Java, is not installed."""
    gcloud = shutil.which("gcloud")
    roots = [Path(gcloud).resolve().parents[1]] if gcloud else []
    found = [root / _COMMAND for root in (*roots, _DEBIAN_ROOT) if (root / _COMMAND).exists()]
    return found[0] if found and shutil.which("java") else None


class Emulator(Program):
    """The emulator on a port of its own.

    Args:
        command: Its start script.
        directory: For its log.
    """

    def __init__(self, command: Path, directory: Path) -> None:
        self.address = f"{HOST}:{free_port()}"
        port = self.address.rpartition(":")[2]
        arguments = [str(command), f"--host={HOST}", f"--port={port}"]
        super().__init__("emulator", arguments, {}, directory / "emulator.log")

    def start(self) -> None:
        """Start it and wait until it serves."""
        super().start()
        wait_until(
            lambda: "Server started" in self.log_text or not self.running,
            _START_TIMEOUT_S,
            "the emulator serves",
        )
        assert self.running, self.last_words()
