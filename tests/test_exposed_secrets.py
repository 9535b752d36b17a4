"""A key that those who may look into the spool can read is warned of at start."""

from pathlib import Path

import pytest

from lifecycle import ExitCode, Program, Settings, StopRequest, run
from lifecycle.exposure import SECRET_FILES, exposed_files

CASES = [(role, variable) for role, variables in SECRET_FILES.items() for variable in variables]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("s3cret", encoding="utf-8")
    path.chmod(0o400)
    return path


@pytest.mark.parametrize(("role", "variable"), CASES)
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (0o440, "may read it"),
        (0o404, "every user may read it"),
        (0o420, "may write it"),
        (0o402, "every user may write it"),
    ],
)
def test_each_secret_that_others_may_use_is_told_with_the_command(
    secret: Path, role: str, variable: str, mode: int, words: str
) -> None:
    assert list(exposed_files(role, {variable: str(secret)})) == []
    secret.chmod(mode)
    (told,) = exposed_files(role, {variable: str(secret)})
    assert told.startswith(f"{variable}: {secret}")
    assert words in told
    assert f" {secret} && chmod 0400 {secret}" in told
    assert "chown " in told


def test_a_directory_in_which_every_user_may_replace_it_is_told(secret: Path) -> None:
    secret.parent.chmod(0o777)
    (told,) = exposed_files("collector", {"MQTT_PASSWORD_FILE": str(secret)})
    assert "every user may replace it" in told
    secret.parent.chmod(0o1777)
    assert not list(exposed_files("collector", {"MQTT_PASSWORD_FILE": str(secret)}))


def test_settings_with_a_proxys_password_are_a_secret_themselves(secret: Path) -> None:
    secret.chmod(0o640)
    file = {"SLUICE_ENV_FILE": str(secret)}
    assert not list(exposed_files("forwarder-pubsub", file))
    assert not list(exposed_files("forwarder-pubsub", file | {"HTTPS_PROXY": "http://proxy:3128"}))
    for proxy in ("http://user:word@proxy:3128", "user:word@proxy:3128"):
        (told,) = exposed_files("forwarder-pubsub", file | {"HTTPS_PROXY": proxy})
        assert told.startswith("SLUICE_ENV_FILE: ")
        assert "word" not in told


def test_a_program_warns_at_its_start_and_starts(
    secret: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret.chmod(0o440)

    def body(_: Settings, stop: StopRequest) -> None:
        stop.request("done")

    environ = {
        "APP_ENV": "LOCAL",
        "SPOOL_DIR": str(tmp_path / "spool"),
        "MQTT_USERNAME": "gate",
        "MQTT_PASSWORD_FILE": str(secret),
    }
    assert run(Program("collector", body, {}), environ) is ExitCode.CLEAN
    out = capfd.readouterr()
    lines = [line for line in (out.out + out.err).splitlines() if "a secret is exposed" in line]
    assert len(lines) == 1
    assert "MQTT_PASSWORD_FILE" in lines[0]
    assert "WARNING" in lines[0]
    assert "s3cret" not in out.out + out.err
