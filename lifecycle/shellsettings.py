"""``python -m lifecycle.shellsettings FILE``: the settings as the programs read them, for a shell.

install.sh needs some of them (the broker, the spool's directory), and two readers of one file
would differ some day: in line ends, quotes, blanks, what an empty value means.
"""

import socket
import sys
from collections.abc import Mapping, Sequence

from lifecycle.environment import ENV_FILE_VARIABLE
from lifecycle.exitcodes import ExitCode
from lifecycle.program import leave
from lifecycle.refusal import examine
from lifecycle.settings import Settings

GIVEN = "GIVEN"
"""The name of the entry that lists the variables which the file itself sets, between blanks."""


def shell_entries(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Return ``NAME=value`` for each setting, defaults included, and one for ``GIVEN``.

    A value may hold anything but a NUL character, which therefore is what separates entries.

    Args:
        settings: What the programs make of the file.
        environ: What stands in it.
    """
    names = Settings.__struct_fields__
    entries = [f"{name.upper()}={_text(getattr(settings, name))}" for name in names]
    given = [name.upper() for name in names if environ.get(name.upper(), "").strip()]
    return [*entries, f"{GIVEN}= {' '.join(given)} "]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)


def main(arguments: Sequence[str]) -> ExitCode:
    """Print the entries, each with a NUL behind it; or what is wrong, a line each."""
    (file,) = arguments
    found = examine({ENV_FILE_VARIABLE: file}, socket.gethostname())
    if found.settings is None:
        for problem in found.problems:
            sys.stderr.write(f"{problem}\n")
        return ExitCode.CONFIG
    for entry in shell_entries(found.settings, found.environ):
        sys.stdout.write(f"{entry}\0")
    return ExitCode.CLEAN


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
