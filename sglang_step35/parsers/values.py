"""Parameter texts to JSON values, by the JSON schema of the tool. Pure: no SGLang import.

A "kind" is a JSON schema type name, or CHOICE for a string out of an enum. The chat template writes arguments
the model sees in its history with Jinja's `string` filter, so besides JSON it writes Python's None, True and False.
"""

import ast
import json
import math
import re
from typing import Any

Kinds = tuple[str, ...]

# Blanks around it mean nothing: under a tool grammar models pad a finished choice with them.
CHOICE = "choice"

_MAX_DEPTH = 8  # of $ref and anyOf chains; schemas may refer to themselves
_BRANCHES = ("anyOf", "oneOf", "allOf")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_IMPLIED_BY = {"properties": "object", "items": "array"}
_KIND_OF = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    type(None): "null",
    list: "array",
    dict: "object",
}


def argument_kinds(parameters: object) -> dict[str, Kinds]:
    """Kinds each parameter admits, by name, from a tool's `parameters` schema."""
    properties = _properties(parameters, parameters, 0)
    return {name: _kinds(schema, parameters, 0) for name, schema in properties.items()}


def is_text(kinds: Kinds) -> bool:
    """Whether a parameter's text is its value as it stands: strings, and what has no schema."""
    return all(kind == "string" for kind in kinds)


def read_value(text: str, kinds: Kinds) -> object:
    """The JSON value a parameter's text stands for.

    Where the schema also admits a string, only an object or array is taken for more than text:
    `"123"` and `123` are both valid under {"type": ["string", "integer"]}, and text loses
    nothing. A text that no admitted kind can hold stays text, for the tool to refuse.
    """
    if is_text(kinds):
        return text
    stripped = text.strip()
    textual = "string" in kinds or CHOICE in kinds
    if ("null" in kinds or not textual) and stripped in ("null", "None"):
        return None
    readers = _READERS_BESIDE_STRING if textual else _READERS
    for kind in kinds:
        try:
            if kind in readers:
                return readers[kind](stripped)
        except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return stripped if CHOICE in kinds else text


def dump(value: object) -> str:
    """JSON text that can be encoded as UTF-8: a lone surrogate escape would break the response."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def _resolve(schema: object, root: object) -> object:
    """Follow local references (`#/$defs/Item`), which pydantic writes for nested models."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        schema = root
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(step) if isinstance(schema, dict) else None
    return None


def _branches(schema: dict) -> list:
    found = []
    for keyword in _BRANCHES:
        options = schema.get(keyword)
        found += options if isinstance(options, list) else []
    return found


def _properties(schema: object, root: object, depth: int) -> dict:
    """Top-level properties, gathered from the branches when the top level declares none."""
    schema = _resolve(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return {}
    if isinstance(schema.get("properties"), dict):
        return schema["properties"]
    merged: dict[str, Any] = {}
    for branch in _branches(schema):
        merged = _properties(branch, root, depth + 1) | merged
    return merged


def _kinds(schema: object, root: object, depth: int) -> Kinds:
    schema = _resolve(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return ()
    declared = schema.get("type")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    found = []
    types = declared if isinstance(declared, list) else [declared or "string"]
    if isinstance(values, list) and all(kind in ("string", "null") for kind in types):
        found = [CHOICE if _is_choice(value) else _KIND_OF[type(value)] for value in values]
    elif isinstance(declared, str):
        found = [declared]
    elif isinstance(declared, list):
        found = [kind for kind in declared if isinstance(kind, str)]
    else:
        for branch in _branches(schema):
            found += _kinds(branch, root, depth + 1)
    if not found:
        found = [kind for mark, kind in _IMPLIED_BY.items() if mark in schema]
    if schema.get("nullable") is True:
        found.append("null")
    return tuple(dict.fromkeys(found))


def _is_choice(value: object) -> bool:
    return isinstance(value, str) and value == value.strip()


def _integer(text: str) -> int:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = _number(text)
    if isinstance(number, float) and not number.is_integer():
        raise ValueError(text)
    return int(number)


def _number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)  # JSON has no infinity
    return number


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _json_container(text: str) -> dict | list:
    value = json.loads(text)
    if not isinstance(value, dict | list):
        raise ValueError(text)
    json.dumps(value, allow_nan=False)  # json.loads lets NaN and Infinity through
    return value


def _container(text: str) -> dict | list:
    try:
        return _json_container(text)
    except ValueError:
        value = ast.literal_eval(text)
    # A Python literal may hold what JSON cannot: through JSON, or not at all.
    return _json_container(json.dumps(value))


_READERS = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _container,
    "array": _container,
}
_READERS_BESIDE_STRING = {"object": _json_container, "array": _json_container}
