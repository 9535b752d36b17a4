"""Which release this is."""

import sys
from collections.abc import Sequence

from lifecycle.exitcodes import ExitCode

VERSION = "0.1.0"
"""The code is copied to its place and not installed by pip, so it has to know for itself; a test
holds it against pyproject.toml."""


def tell_version(program: str, arguments: Sequence[str], expected: str = "") -> ExitCode:
    """Answer ``--version``, and anything else with how the program is called.

    Args:
        program: What follows ``python -m``.
        arguments: Those that the program cannot start with.
        expected: The arguments that it can start with.
    """
    if list(arguments) == ["--version"]:
        sys.stdout.write(f"Sluice {VERSION}\n")
        return ExitCode.CLEAN
    usage = " ".join(filter(None, (f"python -m {program}", expected)))
    sys.stderr.write(f"usage: {usage}, or python -m {program} --version\n")
    return ExitCode.CONFIG
