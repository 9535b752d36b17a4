"""Damage on a disk that takes no mark: told in one line, exit 75, and nothing is set aside."""

import json
import sys
from pathlib import Path

import pytest

from spool import SinkState, SpoolWriter, confirmed, sink_path, spool_path
from spool.errors import CorruptFileError, StorageFaultError
from spool.setaside import set_aside
from tests.harness import Program
from tests.test_spool_recovery import PAYLOAD, ROWS, garble, pages_of_rows
from tests.test_spool_writer import look, new_reading
from tests.torture import storage_faults

SUSPECTED = ".suspected"
PROGRAMS = {"collector": ("collector",), "forwarder-pubsub": ("forwarder", "pubsub")}

needs_strace = pytest.mark.skipif(
    not storage_faults.available(), reason="strace cannot tamper with system calls here"
)


@pytest.fixture
def spool_dir(tmp_path: Path) -> Path:
    """Files that can be opened, and are damaged where each of the programs comes soon."""
    directory = tmp_path / "spool"
    directory.mkdir()
    writer = SpoolWriter.open(directory)
    writer.append([new_reading(n, payload=PAYLOAD) for n in range(ROWS)], [], {"spooled": ROWS})
    writer.set_meta("app_env", "LOCAL")
    writer.close()
    pages = pages_of_rows(spool_path(directory))
    garble(spool_path(directory), pages[len(pages) // 2])
    SinkState.open(directory, "pubsub").close()
    own = sink_path(directory, "pubsub")
    ((page,),) = look(own, "SELECT rootpage FROM sqlite_schema WHERE name = 'status'")
    garble(own, int(str(page)) - 1)
    return directory


def damaged_file(spool_dir: Path, role: str) -> Path:
    return spool_path(spool_dir) if role == "collector" else sink_path(spool_dir, "pubsub")


def ended(
    role: str, spool_dir: Path, tampering: str, path: Path
) -> tuple[int, list[dict[str, str]]]:
    """Run the program to its end, with calls on ``path`` that fail; return code and log."""
    log = spool_dir.with_name("log")
    log.unlink(missing_ok=True)
    prefix = (
        *("strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", f"{spool_dir}.strace"),
        *("-e", "signal=none", f"-P{path}", "-e", f"trace={tampering.partition(':')[0]}"),
        *("-e", f"inject={tampering}"),
    )
    variables = {"APP_ENV": "LOCAL", "SPOOL_DIR": str(spool_dir), "MQTT_PORT": "1"}
    command = (*prefix, sys.executable, "-m", *PROGRAMS[role])
    program = Program(role, command, variables, log)
    program.start()
    code = program.wait()
    assert "(INJECTED)" in Path(f"{spool_dir}.strace").read_text()
    return code, [json.loads(line) for line in log.read_text().splitlines()]


@needs_strace
@pytest.mark.parametrize("errno", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("role", PROGRAMS)
def test_a_mark_that_cannot_be_made_is_told_and_confirms_nothing(
    spool_dir: Path, role: str, errno: str
) -> None:
    path = damaged_file(spool_dir, role)
    mark = path.with_name(path.name + SUSPECTED)
    code, lines = ended(role, spool_dir, f"openat:error={errno}:when=2", mark)
    assert code == 75
    (last,) = [line["message"] for line in lines if line["severity"] == "CRITICAL"]
    assert "SQLITE_CORRUPT" in last, "the damage itself"
    assert f"to note that in {mark} failed: [Errno" in last
    assert f"df -h {spool_dir}" in last
    assert "\n" not in last
    assert list(spool_dir.glob("*.damaged-*")) == []
    assert not mark.exists()


@needs_strace
@pytest.mark.parametrize("role", PROGRAMS)
def test_a_damaged_file_that_cannot_be_moved_is_told_and_stays(spool_dir: Path, role: str) -> None:
    path = damaged_file(spool_dir, role)
    assert not confirmed(CorruptFileError("", path))
    code, lines = ended(role, spool_dir, "rename:error=EROFS", path)
    assert code == 75
    last = lines[-1]["message"]
    assert f"set aside {path} failed: [Errno 30]" in last
    assert "nothing is lost" in last
    assert path.exists()
    assert list(spool_dir.glob("*.damaged-*")) == []


def test_each_obstacle_is_an_error_of_the_spools(tmp_path: Path) -> None:
    path = sink_path(tmp_path, "pubsub")
    path.with_name(path.name + SUSPECTED).mkdir()
    with pytest.raises(StorageFaultError, match="the damage; to note that in"):
        confirmed(CorruptFileError("the damage", path))
    with pytest.raises(StorageFaultError, match=r"set aside .* failed"):
        set_aside(tmp_path / "no directory" / "spool.db")
