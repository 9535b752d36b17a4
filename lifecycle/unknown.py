"""Variables that look like settings and are none: a misspelt one would be ignored in silence.

In the settings file every variable is meant to have an effect, so each one that neither Sluice
nor the libraries and the system below it read is told. The real environment is full of other
programs' variables: there only those are told that are spelt nearly as one of ours, or begin as
ours do.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from lifecycle.environment import ENV_FILE_VARIABLE, in_quotes
from lifecycle.logs import printable
from lifecycle.settings import Settings

TOLD_MAX = 30
"""A file of another program is not listed to its end."""

NEAREST_IN_FILE = 0.6
NEAREST_ELSEWHERE = 0.86
"""How alike (difflib's ratio) two names are for one to be the other, misspelt. INSTANCE_ID and
EC2_INSTANCE_ID, which are two things, have 0.846."""

OURS = frozenset(name.upper() for name in Settings.__struct_fields__)
_OWN = OURS | {ENV_FILE_VARIABLE, "SLUICE_RUN_DIR"}
_OUR_PREFIXES = ("BIGQUERY_", "DEAD_LETTER_", "DEDUP_", "MQTT_", "PUBSUB_", "SPOOL_")

_ALIASES = {
    "ENVIRONMENT": "APP_ENV",
    "MQTT_HOST": "MQTT_BROKER",
    "MQTT_HOSTNAME": "MQTT_BROKER",
    "MQTT_SERVER": "MQTT_BROKER",
    "MQTT_URL": "MQTT_BROKER",
    "PROJECT_ID": "GCP_PROJECT_ID",
    "DATASET": "BIGQUERY_DATASET",
    "TOPIC": "PUBSUB_TOPIC",
}
"""Other systems' names for the same thing, which are not spelt alike."""

_PROXIES = frozenset({"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"})

_THEIRS = frozenset(
    {
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_CLOUD_PROJECT",
        "GOOGLE_CLOUD_QUOTA_PROJECT",
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        *_PROXIES,
        "TZ",
        "TMPDIR",
    }
)
"""What is likely to be set on purpose, and so misspelt."""

_READ_BELOW = re.compile(
    r"(GOOGLE|GCLOUD|CLOUDSDK|GCE|GAE|GRPC|PROTOCOL_BUFFERS|OTEL|AWS)_\w+|NO_GCE_CHECK"
    r"|(?i:(HTTPS?|ALL|NO|FTP|GRPC|NO_GRPC)_PROXY)"
    r"|(SSL|OPENSSL|REQUESTS|CURL)_\w+|SSLKEYLOGFILE|NETRC"
    r"|(PYTHON|MALLOC_|LD_|LC_|GLIBC_|XDG_|SQLITE_|SUPERVISOR_|PIP_)\w+"
    r"|TZ|TZDIR|LANG|LANGUAGE|PATH|HOME|USER|LOGNAME|SHELL|TERM|PWD|HOSTNAME|TMPDIR|TEMP|TMP"
    r"|RES_OPTIONS|LOCALDOMAIN|HOSTALIASES"
)
"""What Google's libraries, gRPC, requests, OpenSSL, Python, libc and supervisor read."""

_OF_A_SERVICE = re.compile(r"\w+_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_[0-9]+_(TCP|UDP)(_\w+)?)?)")
"""Kubernetes sets these for each service of its namespace; one may be called mqtt."""


def unknown_variables(environ: Mapping[str, str], in_file: Collection[str], path: str) -> list[str]:
    """Return a sentence for each variable that has no effect, and should have one as it seems.

    Args:
        environ: The process's own variables.
        in_file: The names that stand in the environment file.
        path: That file.
    """
    told = [_sentence(name, near, path) for name, near in _in_file(in_file)]
    told += [
        _sentence(name, near, "the environment")
        for name, near in _elsewhere({n for n, value in environ.items() if value} - set(in_file))
    ]
    if len(told) > TOLD_MAX:
        more = len(told) - TOLD_MAX
        told[TOLD_MAX:] = [f"{more} more variables are no settings of Sluice's and have no effect"]
    return told


def quoted_values(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each setting whose value stands in quotes: the shell's, not its own.

    Args:
        environ: All variables, the environment file's included.
    """
    return [
        f"the value of {name} stands in quotes, which count as a part of it: docker's --env-file, "
        "for one, keeps them; remove them unless they are meant"
        for name in sorted(OURS & set(environ))
        if in_quotes(environ[name])
    ]


def _sentence(name: str, near: str, place: str) -> str:
    guess = f"; did you mean {near}?" if near else "; remove it, or correct its name"
    # Never the value: MQTT_PASSWORD is one of the names that are tried.
    return f"{printable(name[:80])} in {printable(place)} is no setting and has no effect{guess}"


def _known(name: str) -> bool:
    # Proxies have the same meaning in both cases.
    return name in _OWN or name in _THEIRS or (name.islower() and name.upper() in _PROXIES)


def _in_file(names: Collection[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if _known(name):
            continue
        read_below = _READ_BELOW.fullmatch(name)
        near = nearest(name, NEAREST_ELSEWHERE if read_below else NEAREST_IN_FILE)
        if near or not read_below:
            yield name, near


def _elsewhere(names: Collection[str]) -> Iterator[tuple[str, str]]:
    for name in sorted(names):
        if _known(name) or _OF_A_SERVICE.fullmatch(name):
            continue
        if name.startswith(_OUR_PREFIXES):
            yield name, nearest(name, NEAREST_IN_FILE)
        elif (near := nearest(name, NEAREST_ELSEWHERE)) in OURS:
            yield name, near


def nearest(name: str, likeness: float) -> str:
    """Return the known variable that is spelt most like ``name``; empty where none is."""
    upper = name.upper().replace("-", "_").replace(".", "_")
    if upper in _ALIASES and likeness <= NEAREST_IN_FILE:
        return _ALIASES[upper]
    return next(iter(get_close_matches(upper, OURS | _THEIRS, n=1, cutoff=likeness)), "")
