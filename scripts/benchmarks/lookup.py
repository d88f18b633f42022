"""Decode speed with look-up drafts after MTP's, same prompts, same run, on the packaged nano checkpoint.

    python -m scripts.benchmarks.lookup [--prompts 4] [--tokens 192] [--passes 3] [--width 12] [--copying]

Four servers at once, asked in turn, one request at a time: speculation off, MTP, MTP with look-ups, adaptive depth with
look-ups; the median pass counts. Nano cannot copy a text from its prompt, so that the echo is of another kind:
held-out code at length, on which its greedy output repeats itself. The others: the beginnings of those answers, chats,
and random ids at temperature 3.

--copying: the checkpoint of `copying.py` instead, which quotes its prompt, its MTP drafts as well. 100 lines of
held-out code come in the prompt: once they are quoted back, once with a name changed everywhere (a logit bias forbids
the old one and prefers the new one to whatever is not copied). Ends in one JSON line.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from operator import eq
from pathlib import Path

from transformers import AutoTokenizer

from scripts.benchmarks import copying
from scripts.benchmarks.mtp import VARIANTS
from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool
from tests.support.nano_model import generate, prompts, random_ids

LINES = 100
RENAME_BIAS = 22.0  # between the logit of a token that is copied, 31, and what all others have


def variants(width: int) -> dict[str, tuple[str, ...]]:
    """Server flags; of two equal flags the last counts."""
    wide = (*MTP_ARGS, "--speculative-num-draft-tokens", str(width))
    return {
        "off": VARIANTS["off"],
        "mtp": VARIANTS["mtp"],
        "mtp + look-up": wide,
        "adaptive + look-up": (*wide, "--speculative-adaptive"),
    }


def chats(count: int) -> list[list[int]]:
    """Held-out code in the chat template, to be completed."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    found = []
    for ids in prompts()[50 : 50 + count]:
        messages = [{"role": "user", "content": f"Complete this:\n{tokenizer.decode(ids)}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        found.append(tokenizer(text)["input_ids"])
    return found


@dataclass(frozen=True)
class Task:
    """Requests, tokens of each answer, and sampling options of each."""

    requests: list[list[int]]
    tokens: int
    sampling: list[dict]


def workloads(count: int, tokens: int) -> dict[str, Task]:
    return {
        "echo": Task(prompts()[:count], tokens, [{}] * count),
        "code": Task(prompts()[20 : 20 + count], tokens // 4, [{}] * count),
        "chat": Task(chats(count), tokens // 2, [{}] * count),
        "random": Task(random_ids(count, 60, seed=9), tokens // 2, [{"temperature": 3.0}] * count),
    }


def copied(count: int, tokens: int) -> dict[str, Task]:
    """Texts of LINES lines, each with the beginning of its copy."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    spelt = {i: tokenizer.decode([i]) for i in range(copying.SHAPE.vocab_size)}
    words = {i for i, word in spelt.items() if word.isidentifier() and len(word) > 2}
    requests, biases = [], []
    for start in range(count):
        text = list(itertools.chain(*prompts()[start * 20 :]))
        ends = [i for i, token in enumerate(text) if "\n" in spelt[token]]
        text = text[: ends[LINES - 1] + 1]
        requests.append([*text, tokenizer.eos_token_id, *text[: copying.CONTEXT]])
        answer = text[copying.CONTEXT :][:tokens]
        old = Counter(token for token in answer if token in words).most_common(1)[0][0]
        new = min(words - set(text))
        biases.append({"logit_bias": {str(old): -100.0, str(new): RENAME_BIAS}})
    return {"quoted": Task(requests, tokens, [{}] * count), "renamed": Task(requests, tokens, biases)}


def measure(servers: dict, name: str, task: Task, passes: int) -> list[dict]:
    """Passes over a workload, every server in turn; the first one warms caches up."""
    count, asked = task.tokens, list(zip(task.requests, task.sampling, strict=True))
    seconds, rounds, same = {v: [] for v in servers}, dict.fromkeys(servers, 0), dict.fromkeys(servers, 0)
    for number in range(1 + passes):
        for variant, server in servers.items():
            start = time.perf_counter()
            answers = [generate(server, ids, count, **sampling) for ids, sampling in asked]
            if number:
                seconds[variant].append(time.perf_counter() - start)
                rounds[variant] += sum(a["meta_info"].get("spec_verify_ct", count) for a in answers)
                same[variant] = sum(map(equal_tokens, answers, task.requests))
    total = count * len(asked)
    rate = {v: total / statistics.median(seconds[v]) for v in servers}
    return [
        {
            "workload": name,
            "variant": v,
            "tokens_per_second": round(rate[v], 1),
            "accept_length": round(passes * total / rounds[v], 2),
            "to_mtp": round(rate[v] / rate["mtp"], 2),
            "copied": round(same[v] / total, 2),
        }
        for v in servers
    ]


def equal_tokens(answer: dict, prompt: list[int]) -> int:
    """Tokens of an answer that equal the prompt's after its first ones, place by place."""
    return sum(map(eq, answer["output_ids"], prompt[copying.CONTEXT :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--passes", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--width", type=int, default=12, help="--speculative-num-draft-tokens")
    parser.add_argument("--copying", action="store_true", help="with the checkpoint that copies its prompt")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        flags = variants(options.width)
        model = copying.write(Path(folder) / "copying") if options.copying else NANO
        args = (*NANO_ARGS, "--model-path", str(model), "--dtype", "bfloat16")
        pool = ServerPool(Path(folder), alive=len(flags))
        try:
            servers = {v: pool.get(*args, *more) for v, more in flags.items()}
            for name, task in (copied if options.copying else workloads)(options.prompts, options.tokens).items():
                results += measure(servers, name, task, options.passes)
        finally:
            pool.stop_all()
    for r in results:
        print(f"{r['workload']:8}{r['variant']:20}" + "".join(f"{r[k]:9}" for k in list(r)[2:]))
    print(json.dumps({"bench": "lookup", "copying": options.copying, "width": options.width, "results": results}))


if __name__ == "__main__":
    main()
