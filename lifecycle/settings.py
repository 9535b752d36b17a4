"""The settings of all programs, read from the environment; every problem told at once.

msgspec converts and checks each variable on its own, so that one wrong value does not hide
the next. (pydantic-settings does the same job, but costs 25 MB of memory in each of three
processes, which matters on a small edge VM; msgspec is here already.)
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import msgspec
from msgspec import Meta

from lifecycle.addresses import broker_host, check_address, without_user
from lifecycle.authorityfile import check_authorities
from lifecycle.delays import COMMIT_DELAY_MS_MAX
from lifecycle.environment import in_quotes
from lifecycle.identity import ClientId, Name, read_identity
from lifecycle.logs import printable

KIB = 1024
_SIZE_UNITS = {"": 1, "KIB": KIB, "MIB": KIB**2, "GIB": KIB**3, "TIB": KIB**4}
_SIZE = re.compile(r"(\d+)\s*(|KiB|MiB|GiB|TiB)", re.IGNORECASE)
_SHOWN_VALUE_CHARS = 80

SPOOL_MAX_BYTES_FLOOR = 256 * KIB
"""Below this the empty database and its write-ahead log do not fit."""

DEAD_LETTER_MAX_BYTES_FLOOR = 64 * KIB
"""A hundred dead letters of usual size."""

DEFAULT_SPOOL_DIR = Path("/var/lib/sluice")

TOPIC_FILTER_MAX_BYTES = 65_535
"""A string of MQTT has two bytes for its length (3.1.1, section 1.5.3)."""

AppEnv = Literal["LOCAL", "DEV", "PPRD", "PRD"]
TimestampFormat = Literal["rfc3339", "naive", "epoch", "epoch_ms"]
WriteMethod = Literal["storage", "storage_default", "insert_all"]
DEFAULT_WRITE_METHOD: WriteMethod = "storage"
Port = Annotated[int, Meta(ge=1, le=65535)]
Project = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:_-]{0,99}\Z")]
Topic = Annotated[
    str, Meta(pattern=r"^(projects/[^/\s]+/topics/)?(?!goog)[A-Za-z][A-Za-z0-9._~+%-]{2,254}\Z")
]
Dataset = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]{1,1024}\Z")]
Table = Annotated[str, Meta(pattern=r"^[\w -]{1,1024}\Z")]
HostPort = Annotated[str, Meta(pattern=r"^([^\s/:\[\]]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?\Z")]
Url = Annotated[str, Meta(pattern=r"^https?://[^\s/]+/?\Z")]
HttpsUrl = Annotated[str, Meta(pattern=r"^https://[^\s/@?#]+/?\Z")]
"""An access token goes there, so never in the clear."""


class SettingsError(Exception):
    """The environment does not describe a program that can run.

    Attributes:
        problems: One sentence per problem, each beginning with the variable's name.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment said, checked. A field's variable is its name in capitals."""

    app_env: AppEnv
    gcp_project_id: Project = ""
    bigquery_dataset: Dataset = ""
    bigquery_table: Table = ""
    pubsub_topic: Topic = ""
    mqtt_broker: str = "localhost"
    mqtt_port: Port = 1883
    mqtt_topic: tuple[str, ...] = ("FCTS/FAE/+/SolvExtract/+",)
    mqtt_client_id: ClientId = ""
    mqtt_username: str = ""
    mqtt_password_file: Path | None = None
    mqtt_tls_ca_file: Path | None = None
    mqtt_tls_cert_file: Path | None = None
    mqtt_tls_key_file: Path | None = None
    instance_id: Name = ""
    spool_dir: Path = DEFAULT_SPOOL_DIR
    commit_delay_ms: Annotated[int, Meta(ge=0, le=COMMIT_DELAY_MS_MAX)] = 200
    spool_max_bytes: Annotated[int, Meta(ge=SPOOL_MAX_BYTES_FLOOR)] = 10 * KIB**3
    spool_full_policy: Literal["block", "drop-oldest"] = "block"
    dead_letter_max_bytes: Annotated[int, Meta(ge=DEAD_LETTER_MAX_BYTES_FLOOR)] = 256 * KIB**2
    spool_retention_hours: Annotated[float, Meta(ge=0, le=24 * 3650)] = 24
    dedup_window: Annotated[int, Meta(ge=0, le=10_000_000)] = 100_000
    timestamp_formats: tuple[TimestampFormat, ...] = ("rfc3339",)
    site_mismatch: Literal["warn", "reject"] = "warn"
    max_payload_bytes: Annotated[int, Meta(ge=1, le=8 * KIB**2)] = 256 * KIB
    max_drain_rate: Annotated[int, Meta(ge=0)] = 0
    refused_policy: Literal["hold", "dead-letter"] = "hold"
    pubsub_enabled: bool = True
    bigquery_enabled: bool = True
    pubsub_endpoint: HostPort = ""
    pubsub_emulator_host: HostPort = ""
    bigquery_create_table: bool = False
    bigquery_write_method: WriteMethod = DEFAULT_WRITE_METHOD
    bigquery_endpoint: HttpsUrl = ""
    bigquery_storage_endpoint: HostPort = ""
    bigquery_emulator_host: Url = ""
    bigquery_storage_emulator_host: HostPort = ""
    google_application_credentials: str = ""
    cloud_ca_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"

    @property
    def enabled_sinks(self) -> tuple[str, ...]:
        """The names of the sinks that must receive every reading."""
        return tuple(sink for sink in SINKS if getattr(self, f"{sink}{_ENABLED}"))


_ENABLED = "_enabled"
SINKS: tuple[str, ...] = tuple(
    field.removesuffix(_ENABLED) for field in Settings.__struct_fields__ if field.endswith(_ENABLED)
)
"""All sinks, those that are switched off too: each has a variable ``<SINK>_ENABLED``. The one list:
forwarders are built, readings kept and files looked for by it."""


_EXPECTED = {
    "app_env": "LOCAL, DEV, PPRD or PRD",
    "gcp_project_id": "a Google Cloud project id, such as my-project-123",
    "bigquery_dataset": "a dataset id: letters, digits and underscores",
    "bigquery_table": "a table id, without project and dataset",
    "pubsub_topic": "a topic id of at least 3 characters, or projects/PROJECT/topics/TOPIC",
    "mqtt_broker": "a host name or address, without port",
    "mqtt_port": "a port number from 1 to 65535",
    "mqtt_topic": "MQTT topic filters, separated by commas",
    "mqtt_client_id": "a text of 1 to 240 characters",
    "instance_id": "letters, digits, '.', '_' and '-', at most 200, beginning with one of the "
    "first two",
    "spool_dir": "an absolute path",
    "commit_delay_ms": f"milliseconds as a whole number from 0 to {COMMIT_DELAY_MS_MAX}",
    "spool_max_bytes": f"bytes as a whole number, or with KiB, MiB, GiB or TiB; at least "
    f"{SPOOL_MAX_BYTES_FLOOR}",
    "dead_letter_max_bytes": f"bytes as a whole number, or with KiB, MiB, GiB or TiB; at least "
    f"{DEAD_LETTER_MAX_BYTES_FLOOR}",
    "spool_full_policy": "block or drop-oldest",
    "spool_retention_hours": "hours from 0 to 87600",
    "dedup_window": "a whole number from 0 to 10000000",
    "timestamp_formats": "rfc3339, naive, epoch or epoch_ms, separated by commas",
    "site_mismatch": "warn or reject",
    "max_payload_bytes": "bytes from 1 to 8388608",
    "max_drain_rate": "rows per second as a whole number; 0 for no limit",
    "refused_policy": "hold or dead-letter",
    "pubsub_enabled": "true or false",
    "bigquery_enabled": "true or false",
    "pubsub_endpoint": "a host or host:port, such as europe-west1-pubsub.googleapis.com:443",
    "pubsub_emulator_host": "host:port, such as localhost:8085 or [::1]:8085",
    "bigquery_create_table": "true or false",
    "bigquery_write_method": "storage (exactly once), storage_default or insert_all",
    "bigquery_endpoint": "a host or an https URL without a path, such as "
    "bigquery.europe-west1.rep.googleapis.com",
    "bigquery_storage_endpoint": "a host or host:port, such as "
    "bigquerystorage.europe-west1.rep.googleapis.com:443",
    "bigquery_emulator_host": "a URL without a path, such as http://localhost:9050",
    "bigquery_storage_emulator_host": "host:port, such as localhost:9060 or [::1]:9060",
    "cloud_ca_file": "a file of authorities' certificates in PEM form, which this user can read",
    "log_level": "DEBUG, INFO, WARNING or ERROR",
    "log_format": "json or text",
}
_ADDRESSES = (
    "pubsub_endpoint",
    "pubsub_emulator_host",
    "bigquery_endpoint",
    "bigquery_storage_endpoint",
    "bigquery_emulator_host",
    "bigquery_storage_emulator_host",
)
_EITHER = (
    ("bigquery_endpoint", "bigquery_emulator_host"),
    ("bigquery_storage_endpoint", "bigquery_storage_emulator_host"),
)
_READABLE_FILES = (
    "mqtt_password_file",
    "mqtt_tls_ca_file",
    "mqtt_tls_cert_file",
    "mqtt_tls_key_file",
    "cloud_ca_file",
)


def load_settings(environ: Mapping[str, str], host_name: str) -> Settings:
    """Check every variable of ``environ`` and return the settings.

    An empty variable counts as unset, as in a file of commented defaults.

    Args:
        environ: All variables, the environment file's included.
        host_name: What ``INSTANCE_ID`` is when it is not set and none is kept in ``SPOOL_DIR``.

    Raises:
        SettingsError: With all problems, not just the first.
    """
    hints = get_type_hints(Settings, include_extras=True)
    values: dict[str, object] = {}
    problems: list[str] = []
    for field in Settings.__struct_fields__:
        raw = environ.get(field.upper(), "").strip()
        if not raw:
            continue
        try:
            values[field] = _convert(field, raw, hints[field])
        except ValueError as error:
            problems.append(_describe(field, raw, error))
    problems += _contradictions(environ, values)
    if not problems:
        _set_ids(values, host_name)
    if problems:
        raise SettingsError(problems)
    return msgspec.convert(values, Settings, dec_hook=_custom)


def _set_ids(values: dict[str, object], host_name: str) -> None:
    """Complete the ids: what is not set stays what it was, also under another host name."""
    directory = values.get("spool_dir", DEFAULT_SPOOL_DIR)
    kept = read_identity(directory) if isinstance(directory, Path) else None
    instance_id = values.setdefault(
        "instance_id", kept.instance_id if kept else instance_id_of(host_name)
    )
    client_id = f"sluice-{instance_id}"
    if kept is not None and kept.session is not None and kept.instance_id == instance_id:
        client_id = kept.session.client_id
    values.setdefault("mqtt_client_id", client_id)


def _custom(wanted: type, value: object) -> object:
    return Path(str(value)) if wanted is Path else value


def instance_id_of(host_name: str) -> str:
    """Return the instance id of a machine of that name. install.sh makes the same of it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", host_name).lstrip("._-")[:200] or "sluice"


def _convert(field: str, raw: str, hint: object) -> object:
    """Return the value of one variable. Raises ValueError (msgspec's own included)."""
    # Linux hands over any bytes; ours go to the broker, to logs and to the services as UTF-8.
    raw.encode()
    value: object = raw
    if field in {"mqtt_topic", "timestamp_formats"}:
        value = tuple(part.strip() for part in raw.split(","))
    elif field in _READ:
        value = _READ[field](raw)
    elif field == "bigquery_endpoint" and "://" not in raw:
        value = f"https://{raw}"
    converted: object = msgspec.convert(value, hint, strict=False, dec_hook=_custom)
    if field == "mqtt_topic" and isinstance(value, tuple):
        _check_topic_filters(value)
    if field == "timestamp_formats" and {"epoch", "epoch_ms"} <= set(
        raw.replace(" ", "").split(",")
    ):
        raise ValueError("epoch and epoch_ms cannot be told apart; choose one")
    if field == "spool_dir" and isinstance(converted, Path) and not converted.is_absolute():
        raise ValueError("the path is not absolute")
    if field in _ADDRESSES:
        check_address(raw)
    if field in _READABLE_FILES and isinstance(converted, Path):
        _check_readable(field, converted)
    return converted


def _size(raw: str) -> int:
    match = _SIZE.fullmatch(raw)
    if match is None:
        raise ValueError("not a size")
    return int(match[1]) * _SIZE_UNITS[match[2].upper()]


_READ: dict[str, Callable[[str], object]] = {
    "spool_max_bytes": _size,
    "dead_letter_max_bytes": _size,
    "mqtt_broker": broker_host,
    "log_level": str.upper,
}
"""What is more than a text in the environment's form, by field."""


def _check_readable(field: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"cannot read the file: {error.strerror}") from error
    if field == "cloud_ca_file":
        check_authorities(path)


def _check_topic_filters(filters: tuple[str, ...]) -> None:
    """Refuse what is no topic filter (MQTT 3.1.1, section 4.7) and what cannot keep order."""
    for topic_filter in filters:
        levels = topic_filter.split("/")
        if not topic_filter or "\0" in topic_filter:
            raise ValueError("an empty topic filter")
        if len(topic_filter.encode()) > TOPIC_FILTER_MAX_BYTES:
            raise ValueError("a topic filter of more than 65535 bytes")
        if levels[0] == "$share":
            raise ValueError(
                f"{topic_filter!r} is a shared subscription, which loses the order and a dead "
                "member's queue; give each collector its own filter"
            )
        if any(len(level) > 1 and ("+" in level or "#" in level) for level in levels):
            raise ValueError(f"{topic_filter!r}: '+' and '#' stand alone between slashes")
        if "#" in levels[:-1]:
            raise ValueError(f"{topic_filter!r}: '#' is the last level or none")


def _describe(field: str, raw: str, error: ValueError) -> str:
    if field in {"mqtt_broker", *_ADDRESSES}:
        raw = without_user(raw)
    shown = printable(raw[:_SHOWN_VALUE_CHARS])
    expected = _EXPECTED.get(field, "a file that this user can read")
    text = f"{field.upper()}: {shown!r} is wrong; expected {expected}"
    if in_quotes(raw):
        text += ", and the quotes count as a part of the value"
    # msgspec's own sentences repeat the pattern; ours add what the pattern cannot say.
    return text if isinstance(error, msgspec.ValidationError) else f"{text} ({error})"


def _contradictions(environ: Mapping[str, str], values: Mapping[str, object]) -> list[str]:
    """Return what is wrong between variables, and what is required and missing."""

    def given(field: str) -> bool:
        return bool(environ.get(field.upper(), "").strip())

    problems = []
    if not given("app_env"):
        problems.append(
            f"APP_ENV: not set; expected {_EXPECTED['app_env']} (LOCAL only logs, and sends "
            "nothing to the cloud)"
        )
    if values.get("app_env") != "LOCAL":
        pubsub = values.get("pubsub_enabled", True)
        bigquery = values.get("bigquery_enabled", True)
        required = {
            "gcp_project_id": bool(pubsub or bigquery),
            "pubsub_topic": bool(pubsub),
            "bigquery_dataset": bool(bigquery),
            "bigquery_table": bool(bigquery),
        }
        problems += [
            f"{field.upper()}: not set; expected {_EXPECTED[field]}"
            for field, needed in required.items()
            if needed and not given(field)
        ]
    if values.get("bigquery_write_method", DEFAULT_WRITE_METHOD) != "insert_all" and given(
        "bigquery_emulator_host"
    ) != given("bigquery_storage_emulator_host"):
        problems.append(
            "BIGQUERY_STORAGE_EMULATOR_HOST: with this BIGQUERY_WRITE_METHOD the table is read "
            "from BIGQUERY_EMULATOR_HOST and written at BIGQUERY_STORAGE_EMULATOR_HOST; expected "
            "both or neither"
        )
    problems += [
        f"{endpoint.upper()}: set together with {emulator.upper()}, which leads to an emulator; "
        "expected one of the two"
        for endpoint, emulator in _EITHER
        if given(endpoint) and given(emulator)
    ]
    if given("mqtt_tls_cert_file") != given("mqtt_tls_key_file"):
        problems.append(
            "MQTT_TLS_CERT_FILE: a client certificate needs both MQTT_TLS_CERT_FILE and "
            "MQTT_TLS_KEY_FILE; expected both or neither"
        )
    if given("mqtt_tls_cert_file") and not given("mqtt_tls_ca_file"):
        problems.append(
            "MQTT_TLS_CA_FILE: not set, but MQTT_TLS_CERT_FILE is; expected the file of the "
            "authority that signed the broker's certificate (TLS is on when it is set)"
        )
    if given("mqtt_password_file") and not given("mqtt_username"):
        problems.append(
            "MQTT_USERNAME: not set, but MQTT_PASSWORD_FILE is; MQTT 3.1.1 has no password "
            "without a user name"
        )
    return problems
