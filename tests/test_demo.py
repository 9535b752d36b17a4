"""The demo adds up, says so when it does not, and leaves nothing running."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from demo.broker import running_broker
from demo.layout import Layout
from demo.ledger import Figures, SinkFigures, read_figures
from demo.simulator import READINGS_PER_S, SITES, TAGS, Plant, Published, Simulator
from demo.summary import reconcile, summary_lines
from demo.view import header, live_line
from lifecycle import VERSION

ROOT = Path(__file__).parent.parent
INSTALL_TIMEOUT_S = 280
DEMO_TIMEOUT_S = 100
AS_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")
NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: a Unix socket's path is limited."""
    with tempfile.TemporaryDirectory(prefix="sluice-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def demo(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """The demo itself, without an end, on the environment that runs the tests."""
    (directory / "venv").symlink_to(sys.prefix)
    process = subprocess.Popen(
        [sys.executable, "-m", "demo", "--dir", str(directory)],
        cwd=ROOT,
        env=os.environ | {"APP_ENV": "PRD", "SPOOL_DIR": "/nowhere"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    # pytest shows both, if the test has failed.
    sys.stdout.write(process.communicate(timeout=DEMO_TIMEOUT_S)[0] or "")
    for log in sorted((directory / "log").glob("*")):
        sys.stdout.write(f"--- {log}\n{log.read_text(errors='replace')[-3000:]}\n")
    wait_for(lambda: not running_below(directory))


def wait_for(condition: Callable[[], bool], timeout_s: float = 40) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def running_below(directory: Path) -> dict[int, str]:
    """Return the processes that have to do with ``directory``: pid and command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{directory}/" in command.replace("\0", "/"):
                found[int(entry.name)] = command.replace("\0", " ")
    return found


def pid_of(directory: Path, words: str) -> int:
    (pid,) = [pid for pid, command in running_below(directory).items() if words in command]
    return pid


def wait_for_readings(directory: Path, count: int) -> None:
    wait_for(lambda: read_figures(directory / "spool").spooled >= count)


def assert_adds_up(output: str) -> None:
    """Check the summary's own arithmetic, and that it is not about nothing."""
    assert "It adds up" in output, output
    numbers = re.search(r"spooled \+ rejected \+ duplicates +(\d+)(?: \+ \d+)? = (\d+)", output)
    assert numbers, output
    assert int(numbers[1]) > READINGS_PER_S
    assert int(numbers[2]) > READINGS_PER_S


def assert_fits_80_columns(output: str) -> None:
    # A path may be longer: it is the reader's own.
    too_long = [line for line in output.splitlines() if len(line) > 80 and "/" not in line]
    assert not too_long


# ------------------------------------------------------------------- as it is typed


@pytest.mark.timeout(INSTALL_TIMEOUT_S + 20)
def test_install_sh_demo_adds_up_and_leaves_nothing_running(directory: Path) -> None:
    result = subprocess.run(
        [ROOT / "install.sh", "--demo", "--seconds", "5", "--dir", directory / "d"],
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert_adds_up(result.stdout)
    assert_fits_80_columns(result.stdout)
    for program in ("collector", "forwarder-pubsub", "forwarder-bigquery"):
        assert re.search(rf"^{program} +RUNNING ", result.stdout, re.MULTILINE)
    live = r"^ +\d+ s +\d+ +\d+ +\d+ +\d+ +\d+ +\d+$"
    assert len(re.findall(live, result.stdout, re.MULTILINE)) >= 4
    assert running_below(directory) == {}


@as_root
@pytest.mark.timeout(INSTALL_TIMEOUT_S + 20)
def test_an_unprivileged_user_can_run_the_demo_with_a_broker_from_pypi(directory: Path) -> None:
    # A copy, since the checkout may lie where only root can look.
    source = directory / "source"
    ignored = shutil.ignore_patterns(".*", "tests", "demo-data", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    home = directory / "home"
    home.mkdir()
    shutil.chown(home, "nobody", "nogroup")
    directory.chmod(0o755)
    result = subprocess.run(
        [*AS_NOBODY, f"{source}/install.sh", "--demo", "--broker", "amqtt", "--seconds", "3"],
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "amqtt on port" in result.stdout
    assert_adds_up(result.stdout)
    assert (home / "demo-data" / "spool" / "spool.db").exists()
    assert running_below(directory) == {}


def test_the_closing_hint_works_as_printed_without_sqlite3_and_fits_80_columns(
    directory: Path,
) -> None:
    odd = directory / "my $demo (1)"
    odd.mkdir()
    (odd / "venv").symlink_to(sys.prefix)
    result = subprocess.run(
        [sys.executable, "-m", "demo", "--dir", str(odd), "--seconds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith(f"Sluice {VERSION}; mosquitto on port ")
    hint = result.stdout.partition("Look for yourself:\n")[2].rpartition("\n\n")[0]
    assert all(len(line) <= 80 for line in hint.splitlines() if "cd " not in line)
    nowhere = directory / "bin"
    nowhere.mkdir()
    shown = subprocess.run(
        ["/bin/sh", "-euc", hint],
        env={"PATH": str(nowhere), "HOME": "/"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in ("pubsub", "bigquery", "logged", "reason", "last_topic"):
        assert word in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def without_mosquitto(
    directory: Path, *arguments: str, tools: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run the demo where Mosquitto is not installed, there is no network, and TMPDIR is its own."""
    for name in ("bin", "tmp"):
        (directory / name).mkdir()
    for name, script in tools.items():
        (directory / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / "bin" / name).chmod(0o755)
    return subprocess.run(
        [
            *("unshare", "--mount", "--net", "sh", "-ec"),
            'mount -t tmpfs none /usr/sbin; exec "$@"',
            *("sh", str(ROOT / "install.sh"), "--demo", "--dir", str(directory / "demo")),
            *arguments,
        ],
        env={
            "PATH": f"{directory / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "PYTHON": sys.executable,
            "TMPDIR": str(directory / "tmp"),
            "PIP_RETRIES": "0",
            "PIP_NO_CACHE_DIR": "1",
        },
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )


@as_root
def test_a_broker_that_is_not_there_is_told_before_the_environment_is_built(
    directory: Path,
) -> None:
    tools = {"apt-get": "exit 100", "dpkg-query": "exit 1"}
    result = without_mosquitto(directory, "--broker", "mosquitto", tools=tools)
    assert result.returncode == 1
    assert "--broker mosquitto: Mosquitto is not installed" in result.stderr
    assert "sudo apt-get install mosquitto" in result.stderr
    assert "Python packages" not in result.stdout
    assert not (directory / "demo" / "venvs").exists()


@as_root
@pytest.mark.parametrize("apt", ["exit 100", "exit 0"])
def test_roots_demo_leaves_no_temporary_file_behind(directory: Path, apt: str) -> None:
    # It tries to install Mosquitto, gets none, and goes on with the other broker, for which it
    # needs the network.
    tools = {"apt-get": f"echo called >> {directory}/called; {apt}", "dpkg-query": "exit 1"}
    result = without_mosquitto(directory, tools=tools)
    assert (directory / "called").exists()
    assert "pip cannot install requirements-demo.lock" in result.stderr
    assert [path.name for path in (directory / "tmp").iterdir()] == []


# ------------------------------------------------------------------ what people do to it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_demo_with_its_summary(
    demo: "subprocess.Popen[str]", directory: Path, number: signal.Signals
) -> None:
    wait_for_readings(directory, 150)
    demo.send_signal(number)
    output, _ = demo.communicate(timeout=DEMO_TIMEOUT_S)
    assert demo.returncode == 0, output
    assert_adds_up(output)
    assert running_below(directory) == {}


def test_it_adds_up_although_collector_and_forwarder_are_killed(
    demo: "subprocess.Popen[str]", directory: Path
) -> None:
    for words in ("-m collector", "-m forwarder pubsub", "-m collector"):
        before = read_figures(directory / "spool").spooled
        wait_for_readings(directory, before + 100)
        os.kill(pid_of(directory, words), signal.SIGKILL)
    before = read_figures(directory / "spool").spooled
    wait_for_readings(directory, before + 100)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=DEMO_TIMEOUT_S)
    assert demo.returncode == 0, output
    assert_adds_up(output)


def test_a_killed_supervisord_fails_the_demo_and_its_orphans_are_not_left_running(
    demo: "subprocess.Popen[str]", directory: Path
) -> None:
    wait_for_readings(directory, 10)
    os.kill(int((directory / "run" / "supervisord.pid").read_text()), signal.SIGKILL)
    output, _ = demo.communicate(timeout=DEMO_TIMEOUT_S)
    assert demo.returncode == 1, output
    assert "supervisord ended with code -9" in output
    assert running_below(directory) == {}


def test_nothing_is_left_running_when_the_demo_itself_is_killed(
    demo: "subprocess.Popen[str]", directory: Path
) -> None:
    wait_for_readings(directory, 10)
    assert len(running_below(directory)) >= 6
    demo.kill()
    wait_for(lambda: running_below(directory) == {})


def test_a_lost_row_makes_the_demo_fail(demo: "subprocess.Popen[str]", directory: Path) -> None:
    """Even though the forwarder notices the hole and counts it as dropped."""
    wait_for_readings(directory, 50)
    pid = pid_of(directory, "-m forwarder bigquery")
    os.kill(pid, signal.SIGSTOP)
    # Further on than what it may have in hand.
    wait_for_readings(directory, read_figures(directory / "spool").spooled + 100)
    with sqlite3.connect(directory / "spool" / "spool.db", timeout=10) as spool:
        spool.execute("DELETE FROM reading_row WHERE seq = (SELECT max(seq) FROM reading_row)")
    os.kill(pid, signal.SIGCONT)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=DEMO_TIMEOUT_S)
    assert demo.returncode == 1, output
    assert "IT DOES NOT ADD UP" in output
    assert re.search(r"WRONG +bigquery: spooled = ", output)


def test_a_path_too_long_for_a_socket_is_refused_before_anything_starts(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "demo", "--dir", str(tmp_path / ("long" * 20))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 1
    assert "too long for a Unix socket" in result.stdout


# ----------------------------------------------------------------------- its parts


GOOD = Figures(
    received=105,
    spooled=100,
    duplicates=3,
    rejected=2,
    sinks=(SinkFigures("pubsub", 100), SinkFigures("bigquery", 90, pending=10)),
)
PUBLISHED = Published(good=100, repeated=3, faulty=2)


def holds(published: Published, figures: Figures) -> bool:
    return all(check.holds for check in reconcile(published, figures))


def test_what_agrees_adds_up() -> None:
    assert holds(PUBLISHED, GOOD)
    assert max(map(len, summary_lines(reconcile(PUBLISHED, GOOD)))) <= 80


@pytest.mark.parametrize(
    "figures",
    [
        replace(GOOD, received=104, spooled=99),  # lost before the spool
        replace(GOOD, spooled=99, duplicates=4),  # lost, and hidden behind a duplicate
        replace(GOOD, spooled=101, duplicates=2),  # stored twice
        replace(GOOD, rejected=1, duplicates=4),  # not told that it was wrong
        replace(GOOD, sinks=(SinkFigures("pubsub", 99),)),  # lost before the sink
        replace(GOOD, sinks=(SinkFigures("pubsub", 100, pending=1),)),  # counted twice
        replace(GOOD, sinks=(SinkFigures("pubsub", 99, dropped=1),)),  # lost, and owned up to
        Figures(0, 0, 0, 0, ()),
    ],
)
def test_what_does_not_agree_is_found(figures: Figures) -> None:
    assert not holds(PUBLISHED, figures)


def test_what_the_broker_sends_again_after_a_crash_is_no_fault() -> None:
    assert holds(PUBLISHED, replace(GOOD, received=107, duplicates=4, rejected=3))


def test_a_reading_that_was_never_acknowledged_may_have_arrived_or_not() -> None:
    in_doubt = replace(PUBLISHED, unacked=1)
    assert holds(in_doubt, GOOD)
    sinks = (SinkFigures("pubsub", 101),)
    assert holds(in_doubt, replace(GOOD, received=106, spooled=101, sinks=sinks))
    assert not holds(in_doubt, replace(GOOD, received=104, spooled=99))


def test_the_live_line_fits_80_columns_with_large_numbers() -> None:
    sinks = tuple(SinkFigures(name, 99_999_999, pending=99_999_999) for name in "ab")
    figures = Figures(99_999_999, 99_999_999, 0, 0, sinks)
    line = live_line(86_400, figures)
    assert {len(line), *map(len, header().splitlines()[1:])} == {76}


def test_the_plant_covers_every_site_and_tag_and_repeats_byte_for_byte() -> None:
    plant = Plant(seed=1)
    messages = [plant.next_message(NOW) for _ in range(2_000)]
    assert len({message.topic for message in messages}) == len(SITES) * len(TAGS)
    repeated = [n for n, message in enumerate(messages) if message.kind == "repeated"]
    assert len(repeated) == 10
    assert all(messages[n][1:] == messages[n - 1][1:] for n in repeated)
    assert sum(message.kind == "faulty" for message in messages) == 7


def test_publishing_and_acknowledgements_do_not_lock_each_other_out(directory: Path) -> None:
    layout = Layout(directory)
    layout.prepare()
    with running_broker("mosquitto", layout) as broker:
        # Far above what goes through, so publish() and acknowledgements meet all the time;
        # not more, or seconds of unacknowledged ones pile up, which is not the claim.
        simulator = Simulator("127.0.0.1", broker.port, rate=20_000)
        simulator.connect()
        simulator.start()
        wait_for(lambda: simulator.published().total > 10_000)
        simulator.stop(60)
    assert simulator.published().unacked == 0


def test_the_ledger_shows_zeros_before_there_is_a_spool(tmp_path: Path) -> None:
    figures = read_figures(tmp_path)
    assert figures == Figures(0, 0, 0, 0, (SinkFigures("pubsub"), SinkFigures("bigquery")))


def test_the_demo_starts_afresh_but_keeps_its_environment(directory: Path) -> None:
    layout = Layout(directory)
    layout.prepare()
    (directory / "venv").mkdir()
    (layout.spool / "spool.db").touch()
    layout.prepare()
    assert (directory / "venv").is_dir()
    assert not (layout.spool / "spool.db").exists()
