"""What a first try gets wrong, and whether the programs say so where a person looks."""

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifecycle import Settings
from lifecycle.addresses import broker_host, check_host
from lifecycle.environment import LINES_TOLD_MAX, read_environment_file
from lifecycle.refusal import RUN_DIR_VARIABLE, Circumstances, examine
from lifecycle.report import TAIL_BYTES, summary
from lifecycle.unknown import _OUR_PREFIXES, OURS, TOLD_MAX, unknown_variables
from tests.harness.programs import ROOT, Program, clean_environment
from tests.harness.waiting import free_port, wait_until
from tests.test_settings import WRONG

FATAL_TIMEOUT_S = 90.0
NEAR = {
    "SPOOL_MAX_BYTE": "SPOOL_MAX_BYTES",
    "MQTT_TOPICS": "MQTT_TOPIC",
    "MQTT_PASSWORD": "MQTT_PASSWORD_FILE",
    "MQTT_HOST": "MQTT_BROKER",
    "mqtt_broker": "MQTT_BROKER",
    "APPENV": "APP_ENV",
    "BIGQUERY_TABLE_ID": "BIGQUERY_TABLE",
    "GCP_PROJECT": "GCP_PROJECT_ID",
    "LOGLEVEL": "LOG_LEVEL",
    "GOOGLE_APPLICATION_CREDENTIAL": "GOOGLE_APPLICATION_CREDENTIALS",
}
"""What people write, and what they mean."""

SYSTEM_TEXT = """
_ PATH HOME USER LOGNAME SHELL TERM PWD OLDPWD SHLVL MAIL LANG LANGUAGE LC_ALL LC_CTYPE TZ TMPDIR
HOSTNAME EDITOR PAGER LESS DISPLAY SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK SUDO_USER SUDO_COMMAND
XDG_RUNTIME_DIR XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS INVOCATION_ID JOURNAL_STREAM
SYSTEMD_EXEC_PID NOTIFY_SOCKET MAINPID RUNTIME_DIRECTORY STATE_DIRECTORY LOGS_DIRECTORY
SUPERVISOR_ENABLED
SUPERVISOR_PROCESS_NAME SUPERVISOR_GROUP_NAME SUPERVISOR_SERVER_URL PYTHONPATH PYTHONUNBUFFERED
PYTHONDONTWRITEBYTECODE VIRTUAL_ENV PIP_INDEX_URL HTTP_PROXY HTTPS_PROXY http_proxy https_proxy
no_proxy NO_PROXY ALL_PROXY grpc_proxy no_grpc_proxy GRPC_VERBOSITY GRPC_TRACE GOOGLE_CLOUD_PROJECT
GOOGLE_APPLICATION_CREDENTIALS GOOGLE_CLOUD_REGION GOOGLE_API_USE_MTLS_ENDPOINT CLOUDSDK_CONFIG
GCLOUD_PROJECT GCE_METADATA_HOST NO_GCE_CHECK AWS_REGION SSL_CERT_FILE REQUESTS_CA_BUNDLE
GRPC_DEFAULT_SSL_ROOTS_FILE_PATH MALLOC_ARENA_MAX LD_LIBRARY_PATH container DEBIAN_FRONTEND APP_NAME
APP_HOME LOG_DIR LOG_FILE LOGDIR MAX_WORKERS EC2_INSTANCE_ID KUBERNETES_SERVICE_HOST KUBERNETES_PORT
MQTT_SERVICE_HOST MQTT_SERVICE_PORT MQTT_SERVICE_PORT_MQTT MQTT_PORT_1883_TCP
MQTT_PORT_1883_TCP_ADDR PUBSUB_PORT SLUICE_ENV_FILE SLUICE_RUN_DIR
"""
OF_A_SYSTEM = SYSTEM_TEXT.split()
"""Of logins, systemd, supervisord, containers, Kubernetes, proxies, Google's tools."""


def looked_at(directory: Path, content: str | bytes, **environ: str) -> Circumstances:
    """Return what a program finds at its start, with that settings file."""
    file = directory / "sluice.env"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return examine({"SLUICE_ENV_FILE": str(file), **environ}, "host")


# ------------------------------------------------------------------ names that mean nothing


@pytest.mark.parametrize("name", NEAR)
def test_a_misspelt_variable_in_the_file_is_told_with_the_nearest_name(
    tmp_path: Path, name: str
) -> None:
    found = looked_at(tmp_path, f"APP_ENV=LOCAL\n{name}=secret\n")
    assert found.settings is not None, "a warning, no refusal"
    (warning,) = found.warnings
    assert warning.startswith(f"{name} in {tmp_path}/sluice.env ")
    assert warning.endswith(f"did you mean {NEAR[name]}?")
    assert "secret" not in warning


def test_a_misspelt_variable_explains_the_problem_that_it_causes(tmp_path: Path) -> None:
    found = looked_at(tmp_path, "APP_ENVV=LOCAL\n")
    assert found.problems[0].startswith("APP_ENV: not set")
    assert "did you mean APP_ENV?" in found.warnings[0]


@pytest.mark.parametrize("name", ["SPOOL_MAX_BYTE", "MQTT_TOPICS", "PUBSUB_TOPICS", "APPENV"])
def test_one_in_the_real_environment_is_told_too(name: str) -> None:
    (warning,) = unknown_variables({"APP_ENV": "LOCAL", name: "x"}, [], "")
    assert f"{name} in the environment" in warning


def test_nothing_is_told_of_a_systems_environment() -> None:
    assert RUN_DIR_VARIABLE in OF_A_SYSTEM
    assert unknown_variables(dict.fromkeys([*OF_A_SYSTEM, *OURS], "x"), [], "") == []


def test_nothing_is_told_of_what_the_file_may_hold(tmp_path: Path) -> None:
    libraries = [n for n in OF_A_SYSTEM if re.match("GOOGLE|GRPC|SSL|REQUESTS|HTTP|http|TZ|LC_", n)]
    shipped = re.sub("(?m)^#(?=[A-Z_]+=)", "", (ROOT / "deploy" / "sluice.env").read_text())
    file = tmp_path / "sluice.env"
    file.write_text(shipped + "".join(f"{name}=\n" for name in libraries))
    read = read_environment_file({"SLUICE_ENV_FILE": str(file)})
    assert {*libraries, "MQTT_TLS_CA_FILE"} <= set(read.values)
    assert unknown_variables({}, read.values, str(file)) == []


def test_the_prefixes_are_those_of_the_settings() -> None:
    for prefix in _OUR_PREFIXES:
        assert any(name.startswith(prefix) for name in OURS)
    assert {f.upper() for f in Settings.__struct_fields__} == OURS


def test_another_programs_file_is_not_listed_to_its_end() -> None:
    told = unknown_variables({}, [f"ODD_{n}" for n in range(TOLD_MAX + 5)], "file")
    assert len(told) == TOLD_MAX + 1
    assert told[-1].startswith("5 more variables")


def test_a_started_program_warns_once(tmp_path: Path) -> None:
    file = tmp_path / "sluice.env"
    file.write_text(
        f"APP_ENV=LOCAL\nSPOOL_DIR={tmp_path}/spool\nMQTT_PORT={free_port()}\nMQTT_TOPICS=a\n"
    )
    collector = Program(
        "collector",
        [sys.executable, "-m", "collector"],
        {"SLUICE_ENV_FILE": str(file)},
        tmp_path / "log",
    )
    collector.start()
    try:
        collector.wait_for_log("cannot reach the broker")
    finally:
        collector.kill()
    lines = [json.loads(line) for line in collector.log_text.splitlines()]
    told = [line for line in lines if "MQTT_TOPICS" in line["message"]]
    assert [line["severity"] for line in told] == ["WARNING"]


# ------------------------------------------------------------------ lines of the file


def test_what_cannot_be_understood_hides_nothing(tmp_path: Path) -> None:
    found = looked_at(
        tmp_path,
        "# settings\n\n\n"
        'APP_ENV="LOCAL\n'
        "MQTT_PORT=70000\n"
        'MQTT_USERNAME="gate"\n'
        "=x\n"
        "MQTT_BROKER=a/b\n"
        "SPOOL_MAX_BYTES 10GiB\n"
        "SPOOL_FULL_POLICY=drop\n",
    )
    lines = [
        int(match[1]) for match in map(re.compile(r".*line (\d+),").match, found.problems) if match
    ]
    assert lines == [4, 7, 9]
    others = [p.partition(":")[0] for p in found.problems if not p.startswith("SLUICE_ENV_FILE")]
    # Not APP_ENV, which is set, in the line that cannot be understood, nor what it would require.
    assert sorted(others) == ["MQTT_BROKER", "MQTT_PORT", "SPOOL_FULL_POLICY"]
    assert found.settings is None
    assert found.environ["MQTT_USERNAME"] == "gate"


@pytest.mark.parametrize(
    ("content", "values", "lines"),
    [
        ('A="x\nB=y\nC="z"\n', {"B": "y", "C": "z"}, [1]),
        ('A="x\nB=y"\n', {"B": 'y"'}, [1]),
        ("A='x\nexport B=y\nC='z\nD=1\n", {"B": "y", "D": "1"}, [1, 3]),
        ('\r\nA="x\r\nB=y\r\n', {"B": "y"}, [2]),
        ('A="two\nlines"\nB=y\n', {"A": "two\nlines", "B": "y"}, []),
        ('B=y\nA="', {"B": "y"}, [2]),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_line(
    tmp_path: Path, content: str, values: dict[str, str], lines: list[int]
) -> None:
    file = tmp_path / "sluice.env"
    file.write_bytes(content.encode())
    read = read_environment_file({"SLUICE_ENV_FILE": str(file)})
    assert read.values == values
    assert [int(n) for p in read.problems for n in re.findall(r"line (\d+),", p)] == lines


def test_what_is_no_utf8_is_told_by_line_and_does_not_matter_in_a_comment(tmp_path: Path) -> None:
    found = looked_at(tmp_path, b"# \xe9t\xe9\nAPP_ENV=LOCAL\nMQTT_USERNAME=\xe9\nMQTT_PORT=x\n")
    assert "line 3, is not UTF-8" in found.problems[0]
    assert found.problems[1].startswith("MQTT_PORT: ")
    assert len(found.problems) == 2
    (problem,) = looked_at(tmp_path, "APP_ENV=LOCAL\n".encode("utf-16")).problems
    assert "save it as UTF-8" in problem


def test_a_file_that_is_none_at_all_is_not_listed_to_its_end(tmp_path: Path) -> None:
    found = looked_at(tmp_path, "some words\n" * 1000)
    assert len(found.problems) < LINES_TOLD_MAX + 10
    assert any("980 more lines" in problem for problem in found.problems)


def test_a_file_that_cannot_be_read_is_the_only_problem_that_is_told() -> None:
    (problem,) = examine({"SLUICE_ENV_FILE": "/nowhere/sluice.env"}, "host").problems
    assert problem.startswith("SLUICE_ENV_FILE: cannot read /nowhere/sluice.env: No such file")


def test_what_is_set_twice_or_to_nothing_is_told(tmp_path: Path) -> None:
    found = looked_at(
        tmp_path, "APP_ENV=LOCAL\nMQTT_PORT=1884\nMQTT_PORT=1885\nAPP_ENV=LOCAL\nLOG_LEVEL\n"
    )
    assert found.settings is not None
    assert found.settings.mqtt_port == 1885
    twice, nothing = found.warnings
    assert twice.startswith("MQTT_PORT is set twice")
    assert "in line 2 and in line 3" in twice
    assert "'LOG_LEVEL'" in nothing
    assert "line 5) has no '='" in nothing


def test_quotes_that_were_left_around_a_value_are_told() -> None:
    """What docker's --env-file and a shell that was quoted twice leave."""
    environ = {"APP_ENV": "LOCAL", "MQTT_TOPIC": '"FCTS/#"'}
    (warning,) = examine(environ, "host").warnings
    assert "the value of MQTT_TOPIC stands in quotes" in warning
    (problem,) = examine(
        {"APP_ENV": "'LOCAL'", "PUBSUB_ENABLED": "false"} | {"BIGQUERY_ENABLED": "false"}, "h"
    ).problems
    assert "the quotes count as a part of the value" in problem


# ------------------------------------------------------------------ the broker's address


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("localhost", "localhost"),
        ("mqtt.plant.example.", "mqtt.plant.example."),
        ("edge_7-b", "edge_7-b"),
        ("10.0.0.7", "10.0.0.7"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("bröker", "bröker"),
        ("7up.example", "7up.example"),
    ],
)
def test_a_broker_may_be_named_in_these_ways(text: str, host: str) -> None:
    assert broker_host(text) == host
    found = examine({"APP_ENV": "LOCAL", "MQTT_BROKER": text}, "host").settings
    assert found is not None
    assert found.mqtt_broker == host


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "localhost:1883",
            "the port belongs in MQTT_PORT: MQTT_BROKER=localhost and MQTT_PORT=1883",
        ),
        ("[::1]:1883", "MQTT_BROKER=[::1] and MQTT_PORT=1883"),
        ("host:", "the port belongs in MQTT_PORT"),
        (":1883", "MQTT_BROKER=HOST and MQTT_PORT=1883"),
        ("mqtt://host", "without mqtt://"),
        ("tcp://host:1883", "without tcp://"),
        ("host/", "no '/'"),
        ("user:word@host", "MQTT_USERNAME"),
        ('"host"', "quotes"),
        ("my host", "a name has letters"),
        ("a,b", "a name has letters"),
        ("a..b", "a name has letters"),
        ("*", "a name has letters"),
        ("x" * 64, "a name has letters"),
        ("10.0.0.256", "neither an IPv4 address"),
        ("1883", "neither an IPv4 address"),
        ("10.0.0", "neither an IPv4 address"),
        ("[localhost]", "brackets"),
        ("[::1", "neither an IPv6 address"),
        ("::1::2", "neither an IPv6 address"),
        ("${BROKER}", "placeholder"),
        ("<broker>", "placeholder"),
    ],
)
def test_a_broker_that_can_never_be_reached_is_refused_with_the_reason(
    text: str, words: str
) -> None:
    (problem,) = examine({"APP_ENV": "LOCAL", "MQTT_BROKER": text}, "host").problems
    assert problem.startswith("MQTT_BROKER: ")
    assert words in problem


def test_a_password_in_an_address_is_not_logged() -> None:
    for name in ("MQTT_BROKER", "BIGQUERY_ENDPOINT", "PUBSUB_ENDPOINT"):
        environ = {"APP_ENV": "LOCAL", name: "https://gate:s3cret@host/x"}
        problems = examine(environ, "host").problems
        assert len(problems) == 1
        assert "s3cret" not in problems[0]
        assert "host" in problems[0]


@pytest.mark.parametrize(
    "variable", ["PUBSUB_ENDPOINT", "PUBSUB_EMULATOR_HOST", "BIGQUERY_ENDPOINT"]
)
def test_the_cloud_endpoints_are_held_to_the_same(variable: str) -> None:
    for host in ("a,b", "10.0.0.256", "${HOST}", "a..b"):
        (problem,) = examine({"APP_ENV": "LOCAL", variable: host}, "host").problems
        assert problem.startswith(f"{variable}: ")
    check_host("pubsub.googleapis.com")


def ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not ipv6_loopback(), reason="there is no IPv6 on the loopback interface")
@pytest.mark.parametrize("name", ["::1", "[::1]"])
def test_a_broker_on_ipv6_is_reached(tmp_path: Path, name: str) -> None:
    port = free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} ::1\nallow_anonymous true\nuser root\n")
    mosquitto = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    broker = Program("mosquitto", [mosquitto, "-c", str(config)], {}, tmp_path / "mosquitto.log")
    collector = Program(
        "collector",
        [sys.executable, "-m", "collector"],
        {
            "APP_ENV": "LOCAL",
            "MQTT_BROKER": name,
            "MQTT_PORT": str(port),
            "SPOOL_DIR": str(tmp_path / "spool"),
        },
        tmp_path / "collector.log",
    )
    broker.start()
    collector.start()
    try:
        collector.wait_for_log("subscribed")
    finally:
        collector.kill()
        broker.kill()


# ------------------------------------------------------------------ where a person looks


def test_the_last_line_names_every_variable_whatever_is_wrong() -> None:
    for count in range(1, len(WRONG) + 1):
        wrong = dict([*WRONG.items()][:count])
        problems = examine(wrong, "host").problems
        text = summary("forwarder-bigquery", problems)
        for problem in problems:
            assert problem.partition(":")[0] in text
        assert len(json.dumps(text)) < TAIL_BYTES - 150
    # The longest: nothing but names, and all of them.
    odd = [f"{name}: {'é' * 500}" for name in [*OURS, "SLUICE_ENV_FILE"]]
    assert len(json.dumps(summary("forwarder-bigquery", odd))) < TAIL_BYTES - 150
    assert all(name in summary("forwarder-bigquery", odd) for name in OURS)


@pytest.fixture
def supervised() -> Iterator[Path]:
    """The installed layout, with fifteen wrong settings."""
    with tempfile.TemporaryDirectory(prefix="sluice-") as name:
        root = Path(name)
        (root / "venv").symlink_to(sys.prefix)
        (root / "app").symlink_to(ROOT)
        for part in ("run", "log", "etc"):
            (root / part).mkdir()
        shutil.copy(ROOT / "supervisord.conf", root)
        lines = [f"{name}={value}\n" for name, value in wrong_settings().items()]
        (root / "etc" / "sluice.env").write_text("".join(lines))
        process = subprocess.Popen(
            [tool("supervisord"), "-n", "-s", "-c", root / "supervisord.conf"],
            env=clean_environment({}),
        )
        yield root
        process.terminate()
        assert process.wait(60) == 0


def wrong_settings() -> dict[str, str]:
    return {n: v for n, v in WRONG.items() if not n.startswith(("BIGQUERY", "PUBSUB", "GCP"))} | {
        "PUBSUB_ENABLED": "false",
        "BIGQUERY_ENABLED": "false",
    }


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def control(root: Path, *arguments: str) -> str:
    return subprocess.run(
        [tool("supervisorctl"), "-c", root / "supervisord.conf", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean_environment({}),
    ).stdout


@pytest.mark.timeout(180)
def test_supervisorctl_tail_shows_every_wrong_variable_once_the_program_is_given_up(
    supervised: Path,
) -> None:
    wait_until(
        lambda: "FATAL" in control(supervised, "status", "collector"),
        FATAL_TIMEOUT_S,
        "the collector is given up",
    )
    shown = control(supervised, "tail", "collector").rstrip("\n")
    assert len(shown.encode()) <= TAIL_BYTES
    last = json.loads(shown.splitlines()[-1])
    wrong = {n for n in wrong_settings() if not n.endswith("_ENABLED")}
    assert len(wrong) >= 15
    for name in wrong:
        assert name in last["message"]
    # And the command that it names shows the report from its first line on.
    command = re.search(r"supervisorctl (tail -\d+ collector)", last["message"])
    assert command
    whole = control(supervised, *command[1].split()).splitlines()
    reports = [line for line in whole if '"configuration 1/' in line]
    assert reports
    json.loads(reports[-1])
