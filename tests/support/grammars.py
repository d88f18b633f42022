"""Random grammars, each with its own judge: JSON schemas (jsonschema), regular expressions and EBNF (regex).

Only what xgrammar and llguidance both enforce (so of the formats uuid; xgrammar's ipv4 admits 1.0.0.055), and mostly
languages of short texts, so that answers come to an end. A pattern within a schema has no negated class: in xgrammar's
one such admits an unescaped quotation mark.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import jsonschema
import regex

WORDS = ("alpha", "no", "x", "Zürich", "終わり", "a b", "tab\tnew", 'quo"te', "back\\slash", "-1", "")
NOT_A_LETTER = r"[^a-z\n]"
ATOMS = ("[a-z]", "[0-9]", "[A-Fé-ü]", r"\d", r"\.", "=", "ok", "def ", "終", NOT_A_LETTER, "(yes|no)")
NAMES = ("a", "kind", "total count", "näme", "終", 'q"uote', "$x", "0")


@dataclass(frozen=True)
class Grammar:
    """option: SGLang's sampling parameter; fits: whether a text is of the language; begins: whether it may get so."""

    option: dict
    fits: Callable[[str], bool]
    begins: Callable[[str], bool]


def json_grammar(chance: random.Random) -> Grammar:
    schema = random_schema(chance)
    return Grammar({"json_schema": json.dumps(schema)}, lambda text: fits_schema(schema, text), lambda text: True)


def fits_schema(schema: dict, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return jsonschema.Draft202012Validator(schema, format_checker=checker).is_valid(value)


def random_schema(chance: random.Random) -> dict:
    """An object, as a rule; now and then with definitions that it refers to."""
    if chance.random() < 0.3:
        names = ["one", "two"]
        schema = _object(chance, 2, lambda: {"$ref": f"#/$defs/{chance.choice(names)}"})
        return schema | {"$defs": {name: _value(chance, 1) for name in names}}
    return _object(chance, 2) if chance.random() < 0.7 else _value(chance, 2)


def _value(chance: random.Random, depth: int) -> dict:
    leaves = [_string, _string, _integer, _number, _constant, lambda _: {"type": chance.choice(["boolean", "null"])}]
    inner = [_object, _array, _tuple, _union]
    if depth and chance.random() < 0.5:
        return chance.choice(inner)(chance, depth - 1)
    return chance.choice(leaves)(chance)


def _object(chance: random.Random, depth: int, value: Callable[[], dict] | None = None) -> dict:
    value = value or (lambda: _value(chance, depth))
    names = chance.sample(NAMES, chance.randint(0, 4))
    required = [name for name in names if chance.random() < 0.7]
    properties = {name: value() for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: random.Random, depth: int) -> dict:
    least = chance.randint(0, 2)
    bounds = {"minItems": least, "maxItems": least + chance.randint(0, 2)}
    return {"type": "array", "items": _value(chance, depth), **bounds}


def _tuple(chance: random.Random, depth: int) -> dict:
    items = [_value(chance, depth) for _ in range(chance.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _union(chance: random.Random, depth: int) -> dict:
    return {"anyOf": [_value(chance, depth) for _ in range(chance.randint(2, 3))]}


def _string(chance: random.Random) -> dict:
    kind = chance.randrange(4)
    if kind == 0:
        least = chance.randint(0, 4)
        return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 8)}
    if kind == 1:
        return {"type": "string", "pattern": f"^{_pattern(chance, 1).replace(NOT_A_LETTER, '[A-Z]')}$"}
    if kind == 2:
        return {"type": "string", "format": "uuid"}
    return {"type": "string", "enum": chance.sample(WORDS, chance.randint(1, 4))}


def _integer(chance: random.Random) -> dict:
    least = chance.choice([-1000, -7, 0, 1, 99])
    bounds = chance.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    return {"type": "integer", **dict(zip(bounds, (least, least + chance.choice([2, 9, 10, 123, 5000])), strict=True))}


def _number(chance: random.Random) -> dict:
    return {"type": "number", "minimum": chance.choice([-3, 0]), "maximum": chance.choice([1, 20])}


def _constant(chance: random.Random) -> dict:
    value = chance.choice([*WORDS, 0, -17, 3.5, True, None, [1, "a"], {"a": None}])
    return {"const": value} if chance.random() < 0.5 else {"enum": [value, 5, "five"]}


def regex_grammar(chance: random.Random) -> Grammar:
    pattern = _pattern(chance, 2)
    return _matched({"regex": pattern}, pattern)


def _matched(option: dict, pattern: str) -> Grammar:
    compiled = regex.compile(pattern)
    return Grammar(
        option,
        lambda text: compiled.fullmatch(text) is not None,
        lambda text: compiled.fullmatch(text, partial=True) is not None,
    )


def _pattern(chance: random.Random, depth: int) -> str:
    """Alternatives of sequences of atoms, repeated, and groups."""
    sequences = [
        "".join(_part(chance, depth) for _ in range(chance.randint(1, 3))) for _ in range(chance.choice([1, 1, 2, 3]))
    ]
    return sequences[0] if len(sequences) == 1 else f"({'|'.join(sequences)})"


def _part(chance: random.Random, depth: int) -> str:
    if depth and chance.random() < 0.4:
        return f"({_pattern(chance, depth - 1)})" + chance.choice(["", "", "?", "{2}"])
    atom = chance.choice(ATOMS)
    return atom + chance.choice(["", "", "", "?", "{2}", "{1,4}", "{0,9}", "{3,12}"])


def ebnf_grammar(chance: random.Random) -> Grammar:
    """Rules that refer to later ones, the last of them to itself; the judge reads the same rules as named groups."""
    count = chance.randint(2, 4)
    rules, groups = [], []
    for i in range(count):
        name = f"r{i}" if i else "root"
        texts = [_sequence(chance, range(i + 1, count)) for _ in range(chance.randint(1, 3))]
        if i == count - 1 and chance.random() < 0.3:
            texts.append([("text", "("), ("rule", i), ("text", ")")])
        rules.append(f"{name} ::= " + " | ".join(" ".join(map(_ebnf_term, text)) for text in texts))
        groups.append(f"(?P<g{i}>" + "|".join("".join(map(_regex_term, text)) for text in texts) + ")")
    pattern = f"(?(DEFINE){''.join(groups)})(?&g0)"
    return _matched({"ebnf": "\n".join(rules) + "\n"}, pattern)


def _sequence(chance: random.Random, later: range) -> list[tuple]:
    """Terms of a sequence: literal texts, classes, rules, and some of them optional."""
    terms: list[tuple] = []
    for _ in range(chance.randint(1, 4)):
        kind = chance.choice(["text", "class", "rule"] if later else ["text", "class"])
        what = {"text": lambda: chance.choice(["if", "x =", " ", "終", ";"]), "class": lambda: chance.choice(CLASSES)}
        term = (kind, chance.choice(later) if kind == "rule" else what[kind]())
        terms.append(("maybe", term) if chance.random() < 0.25 else term)
    return terms


CLASSES = ("[a-z]", "[0-9]", "[A-Z_]")


def _ebnf_term(term: tuple) -> str:
    kind, what = term
    if kind == "maybe":
        return f"({_ebnf_term(what)})?"
    return {"text": f'"{what}"', "class": str(what), "rule": f"r{what}"}[kind]


def _regex_term(term: tuple) -> str:
    kind, what = term
    if kind == "maybe":
        return f"(?:{_regex_term(what)})?"
    return {"text": regex.escape(str(what)), "class": str(what), "rule": f"(?&g{what})"}[kind]


# What no backend compiles, or SGLang refuses because it would not be enforced.
BROKEN: tuple[dict, ...] = (
    {"regex": "("},
    {"regex": "[a-z"},
    {"regex": r"(?<=x)y"},
    {"ebnf": 'root ::= "a'},
    {"ebnf": "root ::= missing"},
    {"json_schema": '{"type": "object"'},
    {"json_schema": '{"type": "no such type"}'},
    {"json_schema": '{"$ref": "#/$defs/missing"}'},
    {"json_schema": '{"type": "string", "pattern": "("}'},
)
