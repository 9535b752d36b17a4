"""Whether a text can be the name or the address of a machine at all.

A name that can never be resolved is told at the start and by the variable's name, instead of by
a resolver's error each few seconds for ever.
"""

import contextlib
import ipaddress
import re
from urllib.parse import urlsplit

NAME_MAX_CHARS = 253
LABEL_MAX_CHARS = 63
"""Limits of the domain name system (RFC 1035, section 2.3.4)."""

_LABEL = re.compile(rf"[\w-]{{1,{LABEL_MAX_CHARS}}}")
_WITH_PORT = re.compile(r"(\[[^\]]*\]|[^:]*):(\d*)")
_PLACEHOLDER = re.compile(r"<[^>]*>|\$\{?\w+\}?")


def without_user(text: str) -> str:
    """Return an address or a URL without what stands before the ``@``: it may be a password."""
    return re.sub(r"[^/\s]*@", "...@", text)


def broker_host(text: str) -> str:
    """Return the host that the client is given; brackets around an IPv6 address are taken off.

    Args:
        text: The value of MQTT_BROKER.

    Raises:
        ValueError: It is no host, with what it looks like and where that belongs.
    """
    scheme, found, _ = text.partition("://")
    if found:
        raise ValueError(
            f"without {scheme}://; the port belongs in MQTT_PORT, and TLS is on when "
            "MQTT_TLS_CA_FILE is set"
        )
    if "/" in text:
        raise ValueError("a host has no '/'")
    if "@" in text:
        raise ValueError("user and password belong in MQTT_USERNAME and MQTT_PASSWORD_FILE")
    if match := _WITH_PORT.fullmatch(text):
        raise ValueError(
            f"the port belongs in MQTT_PORT: MQTT_BROKER={match[1] or 'HOST'} and "
            f"MQTT_PORT={match[2] or 'PORT'}"
        )
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if host != text and ":" not in host:
        raise ValueError("only an IPv6 address may stand in brackets")
    check_host(host)
    return host


def check_host(host: str) -> None:
    """Raise ValueError where ``host`` is neither an address nor what may be a name."""
    if _PLACEHOLDER.search(host):
        raise ValueError("a placeholder that was not filled in; nothing is interpolated here")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return
    if ":" in host:
        raise ValueError("neither an IPv6 address nor a name")
    labels = host.removesuffix(".").split(".")
    if any(_LABEL.fullmatch(label) is None for label in labels) or len(host) > NAME_MAX_CHARS:
        raise ValueError("a name has letters, digits, '-' and '_' between its dots")
    # The resolver takes such a thing for an address, and 1883 for 0.0.7.91.
    if labels[-1].isdigit():
        raise ValueError("neither an IPv4 address nor a name, which does not end in a number")


def check_address(text: str) -> None:
    """Raise ValueError where a URL or ``host:port`` has the form of one, but leads nowhere."""
    parts = urlsplit(text if "://" in text else f"//{text}")
    if not parts.hostname:
        raise ValueError("there is no host")
    check_host(parts.hostname)
    if parts.port == 0:  # asking for it raises where it is above 65535
        raise ValueError("port 0 leads nowhere")
