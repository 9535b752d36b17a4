"""The files that credentials are read from: what is wrong with one, and the command that helps.

google-auth lets the system's own errors pass, and those of a file look like those of a network.
A file wants a person.
"""

import errno
import grp
import json
import os
import pwd
import re
from pathlib import Path

from forwarder.faults import access_hold
from forwarder.sink import Fault

VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
PRIVATE_DIRECTORY = "/etc/sluice"
"""Where a key is to be found by the programs, and by no other user."""

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR})
"""Errors of opening a file that are of the machine, and not of the file."""

_NOT_FOUND = re.compile(r"File '?(?P<path>/.+?)'? was not found")
"""google-auth's words, of the key file and of those that it names."""


def is_of_a_file(error: BaseException | None) -> bool:
    """Return whether it is a file that could not be opened, and no connection."""
    return isinstance(error, OSError) and bool(error.filename) and error.errno not in _PASSING


def account() -> tuple[str, str]:
    """Return the user and the group that this process runs as, by name where they have one."""
    user, group = os.geteuid(), os.getegid()
    try:
        user_name = pwd.getpwuid(user).pw_name
    except KeyError:
        user_name = str(user)
    try:
        return user_name, grp.getgrgid(group).gr_name
    except KeyError:
        return user_name, str(group)


def own_file_remedy(path: str) -> str:
    """Return the commands that make ``path`` a file of this process's user, and of no other's."""
    user, group = account()
    closed = _closed_directory(Path(path))
    if closed:
        kept = f"{PRIVATE_DIRECTORY}/{Path(path).name}"
        return (
            f"the user {user} may not enter {closed}: copy the file with: install -o {user} "
            f"-g {group} -m 0400 {path} {kept}, name that in the settings, and restart"
        )
    if Path(path).is_dir():
        return f"{path} is a directory: name the file in it"
    if not Path(path).exists():
        return f"put the file there, with: install -o {user} -g {group} -m 0400 FILE {path}"
    return f"make it the user {user}'s own: chown {user}:{group} {path} && chmod 0400 {path}"


def _closed_directory(path: Path) -> str:
    """Return the directory above ``path`` that this process may not enter; empty for none."""
    for directory in reversed(path.parents):
        if directory.is_dir() and not os.access(directory, os.X_OK, effective_ids=True):
            return str(directory)
    return ""


def file_fault(error: OSError) -> Fault:
    """Return the fault to report for a file that cannot be opened."""
    path = os.fsdecode(error.filename)
    problem = f"no credentials: cannot read {path}: {error.strerror}"
    return access_hold(problem, own_file_remedy(path))


def missing_file_remedy(words: str) -> str:
    """Return what to do about a file that google-auth has not found; empty if that is not it."""
    found = _NOT_FOUND.search(words)
    return own_file_remedy(found["path"]) if found else ""


def key_file_fault(path: str) -> Fault | None:
    """Return what is wrong with the key file itself; None if nothing is seen."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        if not is_of_a_file(error):
            return None  # google-auth meets it as well, and the next try may not
        return file_fault(error)
    try:
        key = json.loads(content)
    except ValueError:
        key = None
    if isinstance(key, dict) and isinstance(key.get("type"), str):
        return None
    user, group = account()
    what = (
        "is empty" if not content.strip() else "is no key of Google's: no JSON object with a type"
    )
    return access_hold(
        f"no credentials: {path} {what}",
        f"make a new key with: gcloud iam service-accounts keys create {path} "
        f"--iam-account=ACCOUNT; then: chown {user}:{group} {path} && chmod 0400 {path}",
    )
