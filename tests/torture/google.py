"""A whole system that believes to speak to Google: keys, tokens, TLS, names, all as in earnest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import IMPATIENT, Rig
from tests.torture.tls_gate import Authority, TlsGate, server_context
from tests.torture.token_server import TokenServer

HOSTS = ("pubsub.googleapis.com", "bigquery.googleapis.com", "bigquerystorage.googleapis.com")
_EMULATORS = ("PUBSUB_EMULATOR_HOST", "BIGQUERY_EMULATOR_HOST", "BIGQUERY_STORAGE_EMULATOR_HOST")


@dataclass
class Earnest:
    """The system, what it takes for Google, and its secrets."""

    rig: Rig
    gate: TlsGate
    tokens: TokenServer
    authority: Authority
    key_file: Path
    private_key: str

    def show(self, certificate: tuple[Path, Path]) -> None:
        """Answer with this certificate from now on."""
        self.gate.context = server_context(*certificate)


@contextmanager
def earnest(directory: Path, method: str = "storage", **variables: str) -> Iterator[Earnest]:
    """Prepare a system with a key file, behind a proxy that plays Google; nothing runs yet.

    Args:
        directory: For keys and certificates.
        method: BIGQUERY_WRITE_METHOD.
        variables: Settings beside the usual ones.
    """
    authority = Authority(directory)
    context = server_context(*authority.issue("google", *HOSTS))
    key_file = directory / "key.json"
    with TokenServer() as tokens:
        private_key = tokens.make_key(key_file)
        rig = Rig(
            broker_options=None, forwarder=IMPATIENT, BIGQUERY_WRITE_METHOD=method, **variables
        )
        cloud = rig.cloud
        ports = (cloud.pubsub.port, cloud.bigquery.port, cloud.write_api.port)
        with TlsGate(context, dict(zip(HOSTS, ports, strict=True))) as gate, rig:
            for program in rig.programs.values():
                for name in _EMULATORS:
                    del program.environment[name]
                program.environment |= {
                    "GOOGLE_APPLICATION_CREDENTIALS": str(key_file),
                    # As administrators write it; gRPC itself knows the lower case only.
                    "HTTPS_PROXY": gate.url,
                    "REQUESTS_CA_BUNDLE": str(authority.certificate),
                    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(authority.certificate),
                }
            yield Earnest(rig, gate, tokens, authority, key_file, private_key)
