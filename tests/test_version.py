"""Which release runs is told by each program and in its log, and there is one number."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lifecycle import VERSION, ExitCode

ROOT = Path(__file__).parent.parent
PYTHON = (sys.executable, "-m")


def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_number_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


@pytest.mark.parametrize(
    "command",
    [
        (ROOT / "install.sh",),
        *((*PYTHON, name) for name in ("collector", "forwarder", "lifecycle", "demo")),
    ],
)
def test_every_command_tells_its_version(command: tuple[str | Path, ...]) -> None:
    result = run(*command, "--version")
    assert (result.returncode, result.stdout) == (0, f"Sluice {VERSION}\n")


@pytest.mark.parametrize("program", ["collector", "forwarder", "lifecycle"])
def test_an_argument_that_means_nothing_starts_nothing(program: str) -> None:
    result = run(*PYTHON, program, "--help")
    assert result.returncode == ExitCode.CONFIG
    assert f"usage: python -m {program}" in result.stderr
    assert result.stdout == ""
