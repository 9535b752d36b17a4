"""stat() that fails is a storage fault like any other: exit code 75, and no traceback."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spool import Ballast, SpoolReader, SpoolWriter, StorageFaultError
from spool.bell import Listener

ASKED: dict[str, Callable[[Path], object]] = {
    "spool.db-wal": lambda directory: SpoolWriter.open(directory).wal_bytes,
    "spool.db": lambda directory: SpoolReader.open(directory).replaced,
    "spool.db ": lambda directory: lambda: SpoolReader.open(directory),
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let stat() fail with EIO for one name from now on; strace could not tell whose call it is."""
    real = os.stat

    def fail(name: str) -> None:
        def stat(path: str | Path, *, follow_symlinks: bool = True) -> os.stat_result:
            if str(path).endswith(f"/{name}"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(os, "stat", stat)

    return fail


@pytest.mark.parametrize("name", ASKED)
def test_a_file_of_the_spool(tmp_path: Path, name: str, failing: Callable[[str], None]) -> None:
    SpoolWriter.open(tmp_path).close()
    asked = ASKED[name](tmp_path)
    assert callable(asked)
    failing(name.strip())
    with pytest.raises(StorageFaultError, match="dmesg"):
        asked()


def test_the_ballast_counts_as_missing(tmp_path: Path, failing: Callable[[str], None]) -> None:
    ballast = Ballast(tmp_path, 1024 * 1024)
    assert ballast.take()
    failing("ballast")
    assert not ballast.held


def test_the_doorbell_is_opened_again(tmp_path: Path, failing: Callable[[str], None]) -> None:
    SpoolWriter.open(tmp_path).close()
    listener = Listener.open(tmp_path)
    assert not listener.replaced()
    failing("doorbell")
    assert listener.replaced()
    listener.close()
