"""What the package uses of SGLang, read from its source (imports, attributes, keywords) and from its classes."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import sglang_step35

ROOT = Path(sglang_step35.__file__).parent
SGLANG_FREE = tuple(f"sglang_step35/{room}/" for room in ("bench", "checkpoint", "cli", "planner"))


@dataclass(frozen=True)
class Call:
    """A call of an imported name. size: positional arguments. keywords: None stands for `**more`."""

    path: str
    file: str
    size: int
    keywords: tuple[str | None, ...]


@dataclass
class Uses:
    """Dotted SGLang paths, each with the file that uses it.

    names: imported, or read from an imported module. members: `path.attribute` read from an imported class, function
    or instance. strings: string literals. attributes: every attribute, keyword, function and variable of the package,
    whatever its object.
    """

    names: dict[str, str] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    strings: dict[str, str] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)


def sources() -> Iterator[tuple[str, ast.Module]]:
    """(path, syntax tree) of every file of the package but the table itself."""
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT.parent).as_posix()
        if "/upstream/" not in name:
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def package_uses() -> Uses:
    """What all files of the package name."""
    uses = Uses()
    for name, tree in sources():
        _read_file(name, tree, uses)
    return uses


def _read_file(file: str, tree: ast.Module, uses: Uses) -> None:
    aliases = dict(_imports(tree))
    for path in aliases.values():
        if not _is_module(path):
            uses.names[path] = file
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            uses.attributes.add(node.attr)
            owner = _path(node.value, aliases)
            if owner and (isinstance(node.value, ast.Name) or _is_module(owner)):
                (uses.names if _is_module(owner) else uses.members)[f"{owner}.{node.attr}"] = file
        elif isinstance(node, ast.Call) and (path := _path(node.func, aliases)):
            uses.calls.append(Call(path, file, len(node.args), tuple(keyword.arg for keyword in node.keywords)))
        elif isinstance(node, ast.Constant) and str(node.value).startswith("sglang."):
            uses.strings[node.value] = file
        if isinstance(node, ast.keyword) and node.arg:
            uses.attributes.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            uses.attributes.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            uses.attributes.add(node.id)


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name in the file, SGLang path)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "sglang", "write `from sglang... import`, which the scan follows"


def _path(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """SGLang path of a name, or of an attribute of an imported module or class."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
        return f"{aliases[node.value.id]}.{node.attr}"
    return None


@cache
def _is_module(path: str) -> bool:
    return inspect.ismodule(pkgutil.resolve_name(path))


@dataclass(frozen=True)
class Subclass:
    """A class of ours with a base of SGLang's. body: names its source defines. read: attributes of `self` it reads and
    does not define; stored: those it assigns."""

    cls: type
    body: frozenset[str]
    read: frozenset[str]
    stored: frozenset[str]


def is_sglang(item) -> bool:
    return item.__module__.split(".")[0] == "sglang"


def subclasses() -> list[Subclass]:
    """Every class of the package that extends one of SGLang's."""
    found = []
    for file, tree in sources():
        nodes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        if not any(node.bases for node in nodes):
            continue
        module = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        for node in nodes:
            cls = getattr(module, node.name)
            if any(is_sglang(base) for base in cls.__mro__):
                body, (read, stored) = frozenset(_body(node)), self_attributes(node)
                found.append(Subclass(cls, body, read - body - stored, stored))
    return found


def _body(node: ast.ClassDef) -> Iterator[str]:
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            yield part.name
        elif isinstance(part, ast.Assign):
            yield from (target.id for target in part.targets if isinstance(target, ast.Name))
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id


def self_attributes(tree: ast.AST) -> tuple[frozenset[str], frozenset[str]]:
    """Attributes of `self` that are (read, assigned) in a class or function."""
    read, stored = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            (stored if isinstance(node.ctx, ast.Store) else read).add(node.attr)
    return frozenset(read), frozenset(stored)


def reads_of_variables(paths: dict[str, str]) -> dict[str, str]:
    """`path.attribute` for every attribute the package reads of a variable or attribute with one of these names."""
    found = {}
    for file, tree in sources():
        if file.startswith(SGLANG_FREE):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
                if name in paths:
                    found[f"{paths[name]}.{node.attr}"] = file
    return found
