"""What the insert connections need of Google's client: its credentials, and its way there."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import requests
import requests.utils
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.transport.requests import Request

from forwarder.inserthttp import Route
from forwarder.sharedcall import SharedCall


class Authorization:
    """Google's credentials, as the insert connections want them.

    Args:
        credentials: Those of the client.
        url: What is posted to.
        deadline_s: Of each request for a token.
        tokens: Has them asked for.
        wait_s: How long to wait for one.
    """

    def __init__(
        self,
        credentials: Credentials,
        url: str,
        deadline_s: float,
        tokens: SharedCall[Mapping[str, str]],
        wait_s: float,
    ) -> None:
        self._credentials = credentials
        self._url = url
        self._request: Any = partial(Request(), timeout=deadline_s)
        self._tokens = tokens
        self._wait_s = wait_s

    def headers(self) -> Mapping[str, str]:
        """Return what authorizes a request; see :class:`forwarder.inserthttp.InsertConnections`."""
        if self._credentials.valid:
            return self._applied()
        return self._tokens.result(self._applied, self._wait_s)

    def _applied(self) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        self._credentials.before_request(self._request, "POST", self._url, headers)
        return headers

    def renewed(self) -> Mapping[str, str]:
        """Return the same with a new token, after one was refused."""
        if isinstance(self._credentials, AnonymousCredentials):  # which cannot be renewed
            return self._applied()
        return self._tokens.result(self._refreshed, self._wait_s)

    def _refreshed(self) -> Mapping[str, str]:
        self._credentials.refresh(self._request)
        return self._applied()


def route_to(url: str) -> Route:
    """Return the way to ``url`` that requests would take, as Google's client does.

    That is HTTPS_PROXY and NO_PROXY, and REQUESTS_CA_BUNDLE or its own list of authorities: with
    others, of the table's schema and its rows only one might come through.
    """
    with requests.Session() as session:
        found = session.merge_environment_settings(url, {}, None, None, None)
    proxy = requests.utils.select_proxy(url, found["proxies"])
    authorities = (
        found["verify"]
        if isinstance(found["verify"], str)
        else requests.utils.DEFAULT_CA_BUNDLE_PATH
    )
    if proxy:
        proxy = requests.utils.prepend_scheme_if_needed(proxy, "http")
    return Route(url, proxy or "", authorities)
