"""Certificates that are not trusted: told as what they are, with what to do about it.

A firewall that inspects TLS shows certificates of its own authority. To requests, to
``http.client`` and to gRPC that is a connection that failed, as when the network is down; but it
does not pass. What they have in common is OpenSSL's words.
"""

import contextlib
import http.client
import re
import ssl
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509

from forwarder import authorities
from forwarder.faults import access_hold
from forwarder.insertaccess import route_to
from forwarder.inserthttp import proxy_headers
from forwarder.sharedcall import SharedCall
from forwarder.sink import Fault

LOOK_DEADLINE_S = 3.0
LOOK_WAIT_S = 8.0
"""Of a connection that is opened to see the certificate, and of all together, the name too."""

CLOCK_LOOK = (
    "compare this machine's clock with: timedatectl, and let it be set by: timedatectl set-ntp true"
)
_SHOWN_CHARS = 200
_REFUSED = re.compile(
    r"(?:certificate verify failed|CERTIFICATE_VERIFY_FAILED)(?:: (?P<why>[^:(\n]+))?"
    r"|Hostname Verification Check failed",
    re.IGNORECASE,
)
_HOST = re.compile(r"host='(?P<host>[^']+)', port=(?P<port>\d+)")
"""urllib3's words."""

_looks: SharedCall[str] = SharedCall("a look at the certificate")


def certificate_fault(words: str, host: str = "", port: int = 443) -> Fault | None:
    """Return the fault to report if a certificate was refused; None if it was something else.

    Args:
        words: Of the error.
        host: Who showed it, if the words do not say.
        port: Its port.
    """
    refused = list(_REFUSED.finditer(words))
    if not refused:
        return None
    if named := _HOST.search(words):
        host, port = named["host"], int(named["port"])
    why = next((m["why"].strip() for m in reversed(refused) if m["why"]), "")
    why = why or "it is not for this host's name"
    where = f"{host}:{port}" if host else "the service"
    problem = f"the certificate of {where} is refused: {why}{_shown_by(host, port)}"
    return access_hold(problem, _remedy(why, host, port))


def _remedy(why: str, host: str, port: int) -> str:
    look = (
        f"look at it: openssl s_client -connect {host or 'HOST'}:{port} -servername "
        f"{host or 'HOST'} </dev/null | openssl x509 -noout -issuer -subject -dates"
    )
    if "expired" in why or "not yet valid" in why:
        return (
            f"{CLOCK_LOOK}; if the clock is right, the certificate has to be renewed by those who "
            f"run that host, or the firewall before it; {look}"
        )
    if "name" in why.lower() or "mismatch" in why:
        return (
            "a proxy, a firewall or a login page answers in its place, or a setting *_ENDPOINT "
            f"names a wrong host; {look}"
        )
    return (
        "if a firewall of this network inspects TLS, get its authority's certificate (PEM) from "
        "its administrator, and trust it: cp FIREWALL.crt /usr/local/share/ca-certificates/ && "
        f"update-ca-certificates; or set {authorities.OWN_VARIABLE} to the file, and restart; "
        f"{look}"
    )


def _shown_by(host: str, port: int) -> str:
    """Return issuer and subject of what a host shows; empty if that cannot be seen now."""
    if not host:
        return ""
    with contextlib.suppress(Exception):  # what cannot be had is left out
        shown = _looks.result(partial(_look, host, port), LOOK_WAIT_S, fresh=True)
        return f" ({shown[: 2 * _SHOWN_CHARS]})"
    return ""


def _look(host: str, port: int) -> str:
    context = ssl.create_default_context()
    # Only looked at: nothing is sent.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    der = _handshake(host, port, context)
    certificate = x509.load_der_x509_certificate(der)
    issuer = certificate.issuer.rfc4514_string()[:_SHOWN_CHARS]
    subject = certificate.subject.rfc4514_string()[:_SHOWN_CHARS]
    ends = certificate.not_valid_after_utc
    return f"issuer {issuer}, subject {subject}, valid until {ends:%Y-%m-%d %H:%M} UTC"


def _handshake(host: str, port: int, context: ssl.SSLContext) -> bytes:
    """Open a connection, by the proxy if there is one, and close it; return the certificate."""
    proxy = urlsplit(route_to(f"https://{host}:{port}/").proxy)
    first = (proxy.hostname or "", proxy.port or http.client.HTTP_PORT) if proxy.netloc else None
    connection = http.client.HTTPSConnection(
        *(first or (host, port)), context=context, timeout=LOOK_DEADLINE_S
    )
    if first:
        connection.set_tunnel(host, port, proxy_headers(proxy))
    try:
        connection.connect()
        socket: Any = connection.sock
        return bytes(socket.getpeercert(binary_form=True))
    finally:
        connection.close()


def refused_certificate(target: str, trusted: bytes | None) -> Fault | None:
    """Return the fault to report if the certificate that ``target`` shows is refused.

    Whether it can be reached at all is not told: gRPC may have another way there.

    Args:
        target: HOST:PORT of a gRPC service.
        trusted: The authorities, as PEM; None for the usual ones.
    """
    host, _, port = target.rpartition(":")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cadata=trusted.decode("ascii") if trusted else None)
        _handshake(host, int(port), context)
    except ssl.SSLCertVerificationError as error:
        return certificate_fault(str(error), host, int(port))
    except (OSError, http.client.HTTPException):
        return None
    return None
