"""What inherited methods of SGLang's read of `self` and of their arguments, from the source, without importing it."""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def module_tree(module: str) -> ast.Module:
    """Syntax tree of a module, which need not be importable here."""
    package, *parts = module.split(".")
    # Not the module's own spec: finding that imports its parents.
    [root] = importlib.util.find_spec(package).submodule_search_locations
    return ast.parse(Path(root, *parts).with_suffix(".py").read_text(encoding="utf-8"))


def class_node(module: str, name: str) -> ast.ClassDef:
    """A class at the top of a module."""
    return next(node for node in module_tree(module).body if isinstance(node, ast.ClassDef) and node.name == name)


def class_fields(node: ast.ClassDef) -> set[str]:
    """What the class declares with an annotation: the fields of a dataclass."""
    return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}


@dataclass(frozen=True)
class Methods:
    """Methods of a chain of classes, the most derived first, by name."""

    nodes: dict[str, ast.FunctionDef]

    @classmethod
    def of(cls, *classes: tuple[str, str]) -> "Methods":
        """classes: (module, class name)."""
        nodes = {}
        for module, name in reversed(classes):
            body = class_node(module, name).body
            nodes |= {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        return cls(nodes)

    def reached(self, entries: tuple[str, ...], ours: frozenset[str]) -> set[str]:
        """The methods that `entries` end in through `self`, short of those that our class replaces."""
        found, waiting = set(), [name for name in entries if name in self.nodes]
        while waiting:
            name = waiting.pop()
            if name not in found and name not in ours:
                found.add(name)
                waiting += [read for read in attributes(self.nodes[name], "self") if read in self.nodes]
        return found

    def reads(self, methods: set[str], *path: str) -> set[str]:
        """What these methods read of `path`, say ("self", "buffers")."""
        return set().union(*(attributes(self.nodes[name], *path) for name in methods))

    def writes(self, methods: set[str]) -> set[str]:
        """What these methods assign to `self`."""
        return set().union(*(attributes(self.nodes[name], "self", store=True) for name in methods))


def attributes(tree: ast.AST, *path: str, store: bool = False) -> set[str]:
    """Attributes that code reads (or assigns) of a variable, or of an attribute of one."""
    context = ast.Store if store else ast.Load
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, context))
    return {node.attr for node in nodes if ast.unparse(node.value) == ".".join(path)}
