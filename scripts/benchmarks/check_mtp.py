"""Greedy output and drafts of a server against transformers' model, on many prompts.

    python -m scripts.benchmarks.check_mtp [--prompts 200] [--tokens 256]

Two float32 servers of the nano checkpoint, chunked prefill of 64, prefix cache on: speculation on
at concurrency 1 and 16, and off. Counts ids that differ between them, ids that are not the greedy
choice of the reference, and requests whose accepted drafts differ from a full recompute. Exits
with 1 if any count is not 0. Ends in one JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool
from tests.support.nano_model import generate_all, histogram, prompts, random_ids, reference

ARGS = (*NANO_ARGS, "--dtype", "float32", "--chunked-prefill-size", "64")
STEPS = 3


@dataclass(frozen=True)
class Comparison:
    """Speculation on at one concurrency; accepted: rounds by number of accepted drafts."""

    concurrency: int
    requests: int
    tokens: int
    seconds: float
    ids_unlike_off: int
    ids_unlike_reference: int
    requests_with_other_drafts: int
    accepted: list[int]
    accepted_offline: list[int]


def mixed_prompts(count: int) -> list[list[int]]:
    """Held-out code, random ids, repeated patterns and one-token prompts, 2 : 1 : 1 : 1."""
    share = count // 5
    noise = random_ids(share, 48, seed=11)
    repeats = [ids * 12 for ids in random_ids(share, 4, seed=12)]
    single = random_ids(share, 1, seed=13)
    return prompts()[: count - 3 * share] + noise + repeats + single


@torch.inference_mode()
def unlike_reference(ids: list[int], output: list[int]) -> int:
    """Output tokens that are not the reference's greedy choice after the tokens before them."""
    best = reference().logits(torch.tensor(ids + output)).argmax(-1)
    return int((best[len(ids) - 1 : -1] != torch.tensor(output)).sum())


@torch.inference_mode()
def offline_rounds(ids: list[int], output: list[int], count: int) -> Counter:
    """Rounds by accepted drafts of a loop that recomputes everything, for `count` tokens.

    A chain that has been right so far has seen the true tokens, so one teacher-forced pass over
    the output, which goes STEPS tokens on, gives every draft such a loop would make.
    """
    tokens, end = ids + output, len(ids) + count
    rows = reference().mtp_logits([*tokens, *[0] * STEPS])
    drafts = [logits.argmax(-1).tolist() for logits in rows]
    rounds, known = Counter(), len(ids) + 1
    while known < end:
        # Layer i's draft from row known - 2, which has read token known - 1, is for known + i.
        guesses = [drafts[i][known - 2] for i in range(STEPS)]
        matches = 0
        while matches < STEPS and guesses[matches] == tokens[known + matches]:
            matches += 1
        rounds[matches] += 1
        known += matches + 1
    return rounds


def compare(requests, off, answers, concurrency: int, seconds: float) -> Comparison:
    served, offline, other = Counter(), Counter(), 0
    for ids, longer, answer in zip(requests, off, answers, strict=True):
        count = len(answer["output_ids"])
        expected = offline_rounds(ids, longer["output_ids"], count)
        found = Counter(dict(enumerate(histogram(answer))))
        other += found != expected
        served, offline = served + found, offline + expected
    pairs = [(o["output_ids"], a["output_ids"]) for o, a in zip(off, answers, strict=True)]
    return Comparison(
        concurrency=concurrency,
        requests=len(requests),
        tokens=sum(len(a["output_ids"]) for a in answers),
        seconds=round(seconds, 1),
        ids_unlike_off=sum(x != y for longer, ids in pairs for x, y in zip(longer, ids, strict=False)),
        ids_unlike_reference=sum(
            unlike_reference(ids, a["output_ids"]) for ids, a in zip(requests, answers, strict=True)
        ),
        requests_with_other_drafts=other,
        accepted=[served[i] for i in range(STEPS + 1)],
        accepted_offline=[offline[i] for i in range(STEPS + 1)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    requests, results = mixed_prompts(options.prompts), []
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            # STEPS more, because the last round may draft past the end.
            off = generate_all(pool.get(*ARGS), requests, options.tokens + STEPS)
            pool.stop_all()
            server = pool.get(*ARGS, *MTP_ARGS)
            for concurrency in (1, 16):
                start = time.perf_counter()
                answers = generate_all(server, requests, options.tokens, at_once=concurrency)
                seconds = time.perf_counter() - start
                results.append(compare(requests, off, answers, concurrency, seconds))
        finally:
            pool.stop_all()
    for name in asdict(results[0]):
        print(f"{name:28}", *(str(getattr(r, name)).rjust(28) for r in results))
    print(json.dumps({"bench": "check_mtp", "results": [asdict(r) for r in results]}))
    if any(r.ids_unlike_off or r.ids_unlike_reference or r.requests_with_other_drafts for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
