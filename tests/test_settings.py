"""Every wrong variable is told at once, by its name, and nothing but that is ever raised."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle import (
    EnvironmentFileError,
    Settings,
    SettingsError,
    bigquery_gather_s,
    load_settings,
    merged_environment,
)
from spool import DEAD_LETTER_MAX_BYTES

LOCAL = {"APP_ENV": "LOCAL"}
CLOUD = {
    "APP_ENV": "PRD",
    "GCP_PROJECT_ID": "my-project",
    "PUBSUB_TOPIC": "readings",
    "BIGQUERY_DATASET": "d",
    "BIGQUERY_TABLE": "t",
}
WRONG = {
    "APP_ENV": "PROD",
    "GCP_PROJECT_ID": "no project",
    "BIGQUERY_DATASET": "a-b",
    "BIGQUERY_TABLE": "d.t",
    "PUBSUB_TOPIC": "goog-topic",
    "MQTT_BROKER": "mqtt://host",
    "MQTT_PORT": "70000",
    "MQTT_TOPIC": "a/#/b",
    "MQTT_CLIENT_ID": "x" * 300,
    "MQTT_PASSWORD_FILE": "/nowhere/password",
    "MQTT_TLS_CA_FILE": "/nowhere/ca",
    "MQTT_TLS_CERT_FILE": "/nowhere/cert",
    "MQTT_TLS_KEY_FILE": "/nowhere/key",
    "INSTANCE_ID": "-x",
    "SPOOL_DIR": "relative/path",
    "SPOOL_MAX_BYTES": "1 GB",
    "COMMIT_DELAY_MS": "1001",
    "DEAD_LETTER_MAX_BYTES": "63KiB",
    "SPOOL_FULL_POLICY": "drop",
    "SPOOL_RETENTION_HOURS": "-1",
    "DEDUP_WINDOW": "many",
    "TIMESTAMP_FORMATS": "iso",
    "SITE_MISMATCH": "ignore",
    "REFUSED_POLICY": "drop",
    "MAX_PAYLOAD_BYTES": "0",
    "MAX_DRAIN_RATE": "-5",
    "PUBSUB_ENABLED": "yes",
    "BIGQUERY_ENABLED": "2",
    "PUBSUB_ENDPOINT": "https://host/",
    "PUBSUB_EMULATOR_HOST": "http://host",
    "BIGQUERY_CREATE_TABLE": "maybe",
    "BIGQUERY_WRITE_METHOD": "load",
    "BIGQUERY_ENDPOINT": "http://bigquery.example.com",
    "BIGQUERY_STORAGE_ENDPOINT": "https://host",
    "BIGQUERY_EMULATOR_HOST": "localhost:9050",
    "BIGQUERY_STORAGE_EMULATOR_HOST": "http://host",
    "CLOUD_CA_FILE": "/nowhere/authority",
    "LOG_LEVEL": "LOUD",
    "LOG_FORMAT": "xml",
}
FREE = {"MQTT_USERNAME", "GOOGLE_APPLICATION_CREDENTIALS"}
"""Any text is lawful."""


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, "host")
    return caught.value.problems


def load(**variables: str) -> Settings:
    return load_settings(LOCAL | variables, "host")


def test_every_variable_wrong_at_once_is_one_report_that_names_each() -> None:
    fields = {field.upper() for field in Settings.__struct_fields__}
    assert fields == set(WRONG) | FREE, "this test knows every variable"
    found = problems(WRONG)
    named = [problem.partition(":")[0] for problem in found]
    assert set(WRONG) <= set(named)
    assert named.count("APP_ENV") == 1
    for problem in found:
        assert "expected" in problem or "not set" in problem


@pytest.mark.parametrize("variable", WRONG)
def test_each_wrong_variable_is_told_alone_with_its_value(variable: str) -> None:
    found = problems(CLOUD | {variable: WRONG[variable]})
    mine = [problem for problem in found if problem.startswith(f"{variable}:")]
    assert WRONG[variable][:60] in mine[0]


def test_app_env_alone_is_enough_for_local_and_gives_the_defaults() -> None:
    loaded = load_settings(LOCAL, "edge-7")
    assert (loaded.mqtt_broker, loaded.mqtt_port) == ("localhost", 1883)
    assert loaded.mqtt_topic == ("FCTS/FAE/+/SolvExtract/+",)
    assert (loaded.instance_id, loaded.mqtt_client_id) == ("edge-7", "sluice-edge-7")
    assert loaded.spool_dir == Path("/var/lib/sluice")
    assert loaded.spool_max_bytes == 10 * 1024**3
    assert loaded.dead_letter_max_bytes == DEAD_LETTER_MAX_BYTES
    assert (loaded.spool_full_policy, loaded.spool_retention_hours) == ("block", 24)
    assert loaded.commit_delay_ms == 200
    assert (loaded.dedup_window, loaded.max_payload_bytes) == (100_000, 262_144)
    assert (loaded.timestamp_formats, loaded.site_mismatch) == (("rfc3339",), "warn")
    assert (loaded.max_drain_rate, loaded.bigquery_create_table) == (0, False)
    assert loaded.enabled_sinks == ("pubsub", "bigquery")
    assert (loaded.log_level, loaded.log_format) == ("INFO", "json")


def test_app_env_is_required_and_exact() -> None:
    assert problems({})[0].startswith("APP_ENV: not set")
    for wrong in ("local", "PROD", "DEV,PRD", "LOCAL\x00"):
        assert any(p.startswith("APP_ENV:") for p in problems(CLOUD | {"APP_ENV": wrong}))


def test_empty_and_blank_count_as_unset() -> None:
    blank = {variable: " " if n % 2 else "" for n, variable in enumerate(WRONG)}
    assert load_settings(blank | LOCAL, "host") == load_settings(LOCAL, "host")


def test_values_are_trimmed() -> None:
    assert load(MQTT_PORT=" 1884\n", APP_ENV=" LOCAL ").mqtt_port == 1884


@pytest.mark.parametrize(
    ("enabled", "required"),
    [
        ({}, {"GCP_PROJECT_ID", "PUBSUB_TOPIC", "BIGQUERY_DATASET", "BIGQUERY_TABLE"}),
        ({"BIGQUERY_ENABLED": "false"}, {"GCP_PROJECT_ID", "PUBSUB_TOPIC"}),
        (
            {"PUBSUB_ENABLED": "false"},
            {"GCP_PROJECT_ID", "BIGQUERY_DATASET", "BIGQUERY_TABLE"},
        ),
        ({"PUBSUB_ENABLED": "false", "BIGQUERY_ENABLED": "false"}, set()),
    ],
)
@pytest.mark.parametrize("app_env", ["DEV", "PPRD", "PRD"])
def test_what_is_required_follows_from_the_enabled_sinks(
    app_env: str, enabled: dict[str, str], required: set[str]
) -> None:
    environ = {"APP_ENV": app_env, **enabled}
    if required:
        assert {p.partition(":")[0] for p in problems(environ)} == required
    assert load_settings(environ | dict.fromkeys(required, "ttt"), "host").app_env == app_env


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("262144", 262_144),
        ("256KiB", 262_144),
        ("256 kib", 262_144),
        ("3 MiB", 3 * 1024**2),
        ("20GiB", 20 * 1024**3),
        ("1TIB", 1024**4),
    ],
)
def test_sizes_have_binary_units(text: str, size: int) -> None:
    assert load(SPOOL_MAX_BYTES=text).spool_max_bytes == size
    assert load(DEAD_LETTER_MAX_BYTES=text).dead_letter_max_bytes == size


@pytest.mark.parametrize(
    "text", ["262143", "255KiB", "1GB", "1.5GiB", "-1", "1e9", "GiB", "0x10", "9" * 5000]
)
def test_other_sizes_are_refused(text: str) -> None:
    assert problems(LOCAL | {"SPOOL_MAX_BYTES": text})


@pytest.mark.parametrize(
    ("text", "gather_s"),
    [("0", 0.25), ("50", 0.25), ("100", 0.5), ("200", 1.0), ("1000", 5.0)],
)
def test_the_gather_time_of_bigquery_follows_from_the_commit_delay(
    text: str, gather_s: float
) -> None:
    assert bigquery_gather_s(load(COMMIT_DELAY_MS=text).commit_delay_ms) == gather_s


@pytest.mark.parametrize("text", ["-1", "1001", "0.5", "200 ms", "nan", "9" * 5000])
def test_other_commit_delays_are_refused(text: str) -> None:
    assert problems(LOCAL | {"COMMIT_DELAY_MS": text})


@pytest.mark.parametrize(
    ("text", "filters"),
    [
        ("#", ("#",)),
        ("a/+/b, c/#", ("a/+/b", "c/#")),
        ("+/+", ("+/+",)),
        ("a//b", ("a//b",)),
        ("é/+", ("é/+",)),
        ("a" * 65_535, ("a" * 65_535,)),
    ],
)
def test_lawful_topic_filters_are_taken(text: str, filters: tuple[str, ...]) -> None:
    assert load(MQTT_TOPIC=text).mqtt_topic == filters


@pytest.mark.parametrize(
    "text",
    [
        "a,,b",
        ",",
        "a+/b",
        "a/b#",
        "a/#/b",
        "##",
        "$share/g/a",
        "a/b,$share/g/a",
        "a" * 65_536,
        "é" * 32_768,
    ],
)
def test_unlawful_topic_filters_are_refused(text: str) -> None:
    assert len(problems(LOCAL | {"MQTT_TOPIC": text})) == 1


@pytest.mark.parametrize("text", ["t", "ab", "goog1", "1abc", "projects/p/topics/x", "a b"])
def test_a_topic_that_pubsub_could_never_have_is_refused(text: str) -> None:
    """The service would refuse every row for it, and each would become a dead letter."""
    assert problems(CLOUD | {"PUBSUB_TOPIC": text})


ADDRESSES = {
    "PUBSUB_ENDPOINT": "",
    "PUBSUB_EMULATOR_HOST": "",
    "BIGQUERY_ENDPOINT": "https://",
    "BIGQUERY_STORAGE_ENDPOINT": "",
    "BIGQUERY_EMULATOR_HOST": "http://",
    "BIGQUERY_STORAGE_EMULATOR_HOST": "",
}
"""The variables that name a server, with what stands before its name."""


@pytest.mark.parametrize("variable", ADDRESSES)
@pytest.mark.parametrize(
    "address", ["localhost", "localhost:1", "10.0.0.1:65535", "[::1]:8085", "[fe80::1]"]
)
def test_an_address_may_be_a_name_or_of_either_ip_version(variable: str, address: str) -> None:
    value = ADDRESSES[variable] + address
    loaded = load(BIGQUERY_WRITE_METHOD="insert_all", **{variable: value})
    assert getattr(loaded, variable.lower()) == value


@pytest.mark.parametrize("variable", ADDRESSES)
@pytest.mark.parametrize(
    "address", ["h:0", "h:65536", "h:99999", "[::1]:70000", "[::1", "::1", "[x]:1", "[:]:1"]
)
def test_an_address_that_leads_nowhere_is_refused(variable: str, address: str) -> None:
    (problem,) = problems(
        LOCAL | {"BIGQUERY_WRITE_METHOD": "insert_all", variable: ADDRESSES[variable] + address}
    )
    assert problem.startswith(f"{variable}: ")


def test_epoch_in_two_units_is_a_contradiction() -> None:
    assert "choose one" in problems(LOCAL | {"TIMESTAMP_FORMATS": "epoch, epoch_ms"})[0]
    assert load(TIMESTAMP_FORMATS="naive, epoch").timestamp_formats == ("naive", "epoch")


def test_files_of_tls_and_password_need_each_other(tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    Path(file).write_text("secret")

    def named(**variables: str) -> list[str]:
        return [p.partition(":")[0] for p in problems(LOCAL | variables)]

    assert named(MQTT_TLS_CERT_FILE=file) == ["MQTT_TLS_CERT_FILE", "MQTT_TLS_CA_FILE"]
    assert named(MQTT_TLS_KEY_FILE=file) == ["MQTT_TLS_CERT_FILE"]
    assert named(MQTT_TLS_CERT_FILE=file, MQTT_TLS_KEY_FILE=file) == ["MQTT_TLS_CA_FILE"]
    assert named(MQTT_PASSWORD_FILE=file) == ["MQTT_USERNAME"]
    assert named(MQTT_PASSWORD_FILE=str(tmp_path), MQTT_USERNAME="u") == ["MQTT_PASSWORD_FILE"]
    whole = load(
        MQTT_TLS_CA_FILE=file,
        MQTT_TLS_CERT_FILE=file,
        MQTT_TLS_KEY_FILE=file,
        MQTT_PASSWORD_FILE=file,
        MQTT_USERNAME="u",
    )
    assert whole.mqtt_tls_key_file == Path(file)


def test_the_longest_instance_id_and_host_name_still_make_a_client_id() -> None:
    loaded = load(INSTANCE_ID="a" * 200)
    assert loaded.mqtt_client_id == f"sluice-{'a' * 200}"
    assert len(load_settings(LOCAL, "h" * 1000).instance_id) == 200


@pytest.mark.parametrize("host", ["", "...", "-", "höst.example", "a b", "\udcff"])
def test_any_host_name_makes_an_instance_id(host: str) -> None:
    assert load_settings(LOCAL, host).instance_id.isascii()


def test_a_value_that_is_no_text_is_refused_wherever_it_stands() -> None:
    for variable in ("MQTT_USERNAME", "MQTT_CLIENT_ID", "MQTT_TOPIC", "SPOOL_DIR", "MQTT_BROKER"):
        (problem,) = problems(LOCAL | {variable: "/a\udcff"})
        assert problem.startswith(variable)
        assert problem.encode()


def test_a_report_is_printable_and_bounded_whatever_was_given() -> None:
    for problem in problems(CLOUD | {"LOG_FORMAT": "\x1b[2J\n" * 1000}):
        assert problem.isprintable()
        assert len(problem) < 1000


variables = st.sampled_from([*WRONG, *FREE, "SLUICE_ENV_FILE", "OTHER"])
values = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["true", "LOCAL", "DEV", "/", "/tmp", "a/+", "epoch", "1GiB", "[::1]:1"]),  # noqa: S108 - a value only
    st.text(st.characters(categories=["Cs", "Cc", "Nd"]), max_size=8),
)


@settings(max_examples=400)
@given(st.dictionaries(variables, values), st.text())
def test_nothing_but_settings_or_a_report_comes_out(environ: dict[str, str], host: str) -> None:
    try:
        loaded = load_settings(environ, host)
    except SettingsError as error:
        names = [problem.partition(":")[0].lower() for problem in error.problems]
        told = bool(names) and set(names) <= set(Settings.__struct_fields__)
    else:
        told = loaded.app_env in {"LOCAL", "DEV", "PPRD", "PRD"}
        assert loaded.spool_dir.is_absolute()
        assert loaded.mqtt_client_id.encode()
    assert told


def env_file(tmp_path: Path, content: bytes | str) -> dict[str, str]:
    path = tmp_path / "sluice.env"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"SLUICE_ENV_FILE": str(path)}


def test_the_file_completes_the_environment_and_real_variables_win(tmp_path: Path) -> None:
    environ = env_file(tmp_path, "APP_ENV=PRD\nMQTT_PORT=1884\n") | {"APP_ENV": "LOCAL"}
    merged = merged_environment(environ)
    assert (merged["APP_ENV"], merged["MQTT_PORT"]) == ("LOCAL", "1884")
    assert "MQTT_PORT" not in environ


def test_without_a_file_the_environment_is_as_it_was() -> None:
    assert merged_environment({"A": "1"}) == {"A": "1"}
    assert merged_environment({"A": "1", "SLUICE_ENV_FILE": ""}) == {
        "A": "1",
        "SLUICE_ENV_FILE": "",
    }


def test_the_file_is_read_as_an_operator_writes_it(tmp_path: Path) -> None:
    content = (
        "\ufeffFIRST=1\r\n"
        "# a comment\n"
        "\n"
        'QUOTED="two words" # a comment\n'
        "SINGLE='a # b'\n"
        "export EXPORTED=yes\n"
        "DOLLAR=$HOME ${HOME}\n"
        "HASH=a#b\n"
        "EMPTY=\n"
        "NOTHING\n"
        "TWICE=1\nTWICE=2\n"
        "UNICODE=é中\n"
    )
    environ = env_file(tmp_path, content)
    assert merged_environment(environ) == environ | {
        "FIRST": "1",
        "QUOTED": "two words",
        "SINGLE": "a # b",
        "EXPORTED": "yes",
        "DOLLAR": "$HOME ${HOME}",
        "HASH": "a#b",
        "EMPTY": "",
        "TWICE": "2",
        "UNICODE": "é中",
    }


@pytest.mark.parametrize(
    "content",
    [
        'APP_ENV="LOCAL\nSPOOL_FULL_POLICY=drop-oldest\n',
        "=x\n",
        b"APP_ENV=\0LOCAL\n",
        b"\xff\xfe",
        b"APP_ENV=\xe9\n",
    ],
)
def test_a_file_that_cannot_be_understood_is_an_error_and_loses_no_variable(
    tmp_path: Path, content: bytes | str
) -> None:
    with pytest.raises(EnvironmentFileError, match="SLUICE_ENV_FILE"):
        merged_environment(env_file(tmp_path, content))


def test_a_file_that_is_missing_or_a_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(EnvironmentFileError, match=str(path)):
            merged_environment({"SLUICE_ENV_FILE": str(path)})


@given(content=st.binary(max_size=200))
def test_any_file_gives_variables_that_the_system_can_take(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    try:
        merged = merged_environment(env_file(tmp_path_factory.getbasetemp(), content))
    except EnvironmentFileError:
        return
    before = dict(os.environ)
    try:
        os.environ.update(merged)
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_an_empty_real_variable_does_not_hide_the_files(tmp_path: Path) -> None:
    file = tmp_path / "sluice.env"
    file.write_text("MQTT_PORT=1884\n", encoding="utf-8")
    merged = merged_environment({"SLUICE_ENV_FILE": str(file), "MQTT_PORT": "", "OTHER": ""})
    assert merged["MQTT_PORT"] == "1884"
    assert merged["OTHER"] == ""


def test_an_endpoint_of_bigquery_may_be_a_host_or_a_url() -> None:
    for value in ("bq-x.p.googleapis.com", "https://bq-x.p.googleapis.com"):
        assert load(BIGQUERY_ENDPOINT=value).bigquery_endpoint == "https://bq-x.p.googleapis.com"


@pytest.mark.parametrize(
    "value", ["http://host", "https://host/path", "https://user@host", "https://host?x", "a b"]
)
def test_an_endpoint_that_would_see_a_token_in_the_clear_or_is_none_is_refused(value: str) -> None:
    assert problems(CLOUD | {"BIGQUERY_ENDPOINT": value})


@pytest.mark.parametrize(
    ("endpoint", "emulator"),
    [
        ("BIGQUERY_ENDPOINT", {"BIGQUERY_EMULATOR_HOST": "http://localhost:9050"}),
        ("BIGQUERY_STORAGE_ENDPOINT", {"BIGQUERY_STORAGE_EMULATOR_HOST": "localhost:9060"}),
    ],
)
def test_an_endpoint_and_an_emulator_contradict_each_other(
    endpoint: str, emulator: dict[str, str]
) -> None:
    both = {
        "BIGQUERY_EMULATOR_HOST": "http://localhost:9050",
        "BIGQUERY_STORAGE_EMULATOR_HOST": "localhost:9060",
    }
    (problem,) = problems(CLOUD | both | {endpoint: "host.example.com"})
    assert problem.startswith(f"{endpoint}: set together with {next(iter(emulator))}")
