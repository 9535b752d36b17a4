"""gRPC goes by the proxy that HTTP goes by, however its variable is written."""

import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from urllib.request import getproxies_environment

import pytest
import requests

from lifecycle.proxies import proxies_for_grpc
from tests.harness import IMPATIENT, Rig
from tests.harness.programs import ROOT
from tests.harness.waiting import free_port
from tests.torture.google import HOSTS, earnest

PROXY = "http://10.0.0.1:3128"
OTHER = "http://10.0.0.2:3128"
SECRET = "pr0xy-s3cret"  # noqa: S105 - made for this test
READINGS = 200


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"HTTPS_PROXY": PROXY}, {"grpc_proxy": PROXY}),
        ({"https_proxy": PROXY}, {"grpc_proxy": PROXY}),
        ({"https_proxy": PROXY, "HTTPS_PROXY": OTHER}, {"grpc_proxy": PROXY}),
        ({"https_proxy": "", "HTTPS_PROXY": OTHER}, {}),
        ({"ALL_PROXY": PROXY}, {"grpc_proxy": PROXY}),
        ({"HTTPS_PROXY": PROXY, "all_proxy": OTHER}, {"grpc_proxy": PROXY}),
        ({"HTTP_PROXY": PROXY}, {}),
        ({"http_proxy": PROXY, "HTTPS_PROXY": OTHER}, {"grpc_proxy": OTHER}),
        ({"HTTPS_PROXY": PROXY, "grpc_proxy": OTHER}, {}),
        ({"HTTPS_PROXY": "10.0.0.1:3128"}, {"grpc_proxy": PROXY}),
        ({"HTTPS_PROXY": "proxy.corp"}, {"grpc_proxy": "http://proxy.corp:80"}),
        ({"HTTPS_PROXY": "http://[::1]/"}, {"grpc_proxy": "http://[::1]:80"}),
        ({"HTTPS_PROXY": "HTTP://u:p%40@h:1/"}, {"grpc_proxy": "http://u:p%40@h:1"}),
        ({"NO_PROXY": "a.b"}, {"no_grpc_proxy": "a.b"}),
        (
            {"HTTPS_PROXY": PROXY, "NO_PROXY": "a.b, .c:443,127.0.0.0/8"},
            {"grpc_proxy": PROXY, "no_grpc_proxy": "a.b,.c,127.0.0.0/8"},
        ),
        ({"no_proxy": "a", "NO_PROXY": "b"}, {"no_grpc_proxy": "a"}),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "*"}, {"grpc_proxy": "", "no_grpc_proxy": ""}),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "b", "no_grpc_proxy": "c"}, {"grpc_proxy": PROXY}),
    ],
)
def test_grpc_is_told_what_requests_makes_of_it(
    environ: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    assert proxies_for_grpc(environ) == (expected, [])


@pytest.mark.parametrize("lower", [None, "", PROXY])
@pytest.mark.parametrize("upper", [None, "", OTHER])
@pytest.mark.parametrize("all_proxy", [None, "http://10.0.0.3:1"])
def test_requests_chooses_the_same(
    lower: str | None, upper: str | None, all_proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"https_proxy": lower, "HTTPS_PROXY": upper, "ALL_PROXY": all_proxy}
    environ = {name: value for name, value in given.items() if value is not None}
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    chosen = requests.utils.select_proxy("https://h/", getproxies_environment())
    assert proxies_for_grpc(environ)[0].get("grpc_proxy") == chosen


@pytest.mark.parametrize("scheme", ["socks5", "https"])
def test_a_proxy_that_grpc_does_not_speak_is_told(scheme: str) -> None:
    added, (problem,) = proxies_for_grpc({"HTTPS_PROXY": f"{scheme}://u:{SECRET}@h:1"})
    assert added == {"grpc_proxy": ""}
    assert "HTTPS_PROXY" in problem
    assert SECRET not in problem


@pytest.mark.parametrize(
    "place", ["http://u:{}#@h:1", "http://u:1/{}@h", "u_x:{}@h:port", "http://"]
)
def test_a_proxy_that_is_none_is_ignored_and_not_quoted(place: str) -> None:
    added, (problem,) = proxies_for_grpc({"HTTPS_PROXY": place.format(SECRET), "https_proxy_": ""})
    assert added == {"HTTPS_PROXY": "", "grpc_proxy": ""}
    assert "is ignored" in problem
    assert SECRET not in problem


def test_the_proxy_may_stand_in_the_environment_file_and_is_set_before_grpc_is_there(
    tmp_path: Path,
) -> None:
    file = tmp_path / "env"
    file.write_text(f"HTTPS_PROXY={PROXY}\nNO_PROXY=a.b\n", encoding="ascii")
    script = (
        "import os, sys\nfrom lifecycle import Program, run\n"
        "def body(settings, stop):\n"
        "    assert 'grpc' not in sys.modules\n"
        "    print(os.environ['grpc_proxy'], os.environ['no_grpc_proxy'])\n"
        "sys.exit(run(Program('test', body, {}), os.environ))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={
            "PATH": "",
            "SLUICE_ENV_FILE": str(file),
            "APP_ENV": "LOCAL",
            "SPOOL_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{PROXY} a.b" in done.stdout


@pytest.mark.parametrize("method", ["storage", "insert_all"])
def test_everything_goes_by_https_proxy_in_upper_case_and_its_password_is_nowhere(
    method: str, tmp_path: Path
) -> None:
    with earnest(tmp_path, method) as system:
        rig, gate = system.rig, system.gate
        proxy = gate.url.replace("http://", f"http://gate:{SECRET}%40@")
        for program in rig.programs.values():
            program.environment["HTTPS_PROXY"] = proxy
            program.environment["NO_PROXY"] = "localhost,127.0.0.1"
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
        used = set(HOSTS) if method == "storage" else {*HOSTS[:2]}
        assert set(gate.accepted) == used
        pair = b64encode(f"gate:{SECRET}@".encode())
        assert all(pair in head for head in gate.asked)
        for name, text in rig.logs():
            assert SECRET not in text, name
            assert pair.decode() not in text, name


def test_emulators_are_never_asked_by_the_proxy() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with Rig(forwarder=IMPATIENT, HTTPS_PROXY=nowhere, https_proxy=nowhere) as rig:
        rig.start()
        rig.publish(READINGS)
        rig.wait_until_delivered()
        rig.assert_nothing_lost()
