"""One change to SGLang through its hook registry."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Hook:
    """One hook.

    target: dotted upstream name. kind: "before" | "after" | "around" | "replace".
    why: what goes wrong without it. until: what upstream needs before it can go.
    """

    target: str
    kind: str
    function: Callable
    why: str
    until: str
