"""How much room there is, and the ballast that is given up when there is none."""

import os
import shutil
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from spool.files import BALLAST_FILE
from spool.insertion import REJECTED_KEPT_BYTES
from spool.writer import SpoolWriter

WARN_AT = 0.80
"""From this share of SPOOL_MAX_BYTES the operator is warned."""

PRESSURE_AT = 0.90
"""From this share delivered rows are pruned whatever their retention."""

REJECTED_SHARE = 8
"""Rejected messages get one part in this many of SPOOL_MAX_BYTES, and as small a part of that from
PRESSURE_AT on."""

GROUP_SHARE = 8
"""One transaction gets one part in this many of SPOOL_MAX_BYTES; 5,000 readings are 1.5 MB."""

ROW_OVERHEAD_BYTES = 160
"""What a row costs beside topic and payload: numbers, names, header, slack of its page."""

BALLAST_MAX_BYTES = 16 * 1024 * 1024
BALLAST_SHARE = 64
BALLAST_MIN_BYTES = 512 * 1024
"""The ballast is at most one part in this many of SPOOL_MAX_BYTES."""


class Level(IntEnum):
    """How full the spool is."""

    GOOD = 0
    WARN = 1
    PRESSURE = 2
    FULL = 3


@dataclass(frozen=True)
class Budget:
    """The limit ``SPOOL_MAX_BYTES`` and what it means for the next batch."""

    max_bytes: int

    def level(self, writer: SpoolWriter, incoming_bytes: int = 0) -> Level:
        """Return how full the spool would be with ``incoming_bytes`` more."""
        # The write-ahead log has a bound of its own (spool.logwatch): no reading is dropped, pruned
        # early or refused for the bytes that a reader keeps in it.
        used = writer.used_bytes()
        # A batch is at most some MB; a small limit must not refuse it for ever for its size.
        if used + min(incoming_bytes, self.max_bytes // 4) > self.max_bytes:
            return Level.FULL
        if used >= PRESSURE_AT * self.max_bytes:
            return Level.PRESSURE
        return Level.WARN if used >= WARN_AT * self.max_bytes else Level.GOOD

    def rejected_bytes(self, level: Level) -> int:
        """Return how much the ring of rejected messages may hold at this level.

        It is the first to give way, so that garbage takes no room from readings.
        """
        usual = min(REJECTED_KEPT_BYTES, self.max_bytes // REJECTED_SHARE)
        return usual if level < Level.PRESSURE else usual // REJECTED_SHARE

    @property
    def group_bytes(self) -> int:
        """How much one transaction may bring, so that none leads far over the limit."""
        return self.max_bytes // GROUP_SHARE


class Ballast:
    """A file that holds space which the spool can have back on a full disk.

    On a truly full disk SQLite can neither insert, nor delete, nor checkpoint. Giving up the
    ballast makes the room that pruning needs to begin.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._path = directory / BALLAST_FILE
        self._bytes = min(BALLAST_MAX_BYTES, max_bytes // BALLAST_SHARE)

    @property
    def held(self) -> bool:
        """Whether the file is there in full."""
        return self._held_bytes() >= self._bytes

    def _held_bytes(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0  # missing, or the disk does not tell: making it says which

    def _wanted_bytes(self) -> int:
        """Return how large the file may be: on a small disk a quarter of what is free."""
        try:
            free = shutil.disk_usage(self._path.parent).free
        except OSError:
            return 0
        wanted = min(self._bytes, (free + self._held_bytes()) // 4)
        return wanted if wanted >= min(self._bytes, BALLAST_MIN_BYTES) else 0

    @property
    def fits(self) -> bool:
        """Whether the disk has room for it, or it is held."""
        return self._wanted_bytes() > 0

    def take(self) -> bool:
        """Make the file as large as the disk has plenty of room for; return whether it is held."""
        if self.held:
            return True
        wanted, held = self._wanted_bytes(), self._held_bytes()
        if wanted <= held:
            return wanted > 0
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError:
            return False  # no inode, no quota, a failing disk: go on without
        try:
            os.posix_fallocate(descriptor, 0, wanted)
        except OSError:
            # No room after all, or a file system without allocation: go on without.
            if not held:
                self._path.unlink(missing_ok=True)
                return False
            os.ftruncate(descriptor, held)
        finally:
            os.close(descriptor)
        return True

    def release(self) -> bool:
        """Give the space back; return whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False  # there was none, or the disk takes no changes
        return True
