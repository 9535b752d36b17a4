"""Why a program ended with exit code 78, and whether that reason still stands.

A program whose settings cannot work leaves a note when it ends. The restarter starts it again
once the circumstances are different: the settings file, what the settings check says (so also a
password file that has become readable), or the databases in ``SPOOL_DIR``.
"""

import hashlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lifecycle.environment import (
    ENV_FILE_VARIABLE,
    EnvironmentFile,
    merge,
    read_environment_file,
)
from lifecycle.logs import fields
from lifecycle.settings import Settings, SettingsError, load_settings
from lifecycle.unknown import quoted_values, unknown_variables

RUN_DIR_VARIABLE = "SLUICE_RUN_DIR"
"""Names the directory of the notes. supervisord.conf sets it; without it none are kept."""

SLOW_START_S = 1.0
STILL_REFUSED_S = 10.0
"""A start that took longer than SLOW_START_S and was then refused may count as started (it reached
``startsecs``), and supervisord would repeat it for ever. So the next one, under the same
circumstances and within STILL_REFUSED_S, ends at once: that is above the longest wait between
supervisord's own tries (``startretries`` seconds). After that a start is made in earnest again."""

log = logging.getLogger("lifecycle")


class Refusal(msgspec.Struct, frozen=True):
    """The note that a program leaves when it ends with exit code 78."""

    fingerprint: str
    """Of the circumstances, see :class:`Circumstances`."""
    reason: str
    """What the program said."""
    at_s: float
    """When, in seconds since 1970."""
    after_s: float
    """How long the start had taken by then."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a start depends on, as found at one moment."""

    environ: Mapping[str, str]
    """The variables, completed by the environment file's."""
    settings: Settings | None
    """None where they are wrong."""
    problems: tuple[str, ...]
    """What is wrong with them; empty where nothing is."""
    warnings: tuple[str, ...]
    """What may be meant otherwise: variables that have no effect, or are set twice."""
    fingerprint: str
    """Differs when a program that was refused has a reason to be tried again."""


def examine(environ: Mapping[str, str], host_name: str) -> Circumstances:
    """Check the settings.

    Args:
        environ: The process's own variables.
        host_name: What ``INSTANCE_ID`` is when it is not set and none is kept.
    """
    # Before the file is read: if it is changed in between, the next look finds a difference.
    file = environ.get(ENV_FILE_VARIABLE, "")
    # This module stands for the release: another one may accept what this one refuses.
    identity = [_identity(Path(__file__)), _identity(Path(file)) if file else ""]
    found = read_environment_file(environ)
    merged = merge(environ, found)
    settings, problems = None, list(found.problems)
    try:
        settings = load_settings(merged, host_name)
        identity += _databases(settings.spool_dir)
    except SettingsError as error:
        problems += _not_for_want_of(found, error.problems)
    if problems:
        settings = None
    warnings = [
        *found.warnings,
        *unknown_variables(environ, found.values, found.path),
        *quoted_values(merged),
    ]
    digest = hashlib.blake2b(repr((identity, settings, problems)).encode(), digest_size=16)
    return Circumstances(merged, settings, tuple(problems), tuple(warnings), digest.hexdigest())


def _not_for_want_of(found: EnvironmentFile, problems: Sequence[str]) -> list[str]:
    """Return the problems that are none of what could not be read: they would mislead."""
    if not found.readable:
        return []
    named = [(problem.partition(":")[0], problem) for problem in problems]
    # What is required depends on APP_ENV.
    unsure = "APP_ENV" in found.garbled
    return [
        problem
        for name, problem in named
        if name not in found.garbled and not (unsure and problem.startswith(f"{name}: not set"))
    ]


def _identity(path: Path) -> str:
    """Return what differs when the file was edited, replaced, touched or given other rights."""
    try:
        found = path.stat()
    except OSError as error:
        return f"{path.name}: {error.errno}"
    return f"{path.name}: {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _databases(directory: Path) -> list[str]:
    """Return the names of the databases, with what differs once one of them was replaced."""
    try:
        return sorted(f"{p.name}: {p.stat().st_ino}" for p in directory.glob("*.db"))
    except OSError as error:
        return [f"{directory}: {error.errno}"]


def note_refusal(directory: str, role: str, fingerprint: str, reason: str, after_s: float) -> None:
    """Leave the note; where that fails, the restarter tries the program again, with backoff.

    Args:
        directory: What RUN_DIR_VARIABLE names; empty for no note.
        role: The program's name in supervisorctl.
        fingerprint: Of the circumstances under which it was refused.
        reason: What the program said.
        after_s: How long the start had taken by then, in seconds.
    """
    if not directory:
        return
    path = _path(directory, role)
    new = path.with_suffix(".new")
    try:
        # Not synced: it is of no use after a restart of the machine.
        new.write_bytes(msgspec.json.encode(Refusal(fingerprint, reason, time.time(), after_s)))
        new.replace(path)
    except OSError as error:
        log.warning(
            "cannot note why the program ended; it will be tried again although nothing changed",
            extra=fields(file=str(path), error=str(error)),
        )


def read_refusal(directory: str, role: str) -> Refusal | None:
    """Return the note of ``role``; None if there is none that can be read."""
    if not directory:
        return None
    try:
        return msgspec.json.decode(_path(directory, role).read_bytes(), type=Refusal)
    except (OSError, msgspec.DecodeError):
        return None  # then the program is tried again, which is right where nothing is known


def forget_refusal(directory: str, role: str) -> None:
    """Remove the note: the program is being tried."""
    if not directory:
        return
    try:
        _path(directory, role).unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "cannot remove the note of an earlier refusal",
            extra=fields(file=str(_path(directory, role)), error=str(error)),
        )


def still_refused(refusal: Refusal | None, fingerprint: str) -> bool:
    """Return whether a slow start was refused just now, for what is still the case."""
    if refusal is None or refusal.fingerprint != fingerprint:
        return False
    recent = 0 <= time.time() - refusal.at_s < STILL_REFUSED_S
    return recent and refusal.after_s >= SLOW_START_S


def _path(directory: str, role: str) -> Path:
    return Path(directory) / f"{os.path.basename(role)}.refused"  # noqa: PTH119 - of a name, not of a path
