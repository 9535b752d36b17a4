"""Settings: what is accepted, and that every problem is told at once."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle import (
    EnvironmentFileError,
    Settings,
    SettingsError,
    load_settings,
    merged_environment,
)

CLOUD = {
    "APP_ENV": "PRD",
    "GCP_PROJECT_ID": "acme-edge",
    "PUBSUB_TOPIC": "kpi-events",
    "BIGQUERY_DATASET": "plant",
    "BIGQUERY_TABLE": "readings",
}
VARIABLES = [field.upper() for field in Settings.__struct_fields__]


def problems(**variables: str) -> list[str]:
    """Return the variables that a report on ``variables`` names, in its order."""
    with pytest.raises(SettingsError) as caught:
        load_settings(variables, "host")
    return [problem.partition(":")[0] for problem in caught.value.problems]


def test_local_needs_nothing_but_its_name() -> None:
    settings = load_settings({"APP_ENV": "LOCAL"}, "edge vm.7")
    assert settings.instance_id == "edge-vm.7"
    assert settings.mqtt_client_id == "sluice-edge-vm.7"
    assert settings.mqtt_topic == ("FCTS/FAE/+/SolvExtract/+",)
    assert settings.spool_dir == Path("/var/lib/sluice")
    assert settings.spool_max_bytes == 10 * 2**30
    assert settings.enabled_sinks == ("pubsub", "bigquery")


def test_app_env_is_never_guessed() -> None:
    assert problems(**{**CLOUD, "APP_ENV": ""}) == ["APP_ENV"]
    assert problems(**{**CLOUD, "APP_ENV": "prd"}) == ["APP_ENV"]
    assert problems(**{**CLOUD, "APP_ENV": "PROD"}) == ["APP_ENV"]


def test_the_cloud_needs_its_names_and_only_those_of_enabled_sinks() -> None:
    assert problems(APP_ENV="DEV") == [
        "GCP_PROJECT_ID",
        "PUBSUB_TOPIC",
        "BIGQUERY_DATASET",
        "BIGQUERY_TABLE",
    ]
    only = {"APP_ENV": "DEV", "GCP_PROJECT_ID": "acme-edge", "PUBSUB_TOPIC": "kpi-events"}
    settings = load_settings({**only, "BIGQUERY_ENABLED": "false"}, "host")
    assert settings.enabled_sinks == ("pubsub",)


def test_an_empty_variable_counts_as_unset() -> None:
    empty = dict.fromkeys(VARIABLES, "  ")
    assert load_settings({**empty, "APP_ENV": "LOCAL"}, "host") == load_settings(
        {"APP_ENV": "LOCAL"}, "host"
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 2**20), ("300KiB", 300 * 2**10), ("7 MiB", 7 * 2**20), ("2tib", 2 * 2**40)],
)
def test_sizes_may_have_units(text: str, size: int) -> None:
    settings = load_settings({"APP_ENV": "LOCAL", "SPOOL_MAX_BYTES": text}, "host")
    assert settings.spool_max_bytes == size


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SPOOL_MAX_BYTES", "10GB"),
        ("SPOOL_MAX_BYTES", "1000"),
        ("MQTT_PORT", "0"),
        ("MQTT_PORT", "1883x"),
        ("MQTT_TOPIC", "FCTS/#/x"),
        ("MQTT_TOPIC", "a,,b"),
        ("MQTT_TOPIC", "$share/group/FCTS/#"),
        ("MQTT_TOPIC", "FCTS/a+"),
        ("MQTT_TOPIC", "x" * 65_536),
        ("TIMESTAMP_FORMATS", "epoch,epoch_ms"),
        ("TIMESTAMP_FORMATS", "rfc3339,,naive"),
        ("SPOOL_DIR", "relative/path"),
        ("PUBSUB_ENABLED", "2"),
        ("MAX_DRAIN_RATE", "-1"),
        ("BIGQUERY_EMULATOR_HOST", "localhost:9050"),
        ("MQTT_PASSWORD_FILE", "/no/such/file"),
        ("INSTANCE_ID", "a b"),
        ("PUBSUB_TOPIC", "goog-topic"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({**CLOUD, variable: value}, "host")
    about = [p for p in caught.value.problems if p.startswith(f"{variable}: ")]
    assert about
    assert "expected" in about[0]


def test_contradictions_are_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x", encoding="ascii")
    assert "MQTT_TLS_CERT_FILE" in problems(APP_ENV="LOCAL", MQTT_TLS_CERT_FILE=str(file))
    assert problems(APP_ENV="LOCAL", MQTT_PASSWORD_FILE=str(file)) == ["MQTT_USERNAME"]


def test_a_value_with_escapes_cannot_act_on_the_operators_terminal() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"APP_ENV": "LOCAL", "LOG_FORMAT": "\x1b[2Jx"}, "host")
    assert caught.value.problems[0].isprintable()


@given(
    st.dictionaries(
        st.sampled_from(VARIABLES),
        st.one_of(st.text(max_size=40), st.sampled_from(["true", "1", "LOCAL", "DEV", "/", "a,b"])),
    ),
    st.text(max_size=300),
)
def test_any_environment_gives_settings_or_a_report(variables: dict[str, str], host: str) -> None:
    try:
        settings = load_settings(variables, host)
    except SettingsError:
        return
    assert settings.app_env == variables["APP_ENV"].strip()


def test_real_variables_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sluice.env"
    file.write_text(
        "# comment\nAPP_ENV=DEV\nexport MQTT_PORT='1884'\nMQTT_USERNAME=a$HOME b\nEMPTY=\n",
        encoding="utf-8",
    )
    merged = merged_environment({"SLUICE_ENV_FILE": str(file), "APP_ENV": "PRD"})
    assert merged["APP_ENV"] == "PRD"
    assert merged["MQTT_PORT"] == "1884"
    assert merged["MQTT_USERNAME"] == "a$HOME b"


@pytest.mark.parametrize("content", [b"\xff\xfe", b'A="open\nB=1\n', b"A=\0\n"])
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "sluice.env"
    file.write_bytes(content)
    with pytest.raises(EnvironmentFileError, match="SLUICE_ENV_FILE"):
        merged_environment({"SLUICE_ENV_FILE": str(file)})


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(EnvironmentFileError, match="/no/such/file"):
        merged_environment({"SLUICE_ENV_FILE": "/no/such/file"})


def test_no_file_is_no_problem() -> None:
    assert merged_environment({"A": "1"}) == {"A": "1"}
