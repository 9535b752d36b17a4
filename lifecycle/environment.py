"""The environment of a program: the variables it was given, over those of its file.

supervisord cannot read environment files, so each program reads the one that
``SLUICE_ENV_FILE`` names. Real variables win, which lets an operator try a value once
without editing the file.
"""

from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values

ENV_FILE_VARIABLE = "SLUICE_ENV_FILE"


class EnvironmentFileError(Exception):
    """The file that ``SLUICE_ENV_FILE`` names cannot be read."""


def merged_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` completed by the file that its ``SLUICE_ENV_FILE`` names.

    Args:
        environ: The process's own variables; they win over the file's.

    Raises:
        EnvironmentFileError: The file is named but missing, unreadable or not UTF-8.
    """
    merged = dict(environ)
    path = environ.get(ENV_FILE_VARIABLE, "")
    if not path:
        return merged
    try:
        with Path(path).open(encoding="utf-8") as stream:
            # interpolate=False: a "$" in a value is a "$", as systemd and docker have it.
            values = dotenv_values(stream=stream, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EnvironmentFileError(
            f"{ENV_FILE_VARIABLE}: cannot read {path}: {reason}; expected a readable file of "
            f"KEY=value lines (check: ls -l {path}; the group sluice must be able to read it)"
        ) from error
    for name, value in values.items():
        if value is not None:
            merged.setdefault(name, value)
    return merged
