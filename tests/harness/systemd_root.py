"""A throw-away root that systemd runs: its services, and nothing else of a whole machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.harness.throwaway_root import START_TIMEOUT_S, ThrowawayRoot
from tests.harness.waiting import wait_until

# A process table, a device tree and control groups of its own. What is the kernel's own stays
# out of its reach.
_BOOT = """
mount --make-rprivate /
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t tmpfs none /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir /tmp/dev
mount -t tmpfs -o mode=755 none /tmp/dev
for name in null zero full random urandom tty; do
  touch /tmp/dev/$name
  mount --bind /dev/$name /tmp/dev/$name
done
ln -s /proc/self/fd /tmp/dev/fd
mkdir /tmp/dev/shm
mount --move /tmp/dev /dev
exec env -i container=throwaway /lib/systemd/systemd --unit=alone.target --show-status=0
"""
_TARGET = """
[Unit]
Wants=systemd-journald.service
"""
_WITHOUT_THE_REST = """
[Unit]
DefaultDependencies=no
"""


class SystemdRoot(ThrowawayRoot):
    """One of them: :meth:`boot` starts systemd, in which everything else runs from then on."""

    def __init__(self, *, environment: bool = True) -> None:
        super().__init__(environment=environment)
        self._systemd: list[str] = []

    def boot(self, *services: str) -> None:
        """Start systemd, and none of its services; those named need no other to be started."""
        units = Path("/etc/systemd/system")
        self.write(units / "alone.target", _TARGET)
        for name in services:
            self.write(units / f"{name}.service.d/alone.conf", _WITHOUT_THE_REST)
        namespaces = ("--mount", "--pid", "--cgroup", "--fork")
        self.start("unshare", *namespaces, "sh", "-ec", _BOOT, log="/run/boot.log")
        found = wait_until(self._first_process, START_TIMEOUT_S, "systemd starts")
        self._systemd = ["nsenter", f"--target={found}", "--mount", "--pid", "--cgroup"]
        wait_until(self._is_up, START_TIMEOUT_S, "systemd is up")

    @property
    def booted(self) -> bool:
        """Whether systemd runs."""
        return bool(self._systemd)

    def start_mosquitto(self, port: int = 1883) -> None:
        """Start Debian's Mosquitto, by systemd where it runs."""
        if not self.booted:
            super().start_mosquitto(port)
            return
        self.check("systemctl", "start", "mosquitto")
        self.wait_for_port(port)

    def stop_mosquitto(self) -> None:
        """Stop it, and wait for its end."""
        if self.booted:
            self.check("systemctl", "stop", "mosquitto")
        else:
            super().stop_mosquitto()

    def _first_process(self) -> str:
        return self.run("pgrep", "-o", "-x", "systemd").stdout.strip()

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-active", "alone.target").stdout == "active\n"

    def _inside(self, command: Sequence[str | Path], env: Mapping[str, str]) -> list[str | Path]:
        return super()._inside([*self._systemd, *command], env)


def needs_systemd() -> pytest.MarkDecorator:
    """Return the mark of tests that need it installed."""
    absent = not Path("/lib/systemd/systemd").exists()
    return pytest.mark.skipif(absent, reason="Debian's systemd is not installed")
