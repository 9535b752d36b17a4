"""Waiting for a condition, never for a time."""

import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

HOST = "127.0.0.1"
POLL_S = 0.02

# Below the range from which the kernel takes the ports of outgoing connections. Within it, a
# client that tries a closed port long enough would one day be connected to itself.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000

_given: set[int] = set()

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """Return the condition's first true value.

    Args:
        condition: Asked again and again.
        timeout_s: How long.
        what: Completes "it did not happen within …: ", for the failure.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {timeout_s} s: {what}"
        time.sleep(POLL_S)
    return value


def free_port() -> int:
    """Return a TCP port that nobody listens on now; a different one each time.

    A system's services get theirs before the first of them listens: drawn blindly, two of a
    few hundred systems had one port for two services.
    """
    while True:
        port = random.randint(_FIRST_PORT, _LAST_PORT)  # noqa: S311 - no secret
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            _given.add(port)
            return port


def listens(port: int) -> bool:
    """Return whether somebody accepts connections there."""
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True
