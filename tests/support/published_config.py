"""The published config.json and edited copies of it."""

import json
from typing import Any

from sglang_step35.assets import PUBLISHED_CONFIG as PUBLISHED

ABSENT = object()
PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")


def published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


def edited(**changes: Any) -> dict[str, Any]:
    """The published fields with some replaced, or left out where ABSENT; `a__b` is field b of the object a."""
    fields = published()
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        target, key = (fields[outer], inner) if inner else (fields, outer)
        if value is ABSENT:
            del target[key]
        else:
            target[key] = value
    return fields


def with_entry(name: str, index: int, value: Any) -> dict[str, Any]:
    """The change that replaces one entry of a per-layer list."""
    entries = published()[name]
    entries[index] = value
    return {name: entries}
