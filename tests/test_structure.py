"""The house itself: no import circles, tests that mirror the package, no edits of `sys.path`, declared packages."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sglang_step35"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Imported under another name than the distribution's.
DISTRIBUTIONS = {
    "flashinfer": "flashinfer-python",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Every module a file imports, inside functions too; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


MODULES = {module_name(file) for file in SOURCES}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert set(find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_imports_form_no_circle():
    graph = {module_name(file): MODULES.intersection(imported(file)) for file in SOURCES}
    assert find_circle(graph) == []


def test_every_test_folder_is_a_package_folder():
    own = {"support", "serving"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    assert folders - own <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def test_nothing_edits_the_import_path():
    files = [*SOURCES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    edits = re.compile(r"sys\.path\.(insert|append|extend)\(|sys\.path\s*=")
    assert [str(file.relative_to(ROOT)) for file in files if edits.search(file.read_text())] == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_can_be_held_in_the_head(file):
    assert len(file.read_text().splitlines()) <= 300


def test_directly_imported_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    declared = {re.split(r"[=<>\[ ]", entry)[0].lower() for entry in named}
    found = {name.split(".")[0] for file in SOURCES for name in imported(file)}
    outside = found - set(sys.stdlib_module_names) - {"sglang_step35"}
    assert {DISTRIBUTIONS.get(name, name) for name in outside} - declared == set()


def test_version_is_the_installed_one():
    import sglang_step35

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sglang_step35.__version__ == project["version"] == metadata.version("sglang-step35")
