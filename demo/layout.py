"""What lies where below the demo's directory: the installed system in small."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError

SOURCE = Path(__file__).resolve().parent.parent
SOCKET_PATH_MAX_BYTES = 95
"""Linux allows 107 for a Unix socket; supervisord first binds one with its pid appended."""

_REFUSED_CHARACTERS = "%\"'\n\\"
"""supervisord's configuration would read more into these than a name."""


@dataclass(frozen=True)
class Layout:
    """The demo's directory. ``app``, ``venv``, ``etc``, ``run``, ``log``: supervisord.conf."""

    root: Path

    @property
    def config(self) -> Path:
        """The configuration of supervisord: a copy of the installed system's."""
        return self.root / "supervisord.conf"

    @property
    def log(self) -> Path:
        """All logs."""
        return self.root / "log"

    @property
    def spool(self) -> Path:
        """SPOOL_DIR."""
        return self.root / "spool"

    @property
    def broker(self) -> Path:
        """The broker's configuration and what it persists."""
        return self.root / "broker"

    @property
    def settings(self) -> Path:
        """What SLUICE_ENV_FILE names."""
        return self.root / "etc" / "sluice.env"

    @property
    def socket(self) -> Path:
        """The socket of supervisord."""
        return self.root / "run" / "supervisor.sock"

    def check(self) -> None:
        """Refuse a directory whose name supervisord cannot cope with.

        Raises:
            DemoError: The path is too long or holds a character with a meaning.
        """
        advice = "choose another: ./install.sh --demo --dir /tmp/sluice-demo"
        if len(bytes(self.socket)) > SOCKET_PATH_MAX_BYTES:
            raise DemoError(f"{self.root}: the path is too long for a Unix socket; {advice}")
        if any(character in str(self.root) for character in _REFUSED_CHARACTERS):
            raise DemoError(f"{self.root}: supervisord cannot use such a path; {advice}")

    def prepare(self) -> None:
        """Make everything but ``venv`` anew; what an earlier demo spooled goes."""
        for directory in (
            self.log,
            self.spool,
            self.broker,
            self.settings.parent,
            self.socket.parent,
        ):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o750)
        shutil.copyfile(SOURCE / "supervisord.conf", self.config)
        app = self.root / "app"
        app.unlink(missing_ok=True)
        app.symlink_to(SOURCE)

    def write_settings(self, mqtt_port: int) -> None:
        """Write the programs' environment file."""
        self.settings.write_text(
            "APP_ENV=LOCAL\n"
            "INSTANCE_ID=demo\n"
            "MQTT_BROKER=127.0.0.1\n"
            f"MQTT_PORT={mqtt_port}\n"
            f"SPOOL_DIR={self.spool}\n"
            "SPOOL_MAX_BYTES=1GiB\n",
            encoding="utf-8",
        )
