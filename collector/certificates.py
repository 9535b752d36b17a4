"""Certificates that expire are told of before they do. All use of ``cryptography`` is here.

Three can end the connection to the broker: the collector's own, the broker's, and that of the
authority which has signed the broker's. They are looked at with each connection and once an hour,
from the files, so that a renewed one is seen without a restart.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from lifecycle import Settings, fields
from spool import Condition, Conditions

log = logging.getLogger("collector.mqtt")

WARN_BEFORE = timedelta(days=14)
REMINDER_S = 86_400.0
"""Between two lines about the same certificate."""

LARGE_BUNDLE = 10
"""A file with more authorities than this is a system's list: nearly all of them are others'."""

CERTIFICATE_EXPIRES = "certificate_expires"
THE_BROKERS_OWN = "the broker's own certificate"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What people need to know of a certificate."""

    subject: str
    issuer: str
    names: tuple[str, ...]
    """Host names and addresses for which it is valid."""
    begins: datetime
    ends: datetime
    fingerprint: str
    parsed: x509.Certificate

    @property
    def expires(self) -> str:
        """When it ends, for people."""
        return utc(self.ends)


def utc(moment: datetime) -> str:
    """Return a moment as text."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_der(data: bytes) -> Certificate:
    """Return the certificate in ``data``.

    Raises:
        ValueError: It is none that can be read.
    """
    return _described(x509.load_der_x509_certificate(data))


def from_pem_file(path: Path) -> list[Certificate]:
    """Return the certificates in a file, in its order.

    Raises:
        OSError: It cannot be read.
        ValueError: There is none in it, or one that cannot be read.
    """
    return [_described(one) for one in x509.load_pem_x509_certificates(path.read_bytes())]


def _described(parsed: x509.Certificate) -> Certificate:
    return Certificate(
        subject=_name(parsed.subject),
        issuer=_name(parsed.issuer),
        names=_names(parsed),
        begins=parsed.not_valid_before_utc,
        ends=parsed.not_valid_after_utc,
        fingerprint=hashlib.sha256(parsed.public_bytes(Encoding.DER)).hexdigest(),
        parsed=parsed,
    )


def _name(name: x509.Name) -> str:
    common = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return f"CN={common[0].value!s}" if common else name.rfc4514_string()


def _names(parsed: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return ()
    found = extension.value
    addresses = found.get_values_for_type(x509.IPAddress)
    return (*found.get_values_for_type(x509.DNSName), *(str(one) for one in addresses))


def signers(of: Certificate, among: Iterable[Certificate]) -> list[Certificate]:
    """Return those authorities that have signed ``of``; several where one was issued again."""
    return [one for one in among if _signed(of.parsed, one.parsed)]


def _signed(parsed: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        parsed.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _relevant(of: Certificate, authorities: list[Certificate]) -> list[Certificate]:
    """Return the authorities on which the trust in ``of`` depends, as far as it can be known.

    While an authority is replaced the file holds the old one too, which may expire.
    """
    signed = signers(of, authorities)
    if signed:
        return [max(signed, key=lambda one: one.ends)]
    if len(authorities) > LARGE_BUNDLE:
        return []
    latest: dict[str, Certificate] = {}
    for one in authorities:
        if one.subject not in latest or latest[one.subject].ends < one.ends:
            latest[one.subject] = one
    return list(latest.values())


class CertificateWatch:
    """Tells of certificates that expire within WARN_BEFORE. Belongs to the network thread.

    Args:
        settings: The files.
        conditions: Where ``certificate_expires`` is put.
        now: The time of day, with a zone.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings,
        conditions: Conditions,
        now: Callable[[], datetime],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._broker = f"{settings.mqtt_broker}:{settings.mqtt_port}"
        self._own = settings.mqtt_tls_cert_file
        self._authorities = settings.mqtt_tls_ca_file
        self._conditions = conditions
        self._now = now
        self._clock = clock
        self._told_at: dict[str, float] = {}
        self.presented: Certificate | None = None
        """What the broker has shown last."""

    @property
    def brokers_expires(self) -> bool:
        """Whether the broker's own is among those that are told of."""
        return self.presented is not None and self._soon(self.presented)

    def look(self) -> None:
        """Read the files again, and say what expires, or take it back."""
        found = [(what, one) for what, one in self._watched() if self._soon(one)]
        for what, one in found:
            self._tell(what, one)
        if not found:
            self._conditions.clear(CERTIFICATE_EXPIRES)
            return
        ended = any(one.ends <= self._now() for _, one in found)
        self._conditions.put(
            Condition(
                CERTIFICATE_EXPIRES,
                "CRITICAL" if ended else "WARNING",
                "; ".join(f"{what} ({one.subject}) {self._end(one)}" for what, one in found)
                + ": no connection to the broker is made beyond that",
                " ".join(dict.fromkeys(self._remedy(what) for what, _ in found)),
            )
        )

    def _watched(self) -> Iterator[tuple[str, Certificate]]:
        if self._own is not None:
            label = f"MQTT_TLS_CERT_FILE={self._own}"
            # What follows in it are the authorities between it and one that the broker knows.
            yield from ((label, one) for one in self._read(label, self._own))
        if self.presented is None:
            return  # which authority the connection depends on is known with the first one
        if self._authorities is not None:
            label = f"an authority in MQTT_TLS_CA_FILE={self._authorities}"
            known = self._read(label, self._authorities)
            yield from ((label, one) for one in _relevant(self.presented, known))
        yield THE_BROKERS_OWN, self.presented

    def _read(self, label: str, path: Path) -> list[Certificate]:
        try:
            found = from_pem_file(path)
        except (OSError, ValueError) as error:
            if self._due(label):
                log.warning(
                    "a certificate cannot be looked at: when it expires is not known, and the next "
                    "connection to the broker may fail",
                    extra=fields(file=label, error=str(error)),
                )
            return []
        self._told_at.pop(label, None)
        return found

    def _soon(self, one: Certificate) -> bool:
        return one.ends - self._now() < WARN_BEFORE

    def _end(self, one: Certificate) -> str:
        return f"{'expired' if one.ends <= self._now() else 'expires'} at {one.expires}"

    def _remedy(self, what: str) -> str:
        if what == THE_BROKERS_OWN:
            return (
                f"Renew the certificate of {self._broker} (Mosquitto: certfile) and have the "
                "broker read it: systemctl restart mosquitto."
            )
        return "Renew it in the file itself: it is read at each connection, without a restart."

    def _tell(self, what: str, one: Certificate) -> None:
        if self._due(f"{one.fingerprint} {one.ends <= self._now()}"):
            log.warning(
                "a certificate of the connection to the broker expires",
                extra=fields(
                    certificate=what,
                    subject=one.subject,
                    expires=one.expires,
                    expired=one.ends <= self._now(),
                    broker=self._broker,
                    remedy=self._remedy(what),
                ),
            )

    def _due(self, key: str) -> bool:
        now = self._clock()
        self._told_at = {k: at for k, at in self._told_at.items() if now - at < REMINDER_S}
        if key in self._told_at:
            return False
        self._told_at[key] = now
        return True
