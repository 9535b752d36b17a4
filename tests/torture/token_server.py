"""Google's token endpoint in small, and the key file of a service account that leads to it."""

import base64
import json
import threading
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.harness.waiting import HOST

TOKEN = "ya29.a-token-that-nobody-may-see"  # noqa: S105 - made for tests
REFRESHED_EARLY_S = 225
"""So long before its end google-auth asks for a new token."""


class Mood(Enum):
    """How the endpoint answers."""

    GOOD = "a token"
    REVOKED = "invalid_grant"
    SKEWED = "a clock that is wrong"
    BROKEN = "503"
    GONE = "hangs up"
    SILENT = "does not answer"


_ERRORS = {
    Mood.REVOKED: (400, "invalid_grant", "Invalid JWT Signature."),
    Mood.SKEWED: (
        400,
        "invalid_grant",
        (
            "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable "
            "timeframe. Check your iat and exp values in the JWT claim."
        ),
    ),
    Mood.BROKEN: (503, "internal_failure", "Service unavailable"),
    Mood.GONE: (0, "", ""),  # no answer
    Mood.SILENT: (0, "", ""),
}


class TokenServer:
    """Answers token requests as its mood is.

    Attributes:
        mood: Of the requests to come.
        lives_s: How long a token is good.
        asked: How many requests came.
        assertions: The signed claims that came with them.
    """

    def __init__(self) -> None:
        self.mood = Mood.GOOD
        self.lives_s = 3_600
        self.asked = 0
        self.assertions: list[str] = []
        self.revoked: set[str] = set()
        """Ids of keys that are no good any more, whatever the mood."""
        self._ending = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                status, answer = outer._answer(self.rfile.read(length).decode())
                if outer.mood is Mood.SILENT:
                    outer._ending.wait()
                if status == 0:
                    return
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="tokens")

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, form: str) -> tuple[int, dict[str, object]]:
        self.asked += 1
        self.assertions += parse_qs(form).get("assertion", [])
        mood = Mood.REVOKED if self._part(0)["kid"] in self.revoked else self.mood
        if mood is Mood.GOOD:
            lives_s = self.lives_s
            return 200, {"access_token": TOKEN, "expires_in": lives_s, "token_type": "Bearer"}
        status, error, description = _ERRORS[mood]
        return status, {"error": error, "error_description": description}

    def _part(self, number: int) -> dict[str, object]:
        """Return the newest assertion's header (0) or claims (1)."""
        part = self.assertions[-1].split(".")[number]
        decoded = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        return dict(decoded)

    def make_key(self, path: Path, key_id: str = "first") -> str:
        """Write a key file whose tokens come from here; return its private part."""
        key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode()
        account = {
            "type": "service_account",
            "project_id": "acme-edge",
            "private_key_id": key_id,
            "private_key": private,
            "client_email": "gate@acme-edge.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"http://{HOST}:{self._server.server_port}/token",
        }
        path.write_text(json.dumps(account), encoding="utf-8")
        path.chmod(0o640)
        return private
