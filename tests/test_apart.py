"""A new spool is made, and an old one migrated, without sqlite-utils in the collector's memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spool import (
    CorruptFileError,
    NewerFormatError,
    SpoolWriter,
    StorageFaultError,
    prepare_apart,
    spool_path,
)
from tests.test_spool_writer import edit, new_reading

ROOT = Path(__file__).parent.parent


def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands of the processes that are started from here on."""
    commands: list[list[str]] = []
    real = os.posix_spawn

    def spawn(path: str, command: list[str], environ: dict[str, str]) -> int:
        commands.append(command)
        return real(path, command, environ)

    monkeypatch.setattr(os, "posix_spawn", spawn)
    return commands


def test_the_collector_makes_a_spool_and_never_imports_what_makes_it(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from collector.__main__ import _open_spool\n"
        "from lifecycle import load_settings\n"
        "writer, _ = _open_spool(load_settings({'APP_ENV': 'LOCAL', 'SPOOL_DIR': sys.argv[1]}, "
        "'h'), [])\n"
        "print(writer.epoch, 'sqlite_utils' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    epoch, imported = done.stdout.split()
    assert imported == "False"
    assert SpoolWriter.open(tmp_path).epoch == epoch


def test_a_current_spool_needs_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = started(monkeypatch)
    prepare_apart(tmp_path, os.environ)
    assert len(commands) == 1
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(1)], [], {})
    writer.close()
    prepare_apart(tmp_path, os.environ)
    assert len(commands) == 1
    assert SpoolWriter.open(tmp_path).last_seq() == 1


@pytest.mark.parametrize("trouble", ["no such program", "it ends at once"])
def test_without_that_process_the_spool_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    program = str(tmp_path / "python") if trouble == "no such program" else "/bin/false"
    monkeypatch.setattr(sys, "executable", program)
    directory = tmp_path / "spool"
    directory.mkdir()
    prepare_apart(directory, os.environ)
    assert not spool_path(directory).exists()
    assert SpoolWriter.open(directory).epoch


@pytest.mark.parametrize("obstacle", ["no directory", "another's database", "a newer release's"])
def test_the_obstacle_is_left_for_the_caller_to_meet_and_to_tell(
    tmp_path: Path, obstacle: str, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "spool"
    if obstacle != "no directory":
        directory.mkdir()
        edit(spool_path(directory), "CREATE TABLE theirs (a)")
    if obstacle == "a newer release's":
        edit(spool_path(directory), f"PRAGMA application_id={0x536C7563}")
        edit(spool_path(directory), "PRAGMA user_version=99")
    prepare_apart(directory, os.environ)
    assert capfd.readouterr() == ("", "")
    expected = {
        "no directory": StorageFaultError,
        "another's database": CorruptFileError,
        "a newer release's": NewerFormatError,
    }
    with pytest.raises(expected[obstacle]):
        SpoolWriter.open(directory)
