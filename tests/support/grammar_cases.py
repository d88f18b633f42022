"""Random requests under grammars, among others that are broken, starved, aborted or free, 1 to 16 at once.

A case follows from the seed and its number alone, so that any part of a run can be repeated.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.clients import FILE_QUESTION, MODEL, QUESTION
from tests.support.grammars import (
    BROKEN,
    Grammar,
    ebnf_grammar,
    fits_schema,
    json_grammar,
    random_schema,
    regex_grammar,
)
from tests.support.nano_model import prompts
from tests.support.patterns import THINK_END

NATIVE = {"json": json_grammar, "regex": regex_grammar, "ebnf": ebnf_grammar}
KINDS = (*NATIVE, *NATIVE, "schema", "required", "named", "parallel", "free", "broken", "starved")
LEAVES_THINKING = 12.0  # logit bias on </think>: code goes on for ever without it
STOPS = ('"', "a", "1", "}", "e", ", ", "=", "ne", "\n")
TOOLS = ("read_file", "search", "count_lines")


@dataclass(frozen=True)
class Case:
    """One request. fits: whether a finished answer is right; begins: whether an unfinished native one can become so."""

    number: int
    kind: str
    path: str
    body: dict
    fits: Callable[[dict], bool] = lambda answer: True
    begins: Callable[[dict], bool] = lambda answer: True
    abort_after: float | None = field(default=None)  # seconds

    @property
    def greedy(self) -> bool:
        return (self.body.get("sampling_params") or self.body)["temperature"] == 0


@dataclass(frozen=True)
class Stretch:
    """Cases sent one after the other, so many at once."""

    at_once: int
    cases: list[Case]


def stretches(seed: int, first: int, count: int) -> list[Stretch]:
    """Cases first .. first + count - 1."""
    found: list[Stretch] = []
    number = first
    while number < first + count:
        at_once = random.Random(f"stretch {seed} {number}").choice([1, 2, 4, 8, 16])
        end = min(number + 4 * at_once, first + count)
        found.append(Stretch(at_once, [make_case(seed, n) for n in range(number, end)]))
        number = end
    return found


def make_case(seed: int, number: int) -> Case:
    chance = random.Random(f"case {seed} {number}")
    kind = chance.choice(KINDS)
    temperature = chance.choice([0, 0, 1])
    abort = chance.uniform(0.01, 0.6) if chance.random() < 0.06 else None
    if kind in ("schema", "required", "named", "parallel"):
        return _chat(chance, number, kind, temperature, abort)
    sampling = {"temperature": temperature, "max_new_tokens": chance.choice([25, 120, 120, 120])}
    if kind == "free":
        return Case(number, kind, "/generate", _native(chance, sampling | {"max_new_tokens": 40}), abort_after=abort)
    if kind == "broken":
        return Case(number, kind, "/generate", _native(chance, sampling | chance.choice(BROKEN)))
    if kind == "starved":  # the grammar allows nothing but the end, min_new_tokens forbids it
        sampling |= {"regex": chance.choice(["(yes|no)", "[0-9]{2}"]), "min_new_tokens": 20}
        return Case(number, kind, "/generate", _native(chance, sampling))
    return _constrained(chance, number, kind, sampling, abort)


def _native(chance: random.Random, sampling: dict) -> dict:
    """A body of SGLang's own endpoint; prompts are longer than a prefill chunk now and then."""
    ids = [token for _ in range(chance.choice([1, 1, 2])) for token in chance.choice(prompts())]
    return {"input_ids": ids[-chance.randint(1, len(ids)) :], "sampling_params": sampling}


def _constrained(chance: random.Random, number: int, kind: str, sampling: dict, abort: float | None) -> Case:
    grammar = NATIVE[kind](chance)
    thinks = chance.random() < 0.35
    sampling = sampling | grammar.option
    if thinks:
        sampling |= {"logit_bias": {str(THINK_END): LEAVES_THINKING}, "skip_special_tokens": False}
    elif chance.random() < 0.4:
        sampling |= {"stop": [chance.choice(STOPS)]}
    body = _native(chance, sampling) | ({"require_reasoning": True} if thinks else {})
    fits, begins = _judges(grammar, thinks)
    return Case(number, f"{kind} after thinking" if thinks else kind, "/generate", body, fits, begins, abort)


def _judges(grammar: Grammar, thinks: bool) -> tuple[Callable[[dict], bool], Callable[[dict], bool]]:
    def text_of(answer: dict) -> str | None:
        text = answer["text"]
        if not thinks:
            return text
        _, end, text = text.partition("</think>")
        for name in ("<|im_end|>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"):
            text = text.removesuffix(name)
        return text if end else None

    def fits(answer: dict) -> bool:
        text = text_of(answer)
        return text is not None and grammar.fits(text)

    def begins(answer: dict) -> bool:
        text = text_of(answer)
        return text is None or "�" in text or grammar.begins(text)  # part of a character at the end

    return fits, begins


def _chat(chance: random.Random, number: int, kind: str, temperature: float, abort: float | None) -> Case:
    """OpenAI's endpoint, where thinking comes first: a response format, or tools that have to be called."""
    question = chance.choice([QUESTION, FILE_QUESTION, f"Show me the file tests/{chance.randrange(99)}.py."])
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": temperature}
    body |= {"max_tokens": 160, "logit_bias": {str(THINK_END): chance.choice([0.0, LEAVES_THINKING, LEAVES_THINKING])}}
    if kind == "schema":
        schema = random_schema(chance)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}

        def fits(answer: dict) -> bool:
            return fits_schema(schema, answer["choices"][0]["message"]["content"] or "")

        return Case(number, kind, "/v1/chat/completions", body | {"response_format": form}, fits, abort_after=abort)
    schemas = {name: _parameters(chance) for name in chance.sample(TOOLS, chance.randint(1, 3))}
    named = chance.choice(list(schemas)) if kind == "named" else None
    single = kind != "parallel" and chance.random() < 0.5
    body |= {
        "tools": [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()],
        "tool_choice": {"type": "function", "function": {"name": named}} if named else "required",
        "parallel_tool_calls": not single,
    }

    def fits_calls(answer: dict) -> bool:
        calls = [call["function"] for call in answer["choices"][0]["message"].get("tool_calls") or ()]
        names = [named] if named else schemas
        right = all(
            call["name"] in names and fits_schema(schemas[call["name"]], _bare(call["arguments"])) for call in calls
        )
        return bool(calls) and right and not (single and len(calls) > 1)

    return Case(number, kind, "/v1/chat/completions", body, fits_calls, abort_after=abort)


def _bare(arguments: str) -> str:
    """A call's arguments without blanks around texts: xgrammar's form of a call allows them around every value, and
    SGLang's parser leaves them in a text."""
    values = json.loads(arguments)
    return json.dumps({key: value.strip(" \n\t") if isinstance(value, str) else value for key, value in values.items()})


def _parameters(chance: random.Random) -> dict:
    """A tool's parameters: texts without tags, numbers, lists."""
    kinds: list[Callable[[], dict]] = [
        lambda: {"type": "string", "enum": chance.sample(["tests/a.py", "main", "two words", "終"], 2)},
        lambda: {"type": "string", "pattern": "^[a-z]{1,6}\\.py$"},
        lambda: {"type": "integer", "minimum": 0, "maximum": chance.choice([9, 250])},
        lambda: {"type": "boolean"},
        lambda: {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 5}, "maxItems": 3},
        lambda: (
            {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
            | {"additionalProperties": False}
        ),
    ]
    names = chance.sample(["path", "query", "count"], chance.randint(1, 3))
    properties = {name: chance.choice(kinds)() for name in names}
    required = [name for name in properties if chance.random() < 0.8]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def shown(case: Case) -> str:
    """The request without its prompt."""
    kept = {key: value for key, value in case.body.items() if key not in ("input_ids", "messages", "model")}
    abort = "" if case.abort_after is None else f", aborted after {case.abort_after:.2f} s"
    return f"case {case.number}, {case.kind}{abort}: {json.dumps(kept, ensure_ascii=False)}"
