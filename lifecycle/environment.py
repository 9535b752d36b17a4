"""The environment of a program: the variables it was given, over those of its file.

supervisord cannot read environment files, so each program reads the one that
``SLUICE_ENV_FILE`` names. Real variables win, which lets an operator try a value once
without editing the file.
"""

import io
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import parse_stream

ENV_FILE_VARIABLE = "SLUICE_ENV_FILE"


class EnvironmentFileError(Exception):
    """The file that ``SLUICE_ENV_FILE`` names cannot be read."""


def merged_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` completed by the file that its ``SLUICE_ENV_FILE`` names.

    Args:
        environ: The process's own variables; they win over the file's.

    Raises:
        EnvironmentFileError: The file is named but missing, unreadable, not UTF-8, or not
            made of KEY=value lines.
    """
    merged = dict(environ)
    path = environ.get(ENV_FILE_VARIABLE, "")
    if not path:
        return merged
    try:
        # utf-8-sig: some editors put a mark before the first variable, and would hide it.
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EnvironmentFileError(
            f"{ENV_FILE_VARIABLE}: cannot read {path}: {reason}; expected a readable file of "
            f"KEY=value lines (check: ls -l {path}; the user that runs this program must be able "
            "to read it)"
        ) from error
    # A "$" in a value is a "$", as systemd and docker have it: nothing is interpolated.
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        # A quote that is not closed would swallow the variables behind it without a word.
        if binding.error or "\0" in binding.original.string:
            raise EnvironmentFileError(
                f"{ENV_FILE_VARIABLE}: {path}, line {binding.original.line}, cannot be understood; "
                "expected KEY=value (is a quote not closed?)"
            )
        if binding.key is not None and binding.value is not None:
            values[binding.key] = binding.value
    # An empty variable counts as unset, so it must not hide the file's.
    return values | {name: value for name, value in merged.items() if value or name not in values}
