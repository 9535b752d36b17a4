"""What the tests themselves need: programs that are installed for them, and time to run."""

import re
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "ip": "iproute2",
    "ss": "iproute2",
    "fuser": "psmisc",
    "lsof": "lsof",
    "jq": "jq",
    "socat": "socat",
    "git": "git",
    "gcc": "gcc",
    "mount": "mount",
    "umount": "mount",
    "pkill": "procps",
    "pgrep": "procps",
    "strace": "strace",
    "sqlite3": "sqlite3",
    "openssl": "openssl",
    "mosquitto": "mosquitto",
    "mosquitto_passwd": "mosquitto",
    "mosquitto_pub": "mosquitto-clients",
    "mosquitto_sub": "mosquitto-clients",
    "shellcheck": "shellcheck",
}
"""Debian's package of each program that a minimal system lacks, or may lack."""


def used() -> set[str]:
    """Return the programs that the tests and install.sh call, of those that PACKAGES knows."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "tests").rglob("*.sh")]
    texts = [path.read_text() for path in files if path != Path(__file__)]
    names = "|".join(map(re.escape, PACKAGES))
    # The first word of an argument list, or of a line of shell.
    called = re.compile(
        rf"""[\[(*]\(?"({names})"[,\])]|^ *({names}) [a-z/-]|[;&'] *({names}) -""", re.MULTILINE
    )
    return {name for text in texts for found in called.findall(text) for name in found if name}


def test_every_program_that_a_test_calls_is_installed_for_it() -> None:
    script = (ROOT / "tests" / "run.sh").read_text()
    asked = re.search(r"install_packages note \\\n((?:.*\\\n)*.*)\n", script)
    assert asked
    installed = set(asked[1].replace("\\", " ").split())
    called = used()
    assert {"ip", "ss", "mount", "strace", "mosquitto_pub"} <= called, "the search finds something"
    assert {PACKAGES[name] for name in called} <= installed


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.stem)
def test_no_example_has_a_deadline(path: Path) -> None:
    """A busy machine is no failure; and one place says so, for those that are written later."""
    assert settings.default is not None
    assert settings.default.deadline is None
    text = path.read_text()
    if path.name not in {"conftest.py", Path(__file__).name}:
        assert not re.search(r"\bdeadline=(None|\d|timedelta)", text)
