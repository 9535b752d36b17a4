"""TLS with the broker: a context for each connection, and what a failure means.

Certificates are renewed in place, by programs that tell no other program of it. So the files are
read at each connection, and nothing of the last one is kept.
"""

import socket
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from collector.brokerhealth import NotConnectedError, Problem, unreadable
from collector.certificates import (
    Certificate,
    CertificateWatch,
    from_der,
    from_pem_file,
    signers,
    utc,
)
from lifecycle import Settings
from spool import Conditions

LOOK_INTERVAL_S = 3600.0
"""How often the certificates are looked at while a connection lasts."""

PROBE_TIMEOUT_S = 3.0

# X509_V_ERR_… of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = {2, 18, 19, 20, 21}
_OTHER_NAME = {62, 64}


class Tls:
    """Makes contexts, explains failures, watches the certificates. For the network thread.

    Args:
        settings: The files, and the broker.
        conditions: Where certificates that expire are put.
        now: The time of day, with a zone.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings,
        conditions: Conditions,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._broker = f"{settings.mqtt_broker}:{settings.mqtt_port}"
        self._now = now
        self._clock = clock
        self._watch = CertificateWatch(settings, conditions, now, clock)
        self._looked_at = float("-inf")

    def context(self) -> ssl.SSLContext:
        """Return a context made of what stands in the files now.

        Raises:
            NotConnectedError: A file is missing, may not be read, or is not complete.
        """
        s = self._settings
        self._look()
        context = _authorities("MQTT_TLS_CA_FILE", s.mqtt_tls_ca_file)
        if s.mqtt_tls_cert_file is None or s.mqtt_tls_key_file is None:
            return context
        for variable, path in (
            ("MQTT_TLS_CERT_FILE", s.mqtt_tls_cert_file),
            ("MQTT_TLS_KEY_FILE", s.mqtt_tls_key_file),
        ):
            _open(variable, path)  # load_cert_chain does not say which of the two it means
        try:
            context.load_cert_chain(s.mqtt_tls_cert_file, s.mqtt_tls_key_file, _no_password)
        except (OSError, ValueError) as error:
            raise NotConnectedError(self._unusable_pair(error)) from error
        return context

    def _unusable_pair(self, error: Exception) -> Problem:
        s = self._settings
        both = f"MQTT_TLS_CERT_FILE={s.mqtt_tls_cert_file}, MQTT_TLS_KEY_FILE={s.mqtt_tls_key_file}"
        reason = str(error)
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            reason = "the key is not that of the certificate"
        return Problem(
            f"cannot use the client certificate of {both}: {reason}",
            "both are read at each attempt: where they are being renewed, the next one has them "
            "both; otherwise put the certificate and its own key, unencrypted and in PEM, there",
        )

    def connected(self, presented: bytes | None) -> None:
        """Note which certificate the broker has shown, in a handshake that succeeded."""
        self._watch.presented = _parsed(presented)
        self._look()

    def turn(self) -> None:
        """Look at the certificates again, once LOOK_INTERVAL_S is over."""
        if self._clock() - self._looked_at < LOOK_INTERVAL_S:
            return
        if self._watch.brokers_expires and (renewed := self._shown(verified=True)) is not None:
            # The connection may last for months longer than the certificate it was made with.
            self._watch.presented = renewed
        self._look()

    def _look(self) -> None:
        self._looked_at = self._clock()
        self._watch.look()

    def concerns(self, error: Exception) -> bool:
        """Return whether an attempt has failed within TLS, or may have."""
        # A broker without TLS on this port ends the connection when it sees the handshake.
        return isinstance(error, ssl.SSLError | ConnectionResetError)

    def problem(self, error: Exception) -> Problem:
        """Return what a failure of TLS means, and what to do about it."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._not_trusted(error)
        if isinstance(error, ssl.SSLError) and (refused := self.refusal(error)) is not None:
            return refused
        reason = error.reason if isinstance(error, ssl.SSLError) else ""
        return Problem(
            f"TLS with {self._broker} failed: {error}",
            "does the broker speak TLS there? Check MQTT_PORT, and check MQTT_TLS_CA_FILE: TLS is "
            "on while it is set",
            refusal=reason in {"WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL"},
        )

    def refusal(self, failure: OSError | None) -> Problem | None:
        """Return what the broker's alert behind a handshake says; None where it is no alert."""
        reason = (failure.reason or "") if isinstance(failure, ssl.SSLError) else ""
        return self._refused(reason) if "ALERT" in reason else None

    def doubt(self) -> str:
        """Return what to think of where the broker ends a connection without a word."""
        path = self._settings.mqtt_tls_cert_file
        if path is None:
            return "does it require a client certificate? Then set MQTT_TLS_CERT_FILE"
        return f"does it refuse the client certificate? {self._own(path)}; see the broker's log"

    def _refused(self, reason: str) -> Problem:
        """Return what the broker's alert means (RFC 8446, section 6.2).

        In TLS 1.3 it comes with the first read after the handshake, in TLS 1.2 within it.
        """
        failed = f"TLS with {self._broker} failed: the broker refuses"
        words = reason.lower().replace("_", " ")
        path = self._settings.mqtt_tls_cert_file
        about_us = any(
            word in reason
            for word in (
                "CERTIFICATE",
                "UNKNOWN_CA",
                "HANDSHAKE_FAILURE",
                "ACCESS_DENIED",
                "DECRYPT",
            )
        )
        if "PROTOCOL_VERSION" in reason or not about_us:
            return Problem(f"{failed} it: {words}", "see the broker's log", refusal=True)
        if path is None:
            return Problem(
                f"{failed} a client without a certificate: {words}",
                "set MQTT_TLS_CERT_FILE and MQTT_TLS_KEY_FILE to a certificate of the authority "
                "that the broker trusts (Mosquitto: cafile), and restart the collector",
                refusal=True,
            )
        return Problem(
            f"{failed} the client certificate: {words}; {self._own(path)}",
            "renew it in place, of an authority that the broker trusts (Mosquitto: cafile, "
            "crlfile): it is read at each attempt, without a restart",
            refusal=True,
        )

    def _own(self, path: Path) -> str:
        label = f"MQTT_TLS_CERT_FILE={path}"
        try:
            own = from_pem_file(path)[0]
        except (OSError, ValueError, IndexError):
            return f"{label} cannot be read"
        ends = "expired at" if own.ends <= self._now() else "is valid until"
        return f"{label} ({own.subject}, issued by {own.issuer}) {ends} {own.expires}"

    def _not_trusted(self, error: ssl.SSLCertVerificationError) -> Problem:
        """Return why the broker's certificate is not accepted."""
        shown = self._shown(verified=False)
        if error.verify_code == _EXPIRED:
            cause, remedy = self._expired(shown)
        elif error.verify_code == _NOT_YET_VALID:
            begins = f" before {utc(shown.begins)}" if shown is not None else ""
            cause = f"the broker's certificate, or its authority's, is not valid{begins}"
            remedy = "is this machine's clock right? timedatectl"
        elif error.verify_code in _OTHER_NAME:
            names = ", ".join(shown.names) if shown is not None else ""
            cause = (
                f"the broker's certificate is for {names or 'other names'}, and not for "
                f"MQTT_BROKER={self._settings.mqtt_broker}"
            )
            remedy = (
                "set MQTT_BROKER to a name in it, or have it issued with this one as subjectAltName"
            )
        elif error.verify_code in _UNKNOWN_AUTHORITY:
            issuer = f", {shown.issuer}," if shown is not None else ""
            cause = (
                f"the authority of the broker's certificate{issuer} is not in "
                f"MQTT_TLS_CA_FILE={self._settings.mqtt_tls_ca_file}"
            )
            remedy = (
                "check MQTT_TLS_CA_FILE: put the authority's certificate there (Mosquitto: "
                "cafile); it is read at each attempt, without a restart"
            )
        else:
            cause, remedy = "the broker's certificate is not accepted", "check MQTT_TLS_CA_FILE"
        return Problem(
            f"TLS with {self._broker} failed: {error.verify_message}: {cause}",
            f"{remedy}. To see it: openssl s_client -connect {self._broker} -showcerts",
            refusal=True,
        )

    def _expired(self, shown: Certificate | None) -> tuple[str, str]:
        now = self._now()
        clock = "If it is this machine's clock that is wrong: timedatectl"
        if shown is None or shown.ends <= now:
            if shown is not None:
                self._watch.presented = shown
                self._look()
            at = f" ({shown.subject}) at {shown.expires}" if shown is not None else ""
            remedy = f"have {self._broker} use a renewed one (Mosquitto: certfile). {clock}"
            return f"the broker's own expired{at}", remedy
        path = self._settings.mqtt_tls_ca_file
        try:
            known = from_pem_file(path) if path is not None else []
        except (OSError, ValueError):
            known = []
        ended = [one for one in signers(shown, known) or known if one.ends <= now]
        which = ", ".join(f"{one.subject} at {one.expires}" for one in ended)
        return (
            f"that of its authority in MQTT_TLS_CA_FILE={path} has ended ({which or 'unknown'})",
            f"put the renewed one there: it is read at each attempt, without a restart. {clock}",
        )

    def _shown(self, *, verified: bool) -> Certificate | None:
        """Return the certificate that the broker shows now, over a connection of its own.

        Python hands out none of a handshake that has failed. Without verification nothing is sent
        and nothing is believed: it is to be described to a person.
        """
        s = self._settings
        try:
            if verified:
                context = self.context()
            else:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            address = (s.mqtt_broker, s.mqtt_port)
            with (
                socket.create_connection(address, timeout=PROBE_TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=s.mqtt_broker) as sock,
            ):
                return _parsed(sock.getpeercert(binary_form=True))
        except (OSError, ValueError, NotConnectedError):
            return None


def _parsed(data: bytes | None) -> Certificate | None:
    try:
        return from_der(data) if data else None
    except ValueError:
        return None  # OpenSSL takes it, so the connection stands; only its end is not known


def _authorities(variable: str, path: Path | None) -> ssl.SSLContext:
    if path is None:
        return ssl.create_default_context()
    _open(variable, path)
    try:
        return ssl.create_default_context(cafile=str(path))
    except (OSError, ValueError) as error:
        raise NotConnectedError(unreadable(variable, path, error)) from error


def _open(variable: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise NotConnectedError(unreadable(variable, path, error)) from error


def _no_password() -> str:
    # Without this OpenSSL would ask for it on the terminal, and wait.
    raise ValueError("the key is encrypted, and there is no setting for its password")
