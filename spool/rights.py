"""Whose a file is, where that is what keeps this process from it: as after a copy made by root."""

import os
import stat
from collections.abc import Iterable
from grp import getgrgid
from pathlib import Path
from pwd import getpwuid

_FILE_BITS, _DIRECTORY_BITS = 0o600, 0o700


def wrong_owner(paths: Iterable[Path]) -> str:
    """Name the first of ``paths`` that this process may not use, whose it is, and the command.

    Returns:
        Empty where owner and mode are not the reason, as on a file system that is read-only.
    """
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue  # another of them is the reason, or none is
        bits = _DIRECTORY_BITS if stat.S_ISDIR(found.st_mode) else _FILE_BITS
        ours = found.st_uid == os.geteuid()
        if (ours and found.st_mode & bits == bits) or os.access(
            path, os.R_OK | os.W_OK | (os.X_OK if bits & 0o100 else 0), effective_ids=True
        ):
            continue
        us, our_group = _user(os.geteuid()), _group(os.getegid())
        rights = "u+rwx" if bits & 0o100 else "u+rw"
        command = f"chown {us}:{our_group} {path} && sudo chmod {rights} {path}"
        return (
            f"{path} belongs to {_user(found.st_uid)}:{_group(found.st_gid)}, mode "
            f"{stat.S_IMODE(found.st_mode):04o}, and this program runs as {us}: sudo "
            f"{f'chmod {rights} {path}' if ours else command} (install.sh, run again, corrects "
            "all of Sluice's files)"
        )
    return ""


def _user(number: int) -> str:
    try:
        return getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return getgrgid(number).gr_name
    except KeyError:
        return str(number)
