"""The authorities that may vouch for Google's services: one list for tokens, REST and gRPC.

requests (tokens, the table, ``insert_all``) reads ``REQUESTS_CA_BUNDLE`` and ``CURL_CA_BUNDLE``,
gRPC's core reads ``GRPC_DEFAULT_SSL_ROOTS_FILE_PATH``, once in a process; each has a packaged list
of its own, and neither looks at the system's. Behind a firewall that inspects TLS, with its
authority installed by ``update-ca-certificates``, both failed. So there is one list here: what the
standard variables name, or, where none is set, the packaged list and the system's; and what
``CLOUD_CA_FILE`` names besides. It is read again for each new connection.

It is handed to requests as a file in memory: a full disk cannot keep it from being made, and no
crash leaves one behind.
"""

import os
import re
import threading
from collections.abc import MutableMapping
from pathlib import Path

import requests.utils

from forwarder.faults import FaultError, access_hold
from forwarder.keyfile import own_file_remedy

REQUESTS_VARIABLE = "REQUESTS_CA_BUNDLE"
STANDARD_VARIABLES = (
    REQUESTS_VARIABLE,
    "CURL_CA_BUNDLE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "SSL_CERT_FILE",
)
"""What requests, curl, gRPC and OpenSSL call the file of the authorities that they trust."""

OWN_VARIABLE = "CLOUD_CA_FILE"

SYSTEM_LIST = Path("/etc/ssl/certs/ca-certificates.crt")
"""Where ``update-ca-certificates`` puts them."""

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


class Authorities:
    """The list of one process.

    Args:
        environ: The process's own variables, which requests reads: its variable is set here.
        own_file: What CLOUD_CA_FILE names, if anything.
    """

    def __init__(self, environ: MutableMapping[str, str], own_file: Path | None) -> None:
        named = [(name, environ.get(name, "").strip()) for name in STANDARD_VARIABLES]
        self._named = [(name, Path(value)) for name, value in named if value]
        self._own_file = own_file
        self._lock = threading.Lock()
        self._file = os.memfd_create("authorities")
        environ[REQUESTS_VARIABLE] = (
            # Not "self": a program that google-auth starts reads it as well.
            f"/proc/{os.getpid()}/fd/{self._file}"
        )
        self._last = b""

    @property
    def notice(self) -> str:
        """What to tell an operator whose variables name a list; empty if none does."""
        if not self._named:
            return ""
        told = ", ".join(f"{name}={path}" for name, path in self._named)
        if len({path for _, path in self._named}) == 1:
            return (
                f"{told} takes the place of the packaged and of the system's list, for tokens, "
                f"REST and gRPC alike; to add to these, set {OWN_VARIABLE} in its place"
            )
        return (
            f"the variables name several lists, and all of them are trusted: {told}; "
            f"better set {OWN_VARIABLE} alone, which is for tokens, REST and gRPC"
        )

    def renewed(self) -> bytes:
        """Return the certificates as PEM, read again; requests has them from now on, too.

        Raises:
            FaultError: A file that is named cannot be read, or has none.
        """
        certificates: dict[bytes, None] = {}
        for variable, path in self._files():
            found = _CERTIFICATE.findall(_content(variable, path))
            if not found and variable:
                raise FaultError(
                    access_hold(
                        f"{variable}: {path} holds no certificate in PEM form",
                        f"if it is one in DER form: openssl x509 -inform der -in {path} "
                        f"-out {path}.pem, and name that file",
                    )
                )
            certificates |= dict.fromkeys(found)
        pem = b"\n".join(certificates) + b"\n"
        with self._lock:
            if pem != self._last:
                self._hand_over(pem)
                self._last = pem
        return pem

    def _files(self) -> list[tuple[str, Path]]:
        """Return variable and file of each list; no variable where it is one of ours."""
        files = self._named or [
            ("", Path(requests.utils.DEFAULT_CA_BUNDLE_PATH)),
            ("", SYSTEM_LIST),
        ]
        return files + ([(OWN_VARIABLE, self._own_file)] if self._own_file else [])

    def _hand_over(self, pem: bytes) -> None:
        # A new file in the old one's place at once: a thread may be reading it.
        new = os.memfd_create("authorities")
        try:
            with os.fdopen(os.dup(new), "wb") as file:
                file.write(pem)
            os.dup2(new, self._file, inheritable=False)
        finally:
            os.close(new)


def _content(variable: str, path: Path) -> bytes:
    try:
        if path.is_dir():  # as requests allows it
            return b"\n".join(p.read_bytes() for p in sorted(path.iterdir()) if p.is_file())
        return path.read_bytes()
    except OSError as error:
        if not variable:
            return b""  # a machine without the package ca-certificates has the packaged list
        problem = f"{variable}: cannot read {path}: {error.strerror}"
        raise FaultError(access_hold(problem, own_file_remedy(str(path)))) from error


_of_process: Authorities | None = None


def use(environ: MutableMapping[str, str], own_file: Path | None) -> str:
    """Have this process trust what the variables and CLOUD_CA_FILE name.

    Args:
        environ: The process's own variables.
        own_file: What CLOUD_CA_FILE names, if anything.

    Returns:
        What an operator has to be told; empty if nothing.
    """
    global _of_process  # noqa: PLW0603 - requests' list is the process's, too
    _of_process = Authorities(environ, own_file)
    return _of_process.notice


def renewed() -> bytes | None:
    """Return the process's list, read again; None where each library has its own.

    Raises:
        FaultError: A file that is named cannot be read, or has none.
    """
    return None if _of_process is None else _of_process.renewed()
