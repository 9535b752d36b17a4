"""A file of another owner: the error names it, its owner, and the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spool import wrong_owner
from tests.harness.programs import ROOT

as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs files of two users")


def test_what_is_ours_is_not_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert wrong_owner([tmp_path / "file", tmp_path / "missing", tmp_path]) == ""


def as_nobody(code: str, directory: Path, other: Path) -> str:
    """Return what ``code`` prints that becomes the user nobody, its arguments behind it."""
    done = subprocess.run(
        [sys.executable, "-c", code, directory, other],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
import os, sys
from pathlib import Path
from spool import SpoolError, SpoolWriter
SpoolWriter.open(Path(sys.argv[2])).close()  # what is imported late may be root's alone
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    SpoolWriter.open(Path(sys.argv[1])).close()
except SpoolError as error:
    print(error)
"""


@as_root
@pytest.mark.parametrize("name", ["spool.db", "spool.db-wal"])
def test_the_error_names_the_file_its_owner_and_the_command(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    os.chown(tmp_path, 65534, 65534)
    assert as_nobody(OPEN, tmp_path, other) == ""
    file = tmp_path / name
    file.touch()
    os.chown(file, 0, 0)
    file.chmod(0o600)
    said = as_nobody(OPEN, tmp_path, other)
    assert f"{file} belongs to root:root, mode 0600, and this program runs as nobody" in said
    assert f"sudo chown nobody:nogroup {file} && sudo chmod u+rw {file}" in said
