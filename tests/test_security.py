"""What is closed to others stays closed, and a secret is where it was put and nowhere else."""

import configparser
import grp
import os
import pwd
import re
import resource
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from lifecycle import load_settings
from tests.harness import COLLECTOR, FORWARDERS, PROGRAMS, Program, Rig, Supervisor, wait_until
from tests.harness.programs import ROOT
from tests.test_torture_keys import SOON_S
from tests.torture.google import Earnest, earnest
from tests.torture.tls_gate import Authority
from tests.torture.token_server import TOKEN, Mood

PASSWORD = "s3cret-of-the-broker"  # noqa: S105 - made for this test
READINGS = 50
STRANGER = "nobody"
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")


# --- files and sockets --------------------------------------------------------------------


@pytest.fixture(scope="module")
def supervised() -> Iterator[tuple[Rig, Supervisor]]:
    """A system as installed, which has delivered something."""
    with Rig() as rig:
        rig.broker.start()
        supervisor = Supervisor(rig)
        with supervisor.supervising():
            rig.publish(READINGS)
            rig.wait_until_delivered()
            yield rig, supervisor


def assert_closed(directory: Path, files: set[str]) -> None:
    """Check that others can do nothing with any of the files, and the group only read."""
    assert stat.S_IMODE(directory.stat().st_mode) == 0o2750
    found = {path.name for path in directory.iterdir()}
    assert found >= files
    for path in directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path.name
        assert path.stat().st_gid == directory.stat().st_gid, path.name


SPOOL_FILES = {
    *(f"{name}.db{suffix}" for name in ("spool", "pubsub", "bigquery") for suffix in ("", "-wal")),
    *(f"{name}.lock" for name in PROGRAMS),
    "ballast",
}


def test_the_spool_is_closed_to_others(supervised: tuple[Rig, Supervisor]) -> None:
    assert_closed(supervised[0].spool_dir, SPOOL_FILES)


def test_a_spool_that_was_damaged_and_the_new_one_are_closed_to_others() -> None:
    with Rig(APP_ENV="LOCAL") as rig:
        rig.start(COLLECTOR)
        rig.publish(READINGS)
        rig.wait_until_spooled()
        rig.programs[COLLECTOR].kill()
        (rig.spool_dir / "spool.db").write_bytes(b"no database" * 1_000)
        (rig.spool_dir / "spool.db-wal").unlink()
        rig.start(COLLECTOR)
        names = {path.name for path in rig.spool_dir.iterdir()}
        assert any("damaged" in name for name in names)
        assert_closed(rig.spool_dir, {"spool.db"})


@as_root
def test_a_stranger_reads_nothing_and_reaches_no_socket(
    supervised: tuple[Rig, Supervisor],
) -> None:
    rig, _ = supervised
    socket = rig.directory / "run" / "supervisor.sock"
    mode = socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o770
    script = (
        "import os, socket, sys\n"
        "for attempt in (\n"
        "    lambda: os.listdir(sys.argv[1]),\n"
        "    lambda: open(sys.argv[1] + '/spool.db').close(),\n"
        "    lambda: socket.socket(socket.AF_UNIX).connect(sys.argv[2]),\n"
        "):\n"
        "    try:\n"
        "        attempt()\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
        "    else:\n"
        "        print('let in')\n"
    )
    stranger = pwd.getpwnam(STRANGER)
    others = next(g.gr_gid for g in grp.getgrall() if g.gr_gid not in (0, stranger.pw_gid))
    command = ["setpriv", f"--reuid={stranger.pw_uid}", f"--regid={others}", "--clear-groups", "--"]
    result = subprocess.run(
        [*command, "/usr/bin/python3", "-c", script, str(rig.spool_dir), str(socket)],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert result.stdout.split("\n")[:3] == ["refused"] * 3


# --- secrets ------------------------------------------------------------------------------


@pytest.fixture
def talkative(tmp_path: Path) -> Iterator[Earnest]:
    """A system that logs all it can, with a password for its broker and a key for Google."""
    secret = tmp_path / "secret"
    secret.write_text(f"{PASSWORD}\n", encoding="ascii")
    secret.chmod(0o600)
    with earnest(
        tmp_path, LOG_LEVEL="DEBUG", MQTT_USERNAME="gate", MQTT_PASSWORD_FILE=str(secret)
    ) as system:
        yield system


def secrets(system: Earnest) -> list[str]:
    """Return everything that must not be seen, and pieces of it."""
    body = system.private_key.split("-----")[2]
    lines = [line for line in body.split("\n") if len(line) > 20]
    signatures = [assertion.rpartition(".")[2] for assertion in system.tokens.assertions]
    return [PASSWORD, TOKEN, *lines, *signatures]


def assert_unseen(system: Earnest) -> None:
    """Check logs, command lines and environments; and the operator's own tables."""
    texts = {}
    for name in PROGRAMS:
        program = system.rig.programs[name]
        texts[f"log of {name}"] = program.log.read_text(errors="replace")
        if program.running:
            for file in ("cmdline", "environ"):
                path = Path(f"/proc/{program.pid}/{file}")
                texts[f"{file} of {name}"] = path.read_bytes().decode(errors="replace")
    for sink in system.rig.sinks:
        texts[f"backlog of {sink}"] = str(system.rig.books.backlog(sink))
    for secret in secrets(system):
        for where, text in texts.items():
            assert secret not in text, f"a secret in the {where}"


def test_no_secret_in_logs_command_lines_or_tables(talkative: Earnest) -> None:
    system = talkative
    system.rig.start()
    system.rig.publish(READINGS)
    system.rig.wait_until_delivered()
    assert system.tokens.assertions, "the key was used"
    assert_unseen(system)


def test_no_secret_in_what_is_said_of_a_refused_key(talkative: Earnest) -> None:
    system = talkative
    system.tokens.mood = Mood.REVOKED
    system.rig.start()
    system.rig.publish(READINGS)
    for sink in system.rig.sinks:
        wait_until(
            lambda sink=sink: system.rig.books.backlog(sink)["state"] == "on hold",  # type: ignore[misc]
            SOON_S,
            f"{sink} is on hold",
        )
    assert_unseen(system)


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "another key",
        "no json",
        "not utf-8",
    ],
)
def test_no_secret_in_what_is_said_of_a_broken_key_file(talkative: Earnest, damage: str) -> None:
    system = talkative
    text = system.key_file.read_text()
    broken = {
        "truncated": text[: len(text) // 2],
        "another key": text.replace(system.private_key.split("\n")[3], "AAAA"),
        "no json": system.private_key,
        "not utf-8": text.replace("BEGIN", "\udcff"),
    }[damage]
    system.key_file.write_text(broken, encoding="utf-8", errors="surrogateescape")
    system.rig.start()
    system.rig.publish(READINGS)
    system.rig.wait_until_spooled()
    for sink in system.rig.sinks:
        wait_until(
            lambda sink=sink: system.rig.books.backlog(sink)["state"] in {"on hold", "retrying"},  # type: ignore[misc]
            SOON_S,
            f"{sink} says what is wrong",
        )
    assert all(system.rig.programs[name].running for name in PROGRAMS)
    assert_unseen(system)


def test_no_secret_in_the_last_words_of_a_process_that_dies(talkative: Earnest) -> None:
    system = talkative
    system.rig.start()
    system.rig.publish(READINGS)
    system.rig.wait_until_delivered()
    for name in PROGRAMS:
        program = system.rig.programs[name]
        program.signal(signal.SIGABRT)
        assert program.wait() == -signal.SIGABRT
    assert_unseen(system)


def test_a_traceback_shows_no_value_of_a_setting(tmp_path: Path) -> None:
    """The settings hold no secret at all, only where one lies; so nothing can print one."""
    file = tmp_path / "secret"
    file.write_text(PASSWORD, encoding="ascii")
    settings = load_settings(
        {
            "APP_ENV": "LOCAL",
            "MQTT_USERNAME": "gate",
            "MQTT_PASSWORD_FILE": str(file),
            "SPOOL_DIR": str(tmp_path),
        },
        "host",
    )
    assert PASSWORD not in repr(settings)
    assert str(file) in repr(settings)


def test_no_process_leaves_a_core_file(supervised: tuple[Rig, Supervisor]) -> None:
    rig, supervisor = supervised
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    assert (soft, hard) != (0, 0), "or this test would say nothing"
    for name, pid in supervisor.pids().items():
        limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
        (line,) = re.findall(r"^Max core file size +(\S+) +(\S+)", limits, re.MULTILINE)
        assert line == ("0", "0"), name
    assert rig.spool_dir.exists()


# --- TLS with the broker ------------------------------------------------------------------


@pytest.mark.parametrize("days_old", [0, 3])
def test_a_brokers_expired_certificate_is_refused(tmp_path: Path, days_old: int) -> None:
    tmp_path.chmod(0o755)
    authority = Authority(tmp_path)
    certificate, key = authority.issue("broker", "127.0.0.1", age=timedelta(days=days_old))
    options: dict[str, str | None] = {
        "cafile": str(authority.certificate),
        "certfile": str(certificate),
        "keyfile": str(key),
    }
    with Rig(APP_ENV="LOCAL", broker_options=options) as rig:
        collector = rig.programs[COLLECTOR]
        collector.environment["MQTT_TLS_CA_FILE"] = str(authority.certificate)
        rig.broker.start()
        collector.start()
        if days_old:
            collector.wait_for_log("certificate has expired")
            assert '"connected"' not in collector.log_text
        else:
            collector.wait_for_log('"message": "connected"')


# --- privileges ---------------------------------------------------------------------------


def test_an_installation_runs_without_privileges() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read(ROOT / "deploy" / "sluice.service")
    service = unit["Service"]
    assert service["User"] == service["Group"] == "sluice"
    assert service["NoNewPrivileges"] == "true"
    assert service["CapabilityBoundingSet"] == ""
    assert "AmbientCapabilities" not in service
    assert service["ProtectSystem"] == "strict"
    assert service["UMask"] == "0027"
    supervisor = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(" ;",))
    supervisor.read(ROOT / "supervisord.conf")
    assert not any("user" in supervisor[section] for section in supervisor.sections())
    assert supervisor["unix_http_server"]["chmod"] == "0770"
    assert "inet_http_server" not in supervisor, "nobody controls it over the network"
    for name in (COLLECTOR, *FORWARDERS):
        assert supervisor[f"program:{name}"]["umask"] == "027"


@as_root
def test_a_collector_of_an_unprivileged_user_has_no_capability() -> None:
    # The checkout may lie where only root can look, so it is shown at another place, to this
    # process alone.
    with tempfile.TemporaryDirectory(prefix="sluice-") as readable, Rig(APP_ENV="LOCAL") as rig:
        Path(readable).chmod(0o755)
        checkout = Path(readable) / "checkout"
        checkout.mkdir()
        owner = pwd.getpwnam(STRANGER)
        os.chown(rig.spool_dir, owner.pw_uid, owner.pw_gid)
        rig.spool_dir.chmod(0o2750)
        collector = rig.programs[COLLECTOR]
        show = 'mount --bind "$0" "$1" && cd "$1" && shift && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", show, str(ROOT), str(checkout)]
        command += ["setpriv", f"--reuid={STRANGER}", f"--regid={owner.pw_gid}", "--clear-groups"]
        command += ["--no-new-privs", "--bounding-set=-all", "--"]
        subprocess.run([*command, "/usr/bin/env", "true"], check=True)
        python = sys.executable.replace(f"{ROOT}/", f"{checkout}/", 1)
        rig.programs[COLLECTOR] = Program(
            COLLECTOR, [*command, python, "-m", "collector"], collector.environment, collector.log
        )
        rig.start(COLLECTOR)
        rig.publish(READINGS)
        rig.wait_until_spooled()
        status = Path(f"/proc/{rig.programs[COLLECTOR].pid}/status").read_text(encoding="ascii")
        for line in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"):
            assert line in status
        assert_closed(rig.spool_dir, {"spool.db"})
