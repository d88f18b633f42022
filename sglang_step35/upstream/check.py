"""Checks of the installed SGLang against the table: version, names, signatures and members."""

import ast
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sglang_step35 import SGLANG_VERSION
from sglang_step35.names import is_our_code
from sglang_step35.upstream.row import Upstream


class UpstreamError(RuntimeError):
    """The installed SGLang is not the one this package was written against."""


def check_version() -> None:
    """Raise UpstreamError unless the pinned SGLang version is installed."""
    installed = importlib.metadata.version("sglang")
    if installed != SGLANG_VERSION:
        raise UpstreamError(
            f"sglang-step35 is written against sglang {SGLANG_VERSION}, found {installed}: "
            f"install sglang=={SGLANG_VERSION} or the sglang-step35 release for {installed}"
        )


def check(row: Upstream) -> None:
    """Raise UpstreamError when the row's name or a member is missing, or its parameters differ."""
    if row.mentions:
        return _check_source(row)
    try:
        target = resolve(row.path)
    except (ImportError, AttributeError) as error:
        raise UpstreamError(f"sglang has no {row.path} ({error})") from error
    if row.parameters is not None:
        found = parameter_names(target)
        if found != row.parameters:
            raise UpstreamError(f"{row.path} takes {found}, sglang-step35 was written against {row.parameters}")
    missing = [name for name in row.members if not has_member(target, name)]
    if missing:
        raise UpstreamError(f"{row.path} has no {', '.join(missing)}")


def _check_source(row: Upstream) -> None:
    """Reads the file instead of importing it: some import kernels that only a GPU machine has."""
    package, *parts = row.path.split(".")
    spec = importlib.util.find_spec(package)
    file = Path(*spec.submodule_search_locations, *parts).with_suffix(".py") if spec else None
    if file is None or not file.exists():
        raise UpstreamError(f"sglang has no {row.path}")
    source = file.read_text(encoding="utf-8")
    unread = [name for name in row.mentions if not re.search(rf"\b{name}\b", source)]
    if unread:
        raise UpstreamError(f"{row.path} no longer reads {', '.join(unread)}")


def resolve(path: str):
    """What SGLang itself has at this path, also where one of our hooks has put a subclass in its place.

    Raises ImportError or AttributeError.
    """
    target = pkgutil.resolve_name(path)
    owner, _, name = path.rpartition(".")
    parent = pkgutil.resolve_name(owner)
    return _stock(getattr(_stock(parent), name) if isinstance(parent, type) else target)


def _stock(item):
    if isinstance(item, type) and is_our_code(item):
        return next((base for base in item.__mro__ if base.__module__.split(".")[0] == "sglang"), item)
    return item


def parameter_names(target) -> tuple[str, ...]:
    """Parameter names of a function, or of a class's constructor, as the table writes them."""
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return tuple(marks.get(p.kind, "") + p.name for p in inspect.signature(target).parameters.values())


def has_member(target, name: str) -> bool:
    """Whether an object has an attribute, or a class declares it or assigns it in one of its methods."""
    if hasattr(target, name):
        return True
    return isinstance(target, type) and any(declares(cls, name) for cls in target.__mro__)


def declares(cls: type, name: str) -> bool:
    """Whether this class itself, not one of its bases, has the member."""
    return name in cls.__dict__ or name in _declared(cls)


@cache
def _declared(cls: type) -> frozenset[str]:
    """Annotations, pydantic fields, and what the class's own source assigns to `self`."""
    names = {*inspect.get_annotations(cls), *getattr(cls, "model_fields", ())}
    if cls.__module__.split(".")[0] == "sglang":
        nodes = (node for node in ast.walk(_tree(cls.__module__)) if isinstance(node, ast.ClassDef))
        names |= {name for node in nodes if node.name == cls.__name__ for name in _assigned(node)}
    return frozenset(names)


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))


def _assigned(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
