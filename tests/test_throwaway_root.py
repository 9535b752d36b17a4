"""The throw-away root itself: it is a Debian of its own, and leaves nothing behind."""

from pathlib import Path

import pytest

from tests.harness.throwaway_root import INSTALL, ThrowawayRoot, needs_throwaway_root

pytestmark = needs_throwaway_root()


def test_it_has_the_machines_packages_and_writes_nothing_to_the_machine() -> None:
    with ThrowawayRoot(environment=False) as root:
        assert "install ok installed" in root.check("dpkg-query", "-W", "-f=${Status}", "procps")
        root.write("/etc/sluice/here", "x")
        assert root.check("cat", "/etc/sluice/here") == "x"
        root.check("useradd", "--system", "throwaway")
        assert "throwaway" in root.read("/etc/passwd")
        with pytest.raises(AssertionError):
            root.check("touch", INSTALL)
        assert root.run("cat", INSTALL).stdout.startswith("#!/usr/bin/env bash")
    assert "throwaway" not in Path("/etc/passwd").read_text(encoding="utf-8")
    assert not Path("/etc/sluice/here").exists()


def test_what_runs_in_it_ends_with_it_and_its_ports_are_its_own() -> None:
    with ThrowawayRoot() as first, ThrowawayRoot() as second:
        for root in (first, second):
            root.start_mosquitto()
        assert len(first.processes("mosquitto", "mosquitto")) == 1
        first.stop_mosquitto()
        assert not first.listens(1883)
        assert second.listens(1883)
        assert len(list(second.path("/opt/sluice/venvs").glob("*/.complete"))) == 1
        inside = second.path("/")
        assert inside.exists()
    assert not inside.exists()
