"""The proxy of the environment, in the words that gRPC understands.

requests (credentials, the table, ``insert_all``) reads ``https_proxy``, ``all_proxy`` and
``no_proxy`` in both cases. gRPC's core reads ``grpc_proxy``, ``https_proxy``, ``http_proxy``, and
``no_grpc_proxy``, ``no_proxy``, in lower case only, the first that is set; it takes no proxy
without a scheme, no ``*`` and no port in the exceptions
(https://github.com/grpc/grpc/blob/master/doc/environment_variables.md, tried with 1.85). With
``HTTPS_PROXY`` alone, HTTP went by the proxy and gRPC tried the names of Google for ever.

So gRPC is told in its own two variables what requests makes of the others. ``HTTP_PROXY`` is not
handed on: it is for ``http://``, and where only that one is set, HTTPS goes without a proxy today.
"""

from collections.abc import Mapping
from http.client import HTTP_PORT
from urllib.parse import urlsplit

GRPC_PROXY = "grpc_proxy"
NO_GRPC_PROXY = "no_grpc_proxy"
_HTTPS_SUFFIX = ":443"


def proxies_for_grpc(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables to add to ``environ``, and what the operator has to be told.

    What gRPC was told by name stays. A proxy that cannot be understood is taken away from
    everybody: libraries quote it in their errors, with the password in it.

    Args:
        environ: The variables; of those that are given in both cases the lower one counts, also
            where it is empty: that means no proxy.
    """
    added: dict[str, str] = {}
    problems: list[str] = []
    name, proxy = _proxy(environ)
    exceptions = environ.get("no_proxy") or environ.get("NO_PROXY", "")
    if name:
        scheme, proxy = _understood(proxy)
        if not scheme:
            problems.append(
                f"{name} is ignored, because it is no URL of a proxy; expected http://"
                "[USER:PASSWORD@]HOST:PORT, with special characters percent-encoded (@ as %40)"
            )
            added |= dict.fromkeys({name, name.lower(), name.upper()} & set(environ), "")
        elif scheme != "http":
            problems.append(
                f"{name} names a {scheme}:// proxy, which gRPC does not speak: Pub/Sub and "
                "BigQuery's write API go without it; expected http://HOST:PORT"
            )
            proxy = ""
    if GRPC_PROXY not in environ:
        if name:
            added[GRPC_PROXY] = proxy
        if "*" in _entries(exceptions):
            added[GRPC_PROXY] = ""
    if NO_GRPC_PROXY not in environ and exceptions:
        hosts = [entry.removesuffix(_HTTPS_SUFFIX) for entry in _entries(exceptions)]
        added[NO_GRPC_PROXY] = ",".join(host for host in hosts if host != "*")
    return added, problems


def _proxy(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the variable that names the proxy for HTTPS, and its value, as requests chooses."""
    for lower in ("https_proxy", "all_proxy"):
        for name in (lower, lower.upper()):
            if name in environ:
                if value := environ[name].strip():
                    return name, value
                break
    return "", ""


def _entries(exceptions: str) -> list[str]:
    return [entry for entry in exceptions.replace(" ", "").split(",") if entry]


def _understood(proxy: str) -> tuple[str, str]:
    """Return scheme and whole URL of a proxy; nothing where it is none.

    The port is 80 where none is given, as with requests; gRPC would take 443.
    """
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        usable = bool(parts.hostname) and parts.port != 0
        port = "" if parts.port else f":{HTTP_PORT}"
    except ValueError:
        return "", ""
    # What stands behind the host is mostly the rest of a password with a / or # in it.
    if not usable or parts.path.strip("/") or parts.query or parts.fragment:
        return "", ""
    return parts.scheme, f"{parts.scheme}://{parts.netloc.removesuffix(':')}{port}"
