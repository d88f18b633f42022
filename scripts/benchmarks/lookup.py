"""Decode speed with look-up drafts after MTP's, same prompts, same run, on the packaged nano checkpoint.

    python -m scripts.benchmarks.lookup [--prompts 4] [--tokens 192] [--passes 3] [--width 12]

Four servers at once, asked in turn, one request at a time: speculation off, MTP, MTP with look-ups, adaptive depth with
look-ups; the median pass counts. Nano cannot copy a text from its prompt, so that the echo is of another kind:
held-out code at length, on which its greedy output repeats itself. The others: the beginnings of those answers, chats,
and random ids at temperature 3. Ends in one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from scripts.benchmarks.mtp import VARIANTS
from sglang_step35.assets import NANO
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool
from tests.support.nano_model import generate, prompts, random_ids


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


def workloads(count: int, tokens: int) -> dict[str, tuple[list[list[int]], int, dict]]:
    """Prompts, tokens of each answer and sampling options."""
    return {
        "echo": (prompts()[:count], tokens, {}),
        "code": (prompts()[20 : 20 + count], tokens // 4, {}),
        "chat": (chats(count), tokens // 2, {}),
        "random": (random_ids(count, 60, seed=9), tokens // 2, {"temperature": 3.0}),
    }


def measure(servers: dict, name: str, task: tuple, passes: int) -> list[dict]:
    """Passes over a workload, every server in turn; the first one warms caches up."""
    requests, count, sampling = task
    seconds, rounds = {v: [] for v in servers}, dict.fromkeys(servers, 0)
    for number in range(1 + passes):
        for variant, server in servers.items():
            start = time.perf_counter()
            answers = [generate(server, ids, count, **sampling) for ids in requests]
            if number:
                seconds[variant].append(time.perf_counter() - start)
                rounds[variant] += sum(a["meta_info"].get("spec_verify_ct", count) for a in answers)
    total = count * len(requests)
    rate = {v: total / statistics.median(seconds[v]) for v in servers}
    return [
        {
            "workload": name,
            "variant": v,
            "tokens_per_second": round(rate[v], 1),
            "accept_length": round(passes * total / rounds[v], 2),
            "to_mtp": round(rate[v] / rate["mtp"], 2),
        }
        for v in servers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--passes", type=int, default=3, help="measured, after one to warm up")
    parser.add_argument("--width", type=int, default=12, help="--speculative-num-draft-tokens")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        flags = variants(options.width)
        pool = ServerPool(Path(folder), alive=len(flags))
        try:
            servers = {v: pool.get(*NANO_ARGS, "--dtype", "bfloat16", *more) for v, more in flags.items()}
            for name, task in workloads(options.prompts, options.tokens).items():
                results += measure(servers, name, task, options.passes)
        finally:
            pool.stop_all()
    for r in results:
        print(f"{r['workload']:8}{r['variant']:20}" + "".join(f"{r[k]:9}" for k in list(r)[2:]))
    print(json.dumps({"bench": "lookup", "width": options.width, "results": results}))


if __name__ == "__main__":
    main()
