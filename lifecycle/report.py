"""What a program says of settings that cannot work: all of it, and the end of it for itself.

``supervisorctl tail collector`` shows the last 1,600 bytes of a log. So the last line names every
variable that is wrong, and the command that shows the whole report.
"""

import json
import logging
from collections.abc import Sequence

from lifecycle.exitcodes import ExitCode
from lifecycle.logs import fields

TAIL_BYTES = 1600
"""What ``supervisorctl tail`` shows without a number."""

_ENVELOPE_BYTES = 200
"""Time, severity, role, logger, exit code and the end of the line, as JSON."""

_PROBLEM_CHARS = (160, 120, 90, 70, 50, 0)
"""To how much a problem is shortened in the last line: the first that fits; 0 for its name."""

_NEXT = (
    ". In full: {}. Correct the environment or the file that SLUICE_ENV_FILE names: this program "
    "is then tried again within 10 s, or at once by: supervisorctl restart all"
)

log = logging.getLogger("lifecycle")


def report_settings(role: str, problems: Sequence[str], warnings: Sequence[str]) -> None:
    """Log what was found.

    Args:
        role: The program's name in supervisorctl.
        problems: Why it does not start, each beginning with the variable's name.
        warnings: What may be meant otherwise, and may explain a problem.
    """
    for warning in warnings:
        log.warning("settings: %s", warning)
    if not problems:
        return
    count = len(problems)
    for number, problem in enumerate(problems, 1):
        log.critical("configuration %d/%d: %s", number, count, problem)
    log.critical(
        "%s",
        summary(role, problems, warnings),
        extra=fields(exit_code=int(ExitCode.CONFIG)),
    )


def summary(role: str, problems: Sequence[str], warnings: Sequence[str] = ()) -> str:
    """Return the last line, of at most TAIL_BYTES as a line of JSON."""
    count = len(problems)
    whole_bytes = TAIL_BYTES + sum(
        len(json.dumps(text)) + _ENVELOPE_BYTES for text in (*problems, *warnings)
    )
    command = f"supervisorctl tail -{-(-whole_bytes // 1000) * 1000} {role}"
    ends = (
        f"configuration: {count} problem{'' if count == 1 else 's'}, nothing was started: ",
        _NEXT.format(command),
    )
    for chars in _PROBLEM_CHARS:
        separator = "; " if chars else ", "
        shown = dict.fromkeys(_shortened(problem, chars) for problem in problems)
        text = separator.join(shown).join(ends)
        if len(json.dumps(text)) <= TAIL_BYTES - _ENVELOPE_BYTES:
            break
    return text


def _shortened(problem: str, chars: int) -> str:
    name = problem.partition(":")[0]
    if not chars:
        return name
    return problem if len(problem) <= chars else f"{problem[: max(chars - 3, len(name))]}..."
