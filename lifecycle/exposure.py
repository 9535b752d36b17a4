"""Files with secrets that more users than this program's may read, or change.

The group that may look into the spool is for people. A key that it may read is a key that each of
them has.
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lifecycle.environment import ENV_FILE_VARIABLE

SECRET_FILES = {
    "collector": ("MQTT_PASSWORD_FILE", "MQTT_TLS_KEY_FILE"),
    "forwarder-pubsub": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "forwarder-bigquery": ("GOOGLE_APPLICATION_CREDENTIALS",),
}
"""By role: the variables that name them."""

_PROXIES = ("https_proxy", "http_proxy", "all_proxy", "grpc_proxy")


def exposed_files(role: str, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield what an operator has to be told of each file that is not private, with the command.

    Args:
        role: The program's name in supervisorctl.
        environ: The variables, completed by the environment file's.
    """
    names = [*SECRET_FILES.get(role, ())]
    if _names_password(environ):
        names.append(ENV_FILE_VARIABLE)
    for name in names:
        path = environ.get(name, "").strip()
        if path and (who := _others(Path(path))):
            user, group = _account()
            yield (
                f"{name}: {path} holds a secret, and {who}; make it this program's own: "
                f"chown {user}:{group} {path} && chmod 0400 {path}"
            )


def _names_password(environ: Mapping[str, str]) -> bool:
    """Return whether the settings may hold a proxy's password."""
    for name in (*_PROXIES, *(name.upper() for name in _PROXIES)):
        value = environ.get(name, "")
        try:
            if value and urlsplit(value if "://" in value else f"//{value}").password:
                return True
        except ValueError:
            continue  # no URL: it is told elsewhere
    return False


def _others(path: Path) -> str:
    """Return who else may do what; empty if no other user may."""
    try:
        found, directory = path.stat(), path.resolve().parent.stat()
    except OSError:
        return ""  # what needs it says so
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_IROTH or mode & stat.S_IWOTH:
        return "every user may " + ("read it" if mode & stat.S_IROTH else "write it")
    if mode & (stat.S_IRGRP | stat.S_IWGRP):
        return f"the group {_group(found.st_gid)} may " + (
            "read it" if mode & stat.S_IRGRP else "write it"
        )
    if found.st_uid not in {0, os.geteuid()}:
        return f"it belongs to the user {_user(found.st_uid)}"
    if directory.st_mode & stat.S_IWOTH and not directory.st_mode & stat.S_ISVTX:
        return f"every user may replace it, because {path.resolve().parent} is open to all"
    return ""


def _account() -> tuple[str, str]:
    return _user(os.geteuid()), _group(os.getegid())


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
