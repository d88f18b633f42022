"""Parameter texts to JSON values by schema; no SGLang needed."""

import json

import pytest

from sglang_step35.parsers.values import argument_kinds, dump, read_value

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
SCHEMA = {
    "properties": {
        "plain": STRING,
        "any": {},
        "list": {"type": ["integer", "null"]},
        "nullable": {"type": "string", "nullable": True},
        "enum": {"enum": ["a", None]},
        "colour": {"type": "string", "enum": ["green", "red"]},
        "perhaps": {"type": ["string", "null"], "enum": ["green", None]},
        "padded": {"enum": [" a "]},
        "const": {"const": 1},
        "any of": {"anyOf": [STRING, {"type": "array"}]},
        "all of": {"allOf": [{"$ref": "#/$defs/Item"}]},
        "reference": {"$ref": "#/$defs/Item"},
        "optional": {"anyOf": [{"$ref": "#/$defs/Item"}, {"type": "null"}]},
        "items": {"items": STRING},
        "cyclic": {"$ref": "#/$defs/Cyclic"},
        "broken": {"$ref": "#/$defs/Missing"},
        "wrong": 5,
    },
    "$defs": {
        "Item": {"properties": {"x": INTEGER}},
        "Cyclic": {"anyOf": [{"$ref": "#/$defs/Cyclic"}, INTEGER]},
    },
}


def test_kinds():
    assert argument_kinds(SCHEMA) == {
        "plain": ("string",),
        "any": (),
        "list": ("integer", "null"),
        "nullable": ("string", "null"),
        "enum": ("choice", "null"),
        "colour": ("choice",),
        "perhaps": ("choice", "null"),
        "padded": ("string",),
        "const": ("integer",),
        "any of": ("string", "array"),
        "all of": ("object",),
        "reference": ("object",),
        "optional": ("object", "null"),
        "items": ("array",),
        "cyclic": ("integer",),
        "broken": (),
        "wrong": (),
    }


@pytest.mark.parametrize("schema", [None, {}, [], {"properties": 3}, {"anyOf": 3}])
def test_schemas_without_properties(schema):
    assert argument_kinds(schema) == {}


def test_properties_of_branches():
    branches = [{"properties": {"a": INTEGER, "b": STRING}}, {"properties": {"a": STRING}}]
    assert argument_kinds({"oneOf": branches}) == {"a": ("integer",), "b": ("string",)}


@pytest.mark.parametrize(
    "text, kinds, value",
    [
        ("123", "string", "123"),
        (" null ", "string", " null "),
        ("null", "", "null"),
        ("null", "string null", None),
        ("None", "integer", None),
        (" -12 ", "integer", -12),
        ("5.0", "integer", 5),
        ("5.5", "integer", "5.5"),
        ("1_0", "integer", "1_0"),
        ("٣", "integer", "٣"),
        ("5", "number", 5),
        ("5.0", "number", 5.0),
        ("1e3", "number", 1000.0),
        (".5", "number", 0.5),
        ("nan", "number", "nan"),
        ("1e999", "number", "1e999"),
        ("True", "boolean", True),
        ("false", "boolean", False),
        ("yes", "boolean", "yes"),
        ("", "boolean", ""),
        ('{"a": [1, null]}', "object", {"a": [1, None]}),
        ("{'a': True, 1: (2,)}", "object", {"a": True, "1": [2]}),
        ("{1, 2}", "object", "{1, 2}"),
        ("...", "object", "..."),
        ('{"a": NaN}', "object", '{"a": NaN}'),
        ("{'a': 1e999}", "object", "{'a': 1e999}"),
        ("[" * 100_000, "array", "[" * 100_000),
        ("[1]", "array", [1]),
        ("5", "array", "5"),
        ("9" * 5000, "integer", "9" * 5000),
        ("7", "boolean integer", 7),
        ("7", "string integer", "7"),
        ("[7]", "string array", [7]),
        ("['7']", "string array", "['7']"),
        ("x", "unheard-of", "x"),
    ],
)
def test_values(text, kinds, value):
    found = read_value(text, tuple(kinds.split()))
    assert (found, type(found)) == (value, type(value))


def test_dump_can_always_be_encoded():
    assert dump({"ключ": "é"}) == '{"ключ": "é"}'
    assert dump({"a": "\ud83d"}).encode()
    assert json.loads(dump({"a": "\ud83d"})) == {"a": "\ud83d"}


@pytest.mark.parametrize(
    "text, kinds, value",
    [
        ("green   ", ("choice",), "green"),
        ("\tgreen", ("choice", "null"), "green"),
        (" null ", ("choice", "null"), None),
        ("null", ("choice",), "null"),
        ("green   ", ("string",), "green   "),
        (" purple ", ("choice",), "purple"),  # for the tool to refuse
    ],
)
def test_blanks_around_a_choice_mean_nothing(text, kinds, value):
    assert read_value(text, kinds) == value
