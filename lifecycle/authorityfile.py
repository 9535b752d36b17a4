"""Whether a file that is to be trusted holds what can be trusted."""

from pathlib import Path


def check_authorities(path: Path) -> None:
    """Refuse a file without a certificate in PEM form.

    Raises:
        ValueError: It holds none, or one that is damaged.
    """
    import ssl  # noqa: PLC0415 - 3 MB that most processes need not pay

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=path)
    except OSError as error:  # an SSLError is one
        words = str(error).partition(" (_ssl")[0]
        raise ValueError(
            f"no certificates can be read from it: {words}; one in DER form becomes PEM by: "
            f"openssl x509 -inform der -in {path} -out {path}.pem"
        ) from error
