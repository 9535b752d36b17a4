"""The structure that ARCHITECTURE.md promises, held to by reading the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lifecycle
import spool

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("spool", "lifecycle", "collector", "forwarder")
FORBIDDEN = {
    "spool": {"lifecycle", "collector", "forwarder"},
    "lifecycle": {"spool", "collector", "forwarder"},
    "collector": {"forwarder"},
    "forwarder": {"collector"},
}
ADAPTERS = {
    "paho": {"collector/mqtt.py", "collector/paho_client.py"},
    "google": {"forwarder/pubsub.py", "forwarder/bigquery.py"},
    "grpc": {"forwarder/pubsub.py", "forwarder/bigquery.py"},
    "requests": {"forwarder/bigquery.py"},
    "dotenv": {"lifecycle/environment.py"},
    "sqlite_utils": {"spool/migrations.py"},
}
CLOUD = ("google", "grpc", "requests")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def uses(tree: ast.Module, owner: str, names: set[str]) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        and node.attr in names
        for node in ast.walk(tree)
    )


def test_siblings_are_imported_only_where_allowed_and_only_from_their_root() -> None:
    for path, tree in modules():
        package = path.split("/")[0]
        for name in imports(tree):
            top = name.split(".")[0]
            assert top not in FORBIDDEN[package], f"{path} imports {name}"
            if top in PACKAGES and top != package:
                assert name == top, f"{path} reaches into {name}"


def test_each_third_party_client_has_its_own_adapter() -> None:
    seen = set()
    for path, tree in modules():
        for name in imports(tree):
            top = name.split(".")[0]
            if top in ADAPTERS:
                seen.add(top)
                assert path in ADAPTERS[top], f"{path} imports {name}"
            if top == "sqlite3":
                assert path.startswith("spool/"), f"{path} imports sqlite3"
    assert seen == set(ADAPTERS), "a rule about a library that nobody imports proves nothing"


def test_only_main_reads_the_environment_and_only_leave_exits() -> None:
    for path, tree in modules():
        if not path.endswith("__main__.py"):
            assert not uses(tree, "os", {"environ", "getenv", "putenv"}), path
        assert not uses(tree, "sys", {"exit"}), path
        if path != "lifecycle/program.py":
            assert not uses(tree, "os", {"_exit", "abort"}), path
        assert not any(isinstance(n, ast.Name) and n.id == "SystemExit" for n in ast.walk(tree))


@pytest.mark.parametrize("package", [spool, lifecycle])
def test_a_package_lists_its_surface_sorted_and_in_full(package: object) -> None:
    names = getattr(package, "__all__")  # noqa: B009 - of either module
    # The formatter's order: constants, classes, functions, each sorted.
    kinds = [0 if n.isupper() else 1 if n[0].isupper() else 2 for n in names]
    assert list(zip(kinds, names, strict=True)) == sorted(zip(kinds, names, strict=True))
    assert all(hasattr(package, name) for name in names)


@pytest.mark.parametrize("arguments", ["collector.__main__", "forwarder.__main__"])
def test_local_imports_no_cloud_client(arguments: str) -> None:
    code = (
        f"import sys, {arguments}\n"
        "from forwarder.registry import build\n"
        "from lifecycle import load_settings\n"
        "build('pubsub', load_settings({'APP_ENV': 'LOCAL'}, 'h'))\n"
        f"print(sorted(set(m.split('.')[0] for m in sys.modules) & set({CLOUD!r})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
