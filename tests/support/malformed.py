"""Deterministic malformed requests for every generating endpoint, each one wrong in exactly one way."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

JSON = {"content-type": "application/json"}
TOO_LONG = "word " * 20000  # tokens: beyond the server's KV pool, which --max-total-tokens limits
DEEP = "[" * 100000 + "]" * 100000
TOOL = {
    "name": "look",
    "description": "Look at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
}
OPENAI_TOOL = {"type": "function", "function": TOOL}
CLAUDE_TOOL = {"name": "look", "input_schema": TOOL["parameters"]}
MESSAGES = [{"role": "user", "content": "Say hello."}]


@dataclass(frozen=True)
class Malformed:
    """One request: `what` names the fault, `body` is sent as it stands."""

    path: str
    what: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = tuple(JSON.items())


def good_bodies() -> dict[str, dict]:
    """A request that every endpoint serves, greedy and short."""
    model = {"model": "step3p5-nano"}
    short = {"max_tokens": 8, "temperature": 0}
    options = {"options": {"num_predict": 8, "temperature": 0}, "stream": False}
    return {
        "/generate": {"text": "def add(", "sampling_params": {"max_new_tokens": 8, "temperature": 0}},
        "/v1/completions": {**model, **short, "prompt": "def add("},
        "/v1/chat/completions": {**model, **short, "messages": MESSAGES},
        "/v1/responses": {**model, "input": "Say hello.", "max_output_tokens": 8, "temperature": 0},
        "/v1/messages": {**model, **short, "messages": MESSAGES},
        "/api/chat": {**model, **options, "messages": MESSAGES},
        "/api/generate": {**model, **options, "prompt": "def add("},
    }


# Values no field of the kind admits, also where numbers in strings are read as numbers.
NOT = {
    "number": ["hot", [], {}, [0.5], {"value": 1}],
    "integer": ["many", [], {}, [3], 1.5, {"value": 1}],
    "string": [5, [], {}, True, {"text": "a"}, 2.5],
    "boolean": ["perhaps", [], {}, 17, [True]],
    "list": [5, {}, "flat", True],
    "object": [5, [], "flat", True, ["key"]],
}

# By endpoint: dotted field and kind. Only fields a wrong value of which must be refused.
FIELDS = {
    "/generate": {
        "sampling_params.temperature": "number", "sampling_params.top_p": "number",
        "sampling_params.top_k": "integer", "sampling_params.min_p": "number",
        "sampling_params.max_new_tokens": "integer", "sampling_params.min_new_tokens": "integer",
        "sampling_params.frequency_penalty": "number", "sampling_params.repetition_penalty": "number",
        "sampling_params.n": "integer", "sampling_params.ignore_eos": "boolean",
        "sampling_params.skip_special_tokens": "boolean", "sampling_params.sampling_seed": "integer",
        "sampling_params.stop_token_ids": "list", "sampling_params.logit_bias": "object",
        "stream": "boolean", "return_logprob": "boolean", "top_logprobs_num": "integer",
        "logprob_start_len": "integer",
    },
    "/v1/completions": {
        "model": "string", "max_tokens": "integer", "temperature": "number", "top_p": "number", "n": "integer",
        "stream": "boolean", "logprobs": "integer", "frequency_penalty": "number", "presence_penalty": "number",
        "seed": "integer", "logit_bias": "object", "stream_options": "object", "response_format": "object",
        "top_k": "integer", "stop_token_ids": "list", "ignore_eos": "boolean",
    },
    "/v1/chat/completions": {
        "model": "string", "messages": "list", "max_tokens": "integer", "temperature": "number",
        "top_p": "number", "n": "integer", "stream": "boolean", "logprobs": "boolean", "top_logprobs": "integer",
        "frequency_penalty": "number", "presence_penalty": "number", "seed": "integer", "logit_bias": "object",
        "tools": "list", "response_format": "object", "stream_options": "object", "messages.0": "object",
        "messages.0.role": "string", "top_k": "integer", "min_p": "number", "stop_token_ids": "list",
    },
    "/v1/responses": {
        "model": "string", "max_output_tokens": "integer", "temperature": "number", "top_p": "number",
        "stream": "boolean", "tools": "list", "top_logprobs": "integer", "background": "boolean",
        "instructions": "string", "previous_response_id": "string", "store": "boolean",
    },
    "/v1/messages": {
        "model": "string", "messages": "list", "max_tokens": "integer", "temperature": "number",
        "top_p": "number", "top_k": "integer", "stream": "boolean", "tools": "list", "stop_sequences": "list",
        "messages.0": "object", "messages.0.role": "string", "thinking": "object", "tool_choice": "object",
        "metadata": "object", "output_config": "object",
    },
    "/api/chat": {
        "model": "string", "messages": "list", "stream": "boolean", "options": "object",
        "messages.0": "object", "messages.0.role": "string", "messages.0.content": "string",
        "options.temperature": "number", "options.top_p": "number", "options.top_k": "integer",
        "options.num_predict": "integer", "options.seed": "integer", "options.presence_penalty": "number",
    },
    "/api/generate": {
        "model": "string", "prompt": "string", "stream": "boolean", "options": "object", "system": "string",
        "raw": "boolean", "options.temperature": "number", "options.top_p": "number",
        "options.top_k": "integer", "options.num_predict": "integer", "options.seed": "integer",
    },
}  # fmt: skip

HUGE = 10**30
# Fields of the right type with values out of every range; {} stands for the endpoint's sampling fields.
ABSURD = {
    "/generate": {
        "sampling_params.temperature": [-1, -0.1, "NaN"], "sampling_params.top_p": [-1, 0, 1.5, "NaN"],
        "sampling_params.top_k": [-7, HUGE], "sampling_params.max_new_tokens": [-1, 10**9, HUGE],
        "sampling_params.n": [0, -1, HUGE], "sampling_params.repetition_penalty": [-1, 5, 0],
        "sampling_params.frequency_penalty": [3, -3], "sampling_params.min_new_tokens": [-1, 10**9],
        "sampling_params.stop_token_ids": [[HUGE], ["a"], [[1]], [5000], [-5]],
        "sampling_params.stream_interval": [0, -1], "session_params": [{"no_such": 1}, {"id": "unknown"}],
        "positional_embed_overrides": [{}, {"a": 1}],
        "sampling_params.logit_bias": [{"-1": 1}, {"99999": 1}, {"a": 1}, {"5": "much"}, {"5": 1e300}],
        "sampling_params.regex": ["(", "[a", "a{9,1}"], "sampling_params.json_schema": ["{", "not json", "[]"],
        "sampling_params.ebnf": ["root ::= (", "nothing"], "sampling_params.no_such_parameter": [1],
        "sampling_params.stop": [[5], [["a"]], ["x"] * 33, 7], "sampling_params.stop_regex": ["(", [5]],
        "sampling_params.sampling_seed": [HUGE],
        "text": [TOO_LONG, 5, [], [5], {}, "\ud800"], "top_logprobs_num": [-1, 10**9, HUGE],
        "token_ids_logprob": [[-1], [10**6], ["a"]], "lora_path": ["no-such-adapter"],
        "rid": [5, [], {}],
    },
    "/v1/completions": {
        "temperature": [-1, "NaN"], "top_p": [0, 1.5], "max_tokens": [-1, 10**9, HUGE], "n": [0, -1, HUGE],
        "logprobs": [-1, 10**9], "frequency_penalty": [3], "presence_penalty": [-3], "seed": [HUGE],
        "logit_bias": [{"-1": 1}, {"99999": 1}, {"a": 1}, {"5": "much"}, {"5": 1e300}], "stop": [[5], 5, ["x"] * 33],
        "prompt": [TOO_LONG, 5, {}, [], [[]], [-1], [10**6], [HUGE], ["a", 5], [1.5], "", "\ud800"],
        "top_k": [-7, HUGE], "regex": ["("], "json_schema": ["{"], "ebnf": ["root ::= ("],
        "response_format": [{"type": "no_such"}, {"type": "json_schema"}],
        "stop_token_ids": [[HUGE], ["a"], [5000]], "lora_path": ["no-such-adapter"],
    },
    "/v1/chat/completions": {
        "temperature": [-1, "NaN"], "top_p": [0, 1.5], "max_tokens": [-1, 10**9, HUGE], "n": [0, -1, HUGE],
        "top_logprobs": [-1, 10**9], "frequency_penalty": [3], "seed": [HUGE], "stop": [[5], ["x"] * 33],
        "logit_bias": [{"-1": 1}, {"99999": 1}, {"a": 1}, {"5": "much"}, {"5": 1e300}], "top_k": [-7, HUGE],
        "messages": [[], [{}], [{"role": "wizard", "content": "a"}], [{"role": "user"}], ["a"],
                     [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "no_such"}]}],
                     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
                     [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": TOO_LONG}],
                     [{"role": "assistant", "content": None, "tool_calls": 5}],
                     [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]],
        "tools": [[{}], [5], [{"type": "function"}], [{"type": "function", "function": {}}],
                  [{"type": "function", "function": {"name": "f", "parameters": 5}}]],
        "tool_choice": ["no_such", "required", {"type": "function", "function": {"name": "unknown"}}, 5],
        "response_format": [{"type": "no_such"}, {"type": "json_schema"},
                            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no_such"}}}],
        "regex": ["("], "ebnf": ["root ::= ("], "stop_token_ids": [[HUGE], ["a"], [5000]],
        "reasoning_effort": ["extreme", 5], "chat_template_kwargs": [5, "a"],
    },
    "/v1/responses": {
        "temperature": [-1], "top_p": [0, 1.5], "max_output_tokens": [-1, 10**9, HUGE],
        "top_logprobs": [-1, 10**9], "previous_response_id": ["resp_unknown", "no such id"],
        "input": [5, {}, [], [{}], [5], TOO_LONG, "\ud800", [{"role": "user", "content": 5}],
                  [{"role": "wizard", "content": "a"}], [{"type": "no_such"}]],
        "tools": [[{}], [5], [{"type": "no_such"}], [{"type": "function"}]],
        "tool_choice": ["no_such", "required", {"type": "function", "name": "unknown"}],
        "text": [5, {"format": {"type": "no_such"}}, {"format": {"type": "json_schema"}}],
        "reasoning": [5, {"effort": "extreme"}],
    },
    "/v1/messages": {
        "temperature": [-1, "NaN"], "top_p": [0, 1.5], "top_k": [-7, HUGE], "max_tokens": [0, -1, 10**9, HUGE],
        "messages": [[], [{}], [{"role": "wizard", "content": "a"}], [{"role": "user"}], ["a"],
                     [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "no_such"}]}],
                     [{"role": "user", "content": [{"type": "text"}]}],
                     [{"role": "user", "content": [{"type": "text", "text": 5}]}],
                     [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": TOO_LONG}],
                     [{"role": "assistant", "content": [{"type": "tool_use", "name": "a"}]}],
                     [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "a", "input": 5}]}],
                     [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}],
                     [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]],
        "tools": [[{}], [5], [{"name": "f"}], [{"name": "f", "input_schema": 5}], [{"type": "no_such", "name": "f"}]],
        "tool_choice": [{"type": "any"}, {"type": "tool", "name": "unknown"}, {"type": "no_such"}],
        "thinking": [{"type": "no_such"}, {"type": "enabled"}, {"type": "enabled", "budget_tokens": 5}],
        "system": [5, [{"type": "no_such"}], {}, "\ud800"], "stop_sequences": [[5], ["x"] * 33],
        "output_config": [{"effort": "extreme"}, {"format": {"type": "json_schema"}}],
    },
    "/api/chat": {
        "options.temperature": [-1, "NaN"], "options.top_p": [0, 1.5], "options.top_k": [-7, HUGE],
        "options.num_predict": [-7, 10**9, HUGE], "options.seed": [HUGE], "options.stop": [[5], 5, ["x"] * 33],
        "messages": [[{}], [{"role": "wizard", "content": "a"}], ["a"],
                     [{"role": "user", "content": [5]}], [{"role": "user", "content": "\ud800"}],
                     [{"role": "user", "content": TOO_LONG}],
                     [{"role": "user", "content": "a", "images": ["bm90IGFuIGltYWdl"]}],
                     [{"role": "user", "content": "a", "images": 5}]],
        "format": [5, "yaml", []], "think": ["extreme", 5, []], "tools": [5, [5], [{}], [{"type": "function"}]],
    },
    "/api/generate": {
        "options.temperature": [-1, "NaN"], "options.top_p": [0, 1.5], "options.top_k": [-7, HUGE],
        "options.num_predict": [-7, 10**9, HUGE], "options.seed": [HUGE], "options.stop": [[5], 5, ["x"] * 33],
        "prompt": [TOO_LONG, "\ud800"], "format": [5, "yaml", []], "think": ["extreme", 5, []],
        "images": [5, ["bm90IGFuIGltYWdl"]], "context": [5, ["a"]],
    },
}  # fmt: skip


def raw_bodies(good: bytes) -> dict[str, bytes]:
    """Bodies that are no JSON, no UTF-8 or no object."""
    return {
        "empty body": b"",
        "truncated JSON": good[:-1],
        "half of the JSON": good[: len(good) // 2],
        "trailing comma": good[:-1] + b",}",
        "two values": good + good,
        "single quotes": good.replace(b'"', b"'"),
        "invalid UTF-8 in a string": good.replace(b"step3p5-nano", b"\xff\xfe").replace(b"def add", b"\xff"),
        "invalid UTF-8 outside": b"\x80" + good,
        "half a surrogate pair": good.replace(b"hello", b"\\ud800").replace(b"def add", b"\\ud800"),
        "UTF-16": good.decode().encode("utf-16"),
        "NUL bytes": b"\0" * 64,
        "an array": b"[" + good + b"]",
        "a string": json.dumps(good.decode()).encode(),
        "a number": b"42",
        "null": b"null",
        "deep nesting": DEEP.encode(),
        "deep nesting in a field": good[:-1] + b', "messages": ' + DEEP.encode() + b', "text": ' + DEEP.encode() + b"}",
        "no fields": b"{}",
        "random bytes": random.Random(5).randbytes(256),
    }  # fmt: skip


def with_value(body: dict, field: str, value: object) -> dict:
    """A copy of `body` with a dotted field replaced or added."""
    changed = copy.deepcopy(body)
    *parents, last = [int(step) if step.isdigit() else step for step in field.split(".")]
    target = changed
    for step in parents:
        target = target[step]
    target[last] = value
    if field.startswith("top_logprobs") and "messages" in changed:
        changed["logprobs"] = True  # read only then
    if field.startswith("top_logprobs") and "input" in changed:
        changed["include"] = ["message.output_text.logprobs"]
    return changed


def encode(body: dict) -> bytes:
    return json.dumps(body).encode().replace(b'"NaN"', b"NaN")


def field_faults(path: str, body: dict) -> Iterator[tuple[str, dict]]:
    for field, kind in FIELDS[path].items():
        for value in NOT[kind]:
            yield f"{field} is {value!r}", with_value(body, field, value)
    for field, values in ABSURD[path].items():
        for value in values:
            yield f"{field} is {value!r:.80}", with_value(body, field, value)


def malformed() -> list[Malformed]:
    """All requests in a fixed, shuffled order; about half of those with fields ask for a stream."""
    chance = random.Random(11)
    found = []
    for path, good in good_bodies().items():
        for what, raw in raw_bodies(encode(good)).items():
            found.append(Malformed(path, what, raw))
        for what, body in field_faults(path, good):
            if chance.random() < 0.5 and "stream" not in what:
                body["stream"] = True
                what += ", streaming"
            found.append(Malformed(path, what, encode(body)))
    chance.shuffle(found)
    return found
