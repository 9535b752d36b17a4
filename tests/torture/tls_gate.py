"""An HTTPS proxy that plays Google's hosts: CONNECT, then TLS with certificates of its own.

So the programs run exactly as they would against the cloud, with real credentials, real names
and verified TLS, and nothing of them leads to an emulator.
"""

import contextlib
import ipaddress
import select
import socket
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.harness.waiting import HOST, free_port

_PIECE_BYTES = 64 * 1024
_TIMEOUT_S = 10.0


class Authority:
    """A certificate authority in a directory.

    Args:
        directory: Exists; its files go there.
        name: Tells several apart.
    """

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = directory / f"{name}.crt"
        """What programs are told to trust."""
        itself = (
            _unsigned(self._name, self._name, self._key, datetime.now(UTC))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate.write_bytes(itself.public_bytes(serialization.Encoding.PEM))

    def issue(self, file: str, *names: str, age: timedelta = timedelta()) -> tuple[Path, Path]:
        """Return the files of a new server's certificate and its key.

        Args:
            file: What they are called.
            names: Host names or IP addresses.
            age: How long ago it was made; it is valid for a day.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, file)])
        certificate = (
            _unsigned(subject, self._name, key, datetime.now(UTC) - age)
            .add_extension(
                x509.SubjectAlternativeName([_general(n) for n in names]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        paths = self._directory / f"{file}.crt", self._directory / f"{file}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return the TLS of a server that speaks HTTP/2 and HTTP/1.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.load_cert_chain(certificate, key)
    return context


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, made_at: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(made_at - timedelta(hours=12))
        .not_valid_after(made_at + timedelta(hours=12))
    )


def _general(name: str) -> x509.GeneralName:
    if name.replace(".", "").isdigit():
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


class TlsGate:
    """Takes CONNECT for the named hosts and leads each to a local port.

    Args:
        context: The TLS that it shows; may be changed while it runs.
        ports: Where each host's plaintext goes.
    """

    def __init__(self, context: ssl.SSLContext, ports: Mapping[str, int]) -> None:
        self.context = context
        self.port = free_port()
        self.accepted: list[str] = []
        """Hosts with which a handshake was completed."""
        self.refused: list[str] = []
        """Why handshakes failed."""
        self.asked: list[bytes] = []
        """The heads of the CONNECT requests."""
        self.heard = bytearray()
        """The first bytes that came through TLS on each connection."""
        self._ports = dict(ports)
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._ending = threading.Event()
        self._era = 0

    def hang_up(self) -> None:
        """End the connections that are open; new ones may come."""
        self._era += 1

    @property
    def url(self) -> str:
        """For the variable ``https_proxy``."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        """Listen."""
        self._listener = socket.create_server((HOST, self.port), backlog=64)
        self._spawn(self._accept, self._listener)
        return self

    def __exit__(self, *_: object) -> None:
        """End every connection."""
        self._ending.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()

    def _spawn(self, target: object, sock: socket.socket) -> None:
        thread = threading.Thread(target=target, args=[sock], name="tls")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.settimeout(_TIMEOUT_S)
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.closing(client), contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(_PIECE_BYTES)
                if not piece:
                    return
                head += piece
            self.asked.append(head)
            host = head.split()[1].decode().partition(":")[0]
            if not head.startswith(b"CONNECT ") or host not in self._ports:
                client.sendall(b"HTTP/1.1 502 no such host\r\ncontent-length: 0\r\n\r\n")
                return
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                inside = self.context.wrap_socket(client, server_side=True)
            except OSError as error:
                self.refused.append(f"{host}: {error}")
                return
            self.accepted.append(host)
            with contextlib.closing(inside):
                self._carry(inside, self._ports[host])

    def _carry(self, inside: ssl.SSLSocket, port: int) -> None:
        """Pass bytes both ways, in one thread: a TLS connection is no two threads' business."""
        with socket.create_connection((HOST, port), timeout=_TIMEOUT_S) as service:
            first, era = True, self._era
            while not self._ending.is_set() and self._era == era:
                readable, _, _ = select.select([inside, service], [], [], 0.1)
                if inside in readable:
                    data = inside.recv(_PIECE_BYTES)
                    while inside.pending():
                        data += inside.recv(_PIECE_BYTES)
                    if first:
                        self.heard += data
                        first = False
                    if not data:
                        return
                    service.sendall(data)
                if service in readable:
                    data = service.recv(_PIECE_BYTES)
                    if not data:
                        return
                    inside.sendall(data)
