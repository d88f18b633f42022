"""Greedy output and drafts of a server against transformers' model, on many prompts.

    python -m scripts.benchmarks.check_mtp [--prompts 200] [--tokens 256] [--look-ups 8]

Float32 servers of the nano checkpoint, chunked prefill of 64, prefix cache on: speculation off, and on at concurrency 1
and 16. With --look-ups drafts that many are looked up after MTP's; one more server then decides by measured cost, as in
use, whether a round verifies them, and its rounds depend on the clock: of these only ids are compared, and on the other
everything that is looked up is verified. Counts ids that differ from those without speculation, ids that are not the
greedy choice of the reference, and requests whose accepted drafts differ from a full recompute with the same rule.
Exits with 1 if any count is not 0. Ends in one JSON line.
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
from tests.support.offline_rounds import STEPS, offline_rounds
from tests.support.plugins import install_plugin

ARGS = (*NANO_ARGS, "--dtype", "float32", "--chunked-prefill-size", "64")
MEASURED = "look-ups, where they pay"


@dataclass(frozen=True)
class Comparison:
    """One server at one concurrency; accepted: rounds by number of accepted drafts."""

    server: str
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


def compare(requests, off, answers, server: str, concurrency: int, seconds: float, look_ups: int) -> Comparison:
    """Without an offline count where the server's clock decides."""
    served, offline, other = Counter(), Counter(), 0
    for ids, longer, answer in zip(requests, off, answers, strict=True):
        found = Counter(dict(enumerate(histogram(answer))))
        served += found
        if server != MEASURED:
            expected = offline_rounds(ids, longer["output_ids"], len(answer["output_ids"]), look_ups)
            offline += expected
            other += found != expected
    pairs = [(o["output_ids"], a["output_ids"]) for o, a in zip(off, answers, strict=True)]
    return Comparison(
        server=server,
        concurrency=concurrency,
        requests=len(requests),
        tokens=sum(len(a["output_ids"]) for a in answers),
        seconds=round(seconds, 1),
        ids_unlike_off=sum(x != y for longer, ids in pairs for x, y in zip(longer, ids, strict=False)),
        ids_unlike_reference=sum(
            unlike_reference(ids, a["output_ids"]) for ids, a in zip(requests, answers, strict=True)
        ),
        requests_with_other_drafts=other,
        accepted=[served[i] for i in range(STEPS + look_ups + 1)],
        accepted_offline=[offline[i] for i in range(STEPS + look_ups + 1)],
    )


def servers(look_ups: int, folder: Path) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """Arguments and environment of the servers that speculate."""
    if not look_ups:
        return {"mtp": (MTP_ARGS, {})}
    # Of two equal flags the last one counts.
    wide = (*MTP_ARGS, "--speculative-num-draft-tokens", str(STEPS + 1 + look_ups))
    path = install_plugin("always_wide_plugin", folder)
    return {MEASURED: (wide, {}), "look-ups, always": (wide, {"PYTHONPATH": path})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--look-ups", type=int, default=0)
    options = parser.parse_args()
    requests, results = mixed_prompts(options.prompts), []
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            # More, because the last round may draft past the end.
            off = generate_all(pool.get(*ARGS), requests, options.tokens + STEPS + options.look_ups)
            pool.stop_all()
            for name, (args, env) in servers(options.look_ups, Path(folder) / "plugin").items():
                server = pool.get(*ARGS, *args, **env)
                for concurrency in (1, 16):
                    start = time.perf_counter()
                    answers = generate_all(server, requests, options.tokens, at_once=concurrency)
                    seconds = time.perf_counter() - start
                    results.append(compare(requests, off, answers, name, concurrency, seconds, options.look_ups))
                pool.stop_all()
        finally:
            pool.stop_all()
    for name in asdict(results[0]):
        print(f"{name:28}", *(str(getattr(r, name)).rjust(28) for r in results))
    bench = {"bench": "check_mtp", "look_ups": options.look_ups, "results": [asdict(r) for r in results]}
    print(json.dumps(bench))
    if any(r.ids_unlike_off or r.ids_unlike_reference or r.requests_with_other_drafts for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
