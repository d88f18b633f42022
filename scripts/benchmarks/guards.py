"""What each guard prevents, costs and does without need, on the packaged nano checkpoint with MTP.

    python -m scripts.benchmarks.guards [--prompts 6] [--tokens 192] [--passes 3] [--outputs 200]

One server; a request with a guard and the same without one, in turn. Prevented: outputs that think past the budget
(code as thinking); outputs in which an n-gram stands four times in a row (greedy code, on which nano soon repeats
itself); outputs with letters of another script (a bias towards the bytes of Cyrillic, of which nano knows nothing).
Cost: the same prompts with the guard's default settings, which leave them alone. False alarms: greedy outputs that
the guard changed though nothing was wrong in them.
The reminder changes prompts alone: what the prefix cache gives back in a dialogue with it and without.
Ends in one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import regex
from transformers import AutoTokenizer

from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool
from sglang_step35.guards import settings
from sglang_step35.guards.grammar import GuardedGrammar
from sglang_step35.guards.rules import Rules
from sglang_step35.guards.vocabulary import vocabulary_of
from tests.support.nano_model import generate, generate_all, prompts
from tests.support.plain_guards import repeated, token_bytes, way_out

BUDGET, LOOP, TIMES, LONGEST = 32, 20, 3, 1024
EASY = {"reasoning": {"tokens": 4096}, "loop": True, "language": True}  # as they would be left on
FOREIGN = regex.compile(r"[^\p{Latin}\p{Greek}\p{Common}\p{Inherited}\p{Unknown}]")
THINK_END = 6
LINE = "Enough."
_CYRILLIC = (b"\xd0", b"\xd1", *(bytes([byte]) for byte in range(0x80, 0xC0)))


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


def options_of(guards: dict | None) -> dict:
    return {"custom_params": {"guards": guards}} if guards else {}


def thinks_on(answer: dict) -> bool:
    """Whether it thinks past the budget and the line that ends the thinking."""
    return THINK_END not in answer["output_ids"][: BUDGET + len(way_out(tokenizer(), LINE))]


def repeats(answer: dict, times: int = TIMES) -> bool:
    """Whether an n-gram stands so often in a row."""
    ids = answer["output_ids"]
    return any(repeated(ids[:i], LOOP, times, LONGEST) for i in range(LOOP * times, len(ids) + 1))


def loops(answer: dict) -> bool:
    """Whether one stands once more than the guard lets pass."""
    return repeats(answer, TIMES + 1)


def foreign(answer: dict) -> bool:
    return bool(FOREIGN.search(answer["text"]))


def prevented(server, count: int, tokens: int) -> dict[str, tuple[int, int]]:
    """For each guard the outputs that were wrong without it and with it."""
    code = prompts()[:count]
    opening = tokenizer()("<|im_start|>assistant\n<think>\n")["input_ids"]
    cyrillic = {str(v): 15.0 for v, spelled in enumerate(token_bytes(tokenizer())) if spelled[:1] in _CYRILLIC}
    tasks: dict[str, tuple[list, dict, Callable, dict]] = {
        "reasoning": ([opening + ids for ids in code], {"reasoning": {"tokens": BUDGET, "line": LINE}}, thinks_on, {}),
        "loop": (code, {"loop": {"tokens": LOOP, "times": TIMES}}, loops, {}),
        "language": (code, {"language": True}, foreign, {"logit_bias": cyrillic, "temperature": 1, "sampling_seed": 7}),
    }
    found = {}
    for name, (requests, guards, wrong, sampling) in tasks.items():
        free = generate_all(server, requests, tokens, **sampling)
        guarded = generate_all(server, requests, tokens, **sampling, **options_of(guards))
        found[name] = (sum(map(wrong, free)), sum(map(wrong, guarded)))
    return found


def costs(server, count: int, tokens: int, passes: int) -> dict[str, float]:
    """Tokens a second, one request at a time, by guard; the first pass warms caches up."""
    variants = {"off": None, **{name: {name: EASY[name]} for name in EASY}, "all three": EASY}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1 + passes):
        for name, guards in variants.items():
            start = time.perf_counter()
            for ids in prompts()[20 : 20 + count]:
                generate(server, ids, tokens, **options_of(guards))
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(tokens * count / statistics.median(times), 1) for name, times in seconds.items()}


def false_alarms(server, count: int, tokens: int) -> dict[str, int]:
    """Of `count` greedy outputs: changed by a guard, while without it nothing was wrong."""
    requests = prompts()[:count]
    free = generate_all(server, requests, tokens)
    wrong = {"reasoning": lambda answer: False, "loop": repeats, "language": foreign}
    found = {}
    for name, guards in EASY.items():
        guarded = generate_all(server, requests, tokens, **options_of({name: guards}))
        pairs = zip(free, guarded, strict=True)
        found[name] = sum(a["output_ids"] != b["output_ids"] and not wrong[name](a) for a, b in pairs)
    return found


def dialogue(server, turns: int, guards: dict | None) -> dict[str, int]:
    """Tokens of the prompts of a dialogue, and how many of them were cached."""
    messages = [{"role": "system", "content": "You write Python.\nKeep it short."}]
    total = {"prompt": 0, "cached": 0}
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{turn}: write def area{turn}("})
        body = {"model": "step3p5-nano", "messages": messages, "max_tokens": 16, "temperature": 0, "cache_salt": "a"}
        response = server.post("/v1/chat/completions", body | options_of(guards) | {"reasoning_effort": "none"})
        answer = response.json()
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        total["prompt"] += answer["usage"]["prompt_tokens"]
        total["cached"] += (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return total


def host_microseconds(rows: int = 2000) -> dict[str, float]:
    """Of a row of a window with the published vocabulary's size: a draft accepted, its mask filled, taken back."""
    text, vocabulary = prompts()[0], vocabulary_of(tokenizer(), 128_896)
    found = {}
    for name in EASY:
        grammar = GuardedGrammar(Rules(settings.parse({name: EASY[name]}), vocabulary, text))
        row = grammar.allocate_vocab_mask(vocabulary.size, 1, "cpu")
        for token in text:
            grammar.accept_token(token)
        grammar.fill_vocab_mask(row, 0)  # tables are made with the first row
        start = time.perf_counter()
        for i in range(rows):
            grammar.accept_token(text[i % len(text)])
            grammar.fill_vocab_mask(row, 0)
            grammar.rollback(1)
        found[name] = round((time.perf_counter() - start) / rows * 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--passes", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--outputs", type=int, default=200, help="for false alarms")
    options = parser.parse_args()
    assert tokenizer().convert_tokens_to_ids("</think>") == THINK_END
    host = host_microseconds()
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder), alive=1)
        try:
            server = pool.get(*NANO_ARGS, *MTP_ARGS, "--dtype", "float32")  # outputs do not depend on the batch
            kept = prevented(server, 2 * options.prompts, options.tokens)
            speed = costs(server, options.prompts, options.tokens // 2, options.passes)
            alarms = false_alarms(server, options.outputs, options.tokens // 3)
            talks = {name: dialogue(server, 10, g) for name, g in (("off", None), ("on", {"reminder": {"every": 3}}))}
        finally:
            pool.stop_all()
    print(f"wrong outputs of {2 * options.prompts}, tokens a second, changed for nothing of {options.outputs}")
    print(f"{'guard':12}{'without':>9}{'with':>6}{'off':>9}{'on':>8}{'ratio':>7}{'false alarms':>14}")
    for name, (without, with_guard) in kept.items():
        ratio = speed[name] / speed["off"]
        print(f"{name:12}{without:9}{with_guard:6}{speed['off']:9}{speed[name]:8}{ratio:7.2f}{alarms[name]:14}")
    print("host, microseconds a row: " + ", ".join(f"{name} {cost}" for name, cost in host.items()))
    print(f"all three: {speed['all three'] / speed['off']:.2f} of the speed without")
    for name, counts in talks.items():
        print(f"reminder {name}: {counts['cached']} of {counts['prompt']} prompt tokens of a dialogue were cached")
    results = {"prevented": kept, "tokens_per_second": speed, "false_alarms": alarms, "reminder": talks, "host": host}
    print(json.dumps({"bench": "guards", "outputs": options.outputs, **results}))


if __name__ == "__main__":
    main()
