"""Another apt at work: install.sh and the tests' own installer wait for each of its locks."""

import re
from collections.abc import Iterator

import pytest

from tests.harness import wait_until
from tests.harness.throwaway_root import CHECKOUT, INSTALL, ThrowawayRoot, needs_throwaway_root

pytestmark = needs_throwaway_root()

LISTS = "/var/lib/apt/lists/lock"
ARCHIVES = "/var/cache/apt/archives/lock"
DPKG = "/var/lib/dpkg/lock-frontend"
SOON_S = 30.0

HOLD = """
import fcntl, pathlib, sys, time
with open(sys.argv[1], "w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    pathlib.Path("/run/held").touch()
    while not pathlib.Path("/run/let-go").exists():
        time.sleep(0.05)
"""

# Debian's own sqlite3 as a package in a repository of files: the root has no network.
REPOSITORY = r"""
set -e
mkdir -p /srv/repository/sqlite3/DEBIAN
cd /srv/repository
dpkg -L sqlite3 | while read -r file; do
  [ ! -f "$file" ] || install -D "$file" "sqlite3$file"
done
dpkg -s sqlite3 | sed '/^Status:/d' > sqlite3/DEBIAN/control
dpkg-deb --build -Znone sqlite3 >/dev/null
rm -r sqlite3
{ cat <<END
$(dpkg-deb -f sqlite3.deb)
Filename: ./sqlite3.deb
Size: $(stat -c %s sqlite3.deb)
SHA256: $(sha256sum < sqlite3.deb | cut -d ' ' -f 1)
END
} > Packages
rm -f /etc/apt/sources.list.d/*
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[ThrowawayRoot]:
    with ThrowawayRoot() as root:
        root.check("bash", "-c", REPOSITORY)
        # install.sh ends behind its packages.
        root.write("/etc/sluice/sluice.env", "APP_ENV=NONE\n")
        yield root


@pytest.fixture
def root(shared: ThrowawayRoot) -> ThrowawayRoot:
    """A machine without sqlite3, whose repository has it."""
    shared.check("rm", "-f", "/run/held", "/run/let-go", "/run/install.log")
    shared.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/repository ./\n")
    shared.check("dpkg", "--force-all", "-r", "sqlite3")
    assert shared.run("sqlite3", "--version").returncode != 0
    return shared


def test_install_sh_waits_for_the_lists_and_names_who_has_them(root: ThrowawayRoot) -> None:
    root.start("python3", "-c", HOLD, LISTS)
    wait_until(root.path("/run/held").exists, SOON_S, "the lock is held")
    installing = root.start(INSTALL, log="/run/install.log")
    waits = re.compile(rf"apt is in use \(process \d+ \(python3\) has {LISTS}\): waiting")
    wait_until(
        lambda: waits.search(root.read("/run/install.log")) or installing.poll() is not None,
        SOON_S,
        "it waits",
    )
    assert installing.poll() is None, root.read("/run/install.log")
    root.write("/run/let-go", "")
    assert installing.wait(SOON_S) == 1
    said = root.read("/run/install.log")
    assert "APP_ENV: 'NONE' is wrong" in said
    assert said.count("apt is in use") == 1
    assert root.run("sqlite3", "--version").returncode == 0


@pytest.mark.parametrize("lock", [ARCHIVES, DPKG])
def test_the_other_locks_are_waited_for_too(lock: str, root: ThrowawayRoot) -> None:
    root.start("python3", "-c", HOLD, lock)
    wait_until(root.path("/run/held").exists, SOON_S, "the lock is held")
    script = f". {CHECKOUT}/deploy/apt.sh; apt_get /run/apt.log install -y sqlite3"
    installing = root.start("bash", "-euc", script, log="/run/install.log")
    wait_until(lambda: f"has {lock})" in root.read("/run/install.log"), SOON_S, "it waits")
    assert installing.poll() is None
    root.write("/run/let-go", "")
    assert installing.wait(SOON_S) == 0
    assert root.run("sqlite3", "--version").returncode == 0


def test_the_tests_own_installer_waits_too(root: ThrowawayRoot) -> None:
    root.start("python3", "-c", HOLD, LISTS)
    wait_until(root.path("/run/held").exists, SOON_S, "the lock is held")
    script = f"cd {CHECKOUT} && . tests/environment.sh && install_packages die sqlite3"
    installing = root.start("bash", "-euc", script, log="/run/install.log")
    wait_until(lambda: "apt is in use" in root.read("/run/install.log"), SOON_S, "it waits")
    assert installing.poll() is None
    root.write("/run/let-go", "")
    assert installing.wait(SOON_S) == 0
    assert root.run("sqlite3", "--version").returncode == 0


def test_it_gives_up_in_the_end_and_says_whom_it_waited_for(root: ThrowawayRoot) -> None:
    holder = root.start("python3", "-c", HOLD, LISTS)
    wait_until(root.path("/run/held").exists, SOON_S, "the lock is held")
    script = f". {CHECKOUT}/deploy/apt.sh; APT_WAIT_S=1; apt_get /run/apt.log update"
    assert root.run("bash", "-euc", script).returncode == 1
    root.write("/run/let-go", "")
    holder.wait(SOON_S)
    assert re.search(
        rf"waited 1 s for it: process \d+ \(python3\) has {LISTS}", root.read("/run/apt.log")
    )


def test_another_failure_is_not_waited_for(root: ThrowawayRoot) -> None:
    root.write("/etc/apt/sources.list", "deb [trusted=yes] file:/srv/nothing ./\n")
    result = root.run(INSTALL)
    assert result.returncode == 1
    assert "apt-get update failed" in result.stderr
    assert "apt is in use" not in result.stderr
