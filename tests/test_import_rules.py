"""The rules of who may import whom, read the environment, and end the process."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASES = ("spool", "lifecycle")
PROGRAMS = ("collector", "forwarder")
PACKAGES = (*BASES, *PROGRAMS)
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def imports(path: Path) -> Iterator[str]:
    """Yield every dotted name that the module imports, wherever in it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: imports are absolute"
            yield node.module or ""


def importers(*packages: str) -> set[str]:
    """Return the modules that import one of these packages, or something in it."""
    return {
        relative(path)
        for path in MODULES
        for name in imports(path)
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    }


def uses(path: Path, owner: str, names: set[str]) -> bool:
    """Return whether the module mentions ``owner.name`` or imports it from there."""
    wanted = {f"{owner}.{name}" for name in names}
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return bool(wanted & found)


def test_there_are_modules_to_check() -> None:
    assert len(MODULES) > 40
    assert {path.parent.name for path in MODULES} >= set(PACKAGES)


@pytest.mark.parametrize("base", BASES)
def test_the_bases_import_no_sibling(base: str) -> None:
    others = [package for package in PACKAGES if package != base]
    assert not {m for m in importers(*others) if m.startswith(f"{base}/")}


def test_the_programs_never_import_each_other() -> None:
    assert not {m for m in importers("forwarder") if m.startswith("collector/")}
    assert not {m for m in importers("collector") if m.startswith("forwarder/")}


@pytest.mark.parametrize("base", BASES)
def test_neighbours_import_only_from_a_bases_root(base: str) -> None:
    deep = {
        relative(path): name
        for path in MODULES
        if path.relative_to(ROOT).parts[0] != base
        for name in imports(path)
        if name.startswith(f"{base}.")
    }
    assert not deep


@pytest.mark.parametrize("base", BASES)
def test_a_bases_names_are_listed_sorted_and_are_all_it_imports(base: str) -> None:
    tree = parsed(ROOT / base / "__init__.py")
    (listed,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]

    def as_ruff_sorts(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert listed == sorted(listed, key=as_ruff_sorts)
    assert len(listed) == len(set(listed))
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(listed) == imported


@pytest.mark.parametrize(
    ("third_party", "allowed"),
    [
        (("paho",), {"collector/mqtt.py", "collector/paho_client.py"}),
        (
            ("google", "grpc"),
            {
                "forwarder/pubsub.py",
                "forwarder/publisher.py",
                "forwarder/access.py",
                "forwarder/bigquery.py",
                "forwarder/bqservice.py",
                "forwarder/insertaccess.py",
                "forwarder/writeapi.py",
                "forwarder/rowproto.py",
            },
        ),
        (
            ("requests",),
            {"forwarder/authorities.py", "forwarder/bqservice.py", "forwarder/insertaccess.py"},
        ),
        (("dotenv",), {"lifecycle/environment.py"}),
        (("cryptography",), {"collector/certificates.py", "forwarder/certificates.py"}),
        (("supervisor", "xmlrpc"), {"lifecycle/restarter.py"}),
    ],
)
def test_a_client_is_imported_only_by_its_adapter(
    third_party: tuple[str, ...], allowed: set[str]
) -> None:
    assert importers(*third_party) == allowed


def test_sqlite_is_imported_only_by_the_spool() -> None:
    found = importers("sqlite3", "sqlite_utils")
    assert found
    assert {module.split("/")[0] for module in found} == {"spool"}
    assert importers("sqlite_utils") == {"spool/migrations.py"}


def test_only_main_reads_the_environment() -> None:
    found = {
        relative(path)
        for path in MODULES
        if uses(path, "os", {"environ", "getenv", "environb", "getenvb"})
    }
    assert found == {f"{owner}/__main__.py" for owner in ("collector", "forwarder", "lifecycle")}


def test_only_leave_ends_the_process() -> None:
    found = {
        relative(path)
        for path in MODULES
        if uses(path, "os", {"_exit", "abort", "kill", "execv"})
        or uses(path, "sys", {"exit"})
        or any(
            isinstance(node, ast.Name) and node.id in {"exit", "quit", "SystemExit"}
            for node in ast.walk(parsed(path))
        )
    }
    assert found == {"lifecycle/program.py"}
    watchdogs = {
        relative(path) for path in MODULES if uses(path, "faulthandler", {"dump_traceback_later"})
    }
    assert watchdogs == {"lifecycle/watchdog.py"}


def imported_by(code: str) -> set[str]:
    """Return the top names of sys.modules after ``code`` in a process of its own."""
    script = f"{code}\nimport sys\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)},
    )
    return set(done.stdout.split())


def test_local_imports_no_cloud_client() -> None:
    loaded = imported_by(
        "import forwarder.__main__\n"
        "from forwarder.registry import build\n"
        "from lifecycle import load_settings\n"
        "settings = load_settings({'APP_ENV': 'LOCAL'}, 'h')\n"
        "for name in ('pubsub', 'bigquery'): build(name, settings, None).deliver([])\n"
    )
    assert "forwarder.logsink" in loaded
    assert not {m for m in loaded if m.split(".")[0] in {"google", "grpc", "requests", "paho"}}


@pytest.mark.parametrize(
    ("sink", "method", "module", "strangers"),
    [
        ("pubsub", "storage", "forwarder.pubsub", {"google.cloud.bigquery"}),
        ("bigquery", "storage", "forwarder.storage", {"google.pubsub_v1"}),
        ("bigquery", "storage_default", "forwarder.defaultstream", {"google.pubsub_v1"}),
        ("bigquery", "insert_all", "forwarder.bigquery", {"google.pubsub_v1"}),
    ],
)
def test_a_forwarder_does_not_import_the_other_ones_client(
    sink: str, method: str, module: str, strangers: set[str], tmp_path: Path
) -> None:
    loaded = imported_by(
        "from pathlib import Path\n"
        "from forwarder.registry import build\n"
        "from spool import SinkState\n"
        "from lifecycle import load_settings\n"
        "settings = load_settings({'APP_ENV': 'DEV', 'GCP_PROJECT_ID': 'p-1', 'PUBSUB_TOPIC': "
        f"'ttt', 'BIGQUERY_DATASET': 'd', 'BIGQUERY_TABLE': 't', 'BIGQUERY_WRITE_METHOD': "
        f"{method!r}}}, 'h')\n"
        f"state = SinkState.open(Path({str(tmp_path)!r}), {sink!r})\n"
        f"build({sink!r}, settings, state).close()\n"
    )
    assert module in loaded
    assert not strangers & loaded


def test_the_collector_imports_no_cloud_client_and_no_migrations() -> None:
    loaded = imported_by("import collector.__main__")
    assert "collector.mqtt" in loaded
    strangers = {"google", "grpc", "sqlite_utils", "cryptography"}
    assert not {m for m in loaded if m.split(".")[0] in strangers}
