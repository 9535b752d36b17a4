"""The environment of a program: the variables it was given, over those of its file.

supervisord cannot read environment files, so each program reads the one that
``SLUICE_ENV_FILE`` names. Real variables win, which lets an operator try a value once
without editing the file.
"""

import codecs
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dotenv.parser import Binding, parse_stream

from lifecycle.logs import printable

ENV_FILE_VARIABLE = "SLUICE_ENV_FILE"

LINES_TOLD_MAX = 20
"""A file that is no settings file at all is wrong in each of its lines."""

_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?'?([A-Za-z_][A-Za-z0-9_]*)'?\s*=")
_NEW_LINE = re.compile(r"\r\n|\n|\r")
_NO_UTF8 = re.compile("[\udc80-\udcff]")


class EnvironmentFileError(Exception):
    """The file that ``SLUICE_ENV_FILE`` names cannot be read, or some of its lines cannot.

    Attributes:
        problems: One sentence for each, beginning with ``SLUICE_ENV_FILE``.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(slots=True)
class EnvironmentFile:
    """What stands in the file."""

    path: str
    values: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Lines that cannot be understood: the program must not start without what they say."""
    warnings: list[str] = field(default_factory=list)
    """Lines that can be understood, and mean something else than their writer may think."""
    garbled: set[str] = field(default_factory=set)
    """The variables of the lines that cannot be understood, as far as those can be told."""
    readable: bool = True
    """False where nothing is known of what stands in it."""


def merged_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` completed by the file that its ``SLUICE_ENV_FILE`` names.

    Args:
        environ: The process's own variables; they win over the file's.

    Raises:
        EnvironmentFileError: The file is named but missing, unreadable, not UTF-8, or not
            made of KEY=value lines.
    """
    file = read_environment_file(environ)
    if file.problems:
        raise EnvironmentFileError(tuple(file.problems))
    return merge(environ, file)


def merge(environ: Mapping[str, str], file: EnvironmentFile) -> dict[str, str]:
    """Return ``environ`` completed by what could be understood of the file."""
    values = file.values
    # An empty variable counts as unset, so it must not hide the file's.
    return values | {name: value for name, value in environ.items() if value or name not in values}


def read_environment_file(environ: Mapping[str, str]) -> EnvironmentFile:
    """Return what the file says that ``environ`` names, and what of it cannot be understood."""
    file = EnvironmentFile(environ.get(ENV_FILE_VARIABLE, ""))
    if not file.path:
        return file
    try:
        content = Path(file.path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return _unreadable(file, f"{reason}; expected a readable file of KEY=value lines")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _unreadable(file, "it is UTF-16 text; save it as UTF-8, a file of KEY=value lines")
    lines: dict[str, int] = {}
    wrong: list[int] = []
    for line, binding in _bindings(_text(content)):
        if _not_understood(binding):
            wrong.append(line)
            if len(wrong) <= LINES_TOLD_MAX:
                file.problems.append(_not_understood_text(file.path, line, binding))
            if assigned := _ASSIGNMENT.match(binding.original.string):
                file.garbled.add(assigned[1])
        elif binding.key is not None:
            _take(file, lines, line, binding)
    if more := wrong[LINES_TOLD_MAX:]:
        file.problems.append(
            f"{ENV_FILE_VARIABLE}: {file.path}: {len(more)} more lines cannot be understood, the "
            f"last is {more[-1]}; is it a file of KEY=value lines at all?"
        )
    return file


def _take(file: EnvironmentFile, lines: dict[str, int], line: int, binding: Binding) -> None:
    """Take a line that can be understood; the last one of a variable counts."""
    key, value = str(binding.key), binding.value
    if value is None:
        file.warnings.append(
            f"{printable(key[:80])!r} ({file.path}, line {line}) has no '=' and sets nothing; "
            "expected KEY=value"
        )
        return
    if key in file.values and file.values[key] != value:
        file.warnings.append(
            f"{printable(key)} is set twice in {file.path}, in line {lines[key]} and in line "
            f"{line}, to different values; the last one counts. Remove the other one"
        )
    file.values[key] = value
    lines[key] = line


def _unreadable(file: EnvironmentFile, reason: str) -> EnvironmentFile:
    file.problems.append(
        f"{ENV_FILE_VARIABLE}: cannot read {printable(file.path)}: {reason} (check: ls -l "
        f"{printable(file.path)}; the user that runs this program must be able to read it)"
    )
    file.readable = False
    return file


def _bindings(text: str) -> Iterator[tuple[int, Binding]]:
    """Yield the number of each line that says something, and what it says.

    The parser takes a quote that is not closed together with what stands before the next quote,
    some lines below: those lines are read again for themselves, or they would be lost.
    """
    number = 1
    while text:
        read = 0
        # A "$" in a value is a "$", as systemd and docker have it: nothing is interpolated.
        for binding in parse_stream(io.StringIO(text)):
            whole = binding.original.string
            blank = len(whole) - len(whole.lstrip())
            line = number + binding.original.line - 1 + len(_NEW_LINE.findall(whole[:blank]))
            end = _NEW_LINE.search(whole, blank)
            below = whole[end.end() :] if end else ""
            if end and (binding.error or any(map(_ASSIGNMENT.match, _NEW_LINE.split(below)))):
                own = binding.original._replace(string=whole[blank : end.end()])
                yield line, Binding(None, None, own, error=True)
                text, number = text[read + end.end() :], line + 1
                break
            yield line, binding
            read += len(whole)
        else:
            return


def _text(content: bytes) -> str:
    # Some editors put a mark before the first variable, and would hide it. What is no UTF-8 is
    # found line by line, and does not matter in a comment.
    return content.decode(errors="surrogateescape").lstrip("\ufeff")


def _not_understood(binding: Binding) -> bool:
    said = f"{binding.key}{binding.value}"
    return binding.error or "\0" in binding.original.string or bool(_NO_UTF8.search(said))


def _not_understood_text(path: str, line: int, binding: Binding) -> str:
    where = f"{ENV_FILE_VARIABLE}: {printable(path)}, line {line}"
    if _NO_UTF8.search(binding.original.string):
        return f"{where}, is not UTF-8 text; save the file as UTF-8"
    # The line is not shown: a password may stand in it.
    return f"{where}, cannot be understood; expected KEY=value (is a quote not closed?)"


def in_quotes(value: str) -> bool:
    """Return whether quotes were left around a value."""
    value = value.strip()
    return len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
