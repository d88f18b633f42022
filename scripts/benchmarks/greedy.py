"""A million greedy tokens of a server with MTP against transformers' model, over mixed batches; can be resumed.

    python -m scripts.benchmarks.greedy [--tokens 1000000] [--state greedy.json] [--seed 0]

Batch after batch of 1 to 48 requests at once, prompts of 1 to 1,200 tokens (held-out code, random ids, patterns),
16 to 400 new tokens each, goes to a float32 server of the nano checkpoint: prefill in chunks of 256, prefix cache on,
more tokens than its KV pool holds. The reference reads prompt and answer in one pass, and every token must be its own
greedy choice, or score within 1e-4 of it: a tie of float32, counted. Progress is kept in the state file after every
batch; the same command goes on from there. Exits with 1 if a token is wrong. Ends in one JSON line.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, Server, ServerPool
from tests.support.nano_model import generate, prompts, reference

ARGS = (*NANO_ARGS, *MTP_ARGS, "--dtype", "float32", "--chunked-prefill-size", "256", "--max-total-tokens", "8192")
TOLERANCE = 1e-4  # between logits; float32 sums in another order differ by less than 1e-5
AT_ONCE = (1, 2, 4, 8, 16, 32, 48)
SHOWN = 5


@dataclass(frozen=True)
class Case:
    """One request: token ids of the prompt, and how many to generate."""

    ids: list[int]
    count: int


@dataclass
class Progress:
    """What has been compared so far; `wrong` names tokens by batch, request and place in the answer."""

    seed: int
    batches: int = 0
    requests: int = 0
    tokens: int = 0
    ties: int = 0
    widest_tie: float = 0.0
    rounds: int = 0  # verification rounds of the server
    cached_tokens: int = 0
    retracted: int = 0
    server_seconds: float = 0.0
    reference_seconds: float = 0.0
    wrong: list[list[int]] = field(default_factory=list)


def batch(seed: int, number: int) -> list[Case]:
    """Batch `number`, the same whenever it is asked for."""
    chance = random.Random(f"{seed} {number}")
    return [Case(prompt(chance), chance.choice((16, 64, 128, 256, 400, 400))) for _ in range(chance.choice(AT_ONCE))]


def prompt(chance: random.Random) -> list[int]:
    kind, length = chance.random(), chance.choice((1, 3, 16, 60, 64, 65, 90, 130, 200, 300, chance.choice((600, 1200))))
    if kind < 0.6:  # code: whole prompts one after the other, so that many share a beginning
        start = chance.randrange(0, len(prompts()), 10)
        return [token for ids in prompts()[start : start + 40] for token in ids][:length]
    if kind < 0.8:
        return [chance.randrange(20, 2000) for _ in range(length)]
    return ([chance.randrange(20, 2000) for _ in range(4)] * length)[:length]


@torch.inference_mode()
def shortfalls(ids: list[int], output: list[int]) -> torch.Tensor:
    """By how much the reference scores each output token [T] below its own greedy choice; 0 where they are the same."""
    logits = reference().logits(ids + output)[len(ids) - 1 : -1]
    return logits.max(-1).values - logits.gather(1, torch.tensor(output)[:, None]).squeeze(1)


def compare(progress: Progress, cases: list[Case], answers: list[dict]) -> None:
    """Add a batch to the progress."""
    for place, (case, answer) in enumerate(zip(cases, answers, strict=True)):
        output, meta = answer["output_ids"], answer["meta_info"]
        assert len(output) == case.count, f"batch {progress.batches}, request {place}: {meta['finish_reason']}"
        short = shortfalls(case.ids, output)
        ties = short[(short > 0) & (short <= TOLERANCE)]
        progress.ties += len(ties)
        progress.widest_tie = max([progress.widest_tie, *ties.tolist()])
        progress.wrong += [[progress.batches, place, i] for i in (short > TOLERANCE).nonzero().flatten().tolist()]
        progress.requests += 1
        progress.tokens += len(output)
        progress.rounds += meta["spec_verify_ct"]
        progress.cached_tokens += meta["cached_tokens"]
        progress.retracted += bool(meta.get("num_retractions"))
    progress.batches += 1


def load(path: Path, seed: int) -> Progress:
    """The progress in the file, or none yet. Raises ValueError for a file of another seed."""
    if not path.exists():
        return Progress(seed)
    progress = Progress(**json.loads(path.read_text()))
    if progress.seed != seed:
        raise ValueError(f"{path} holds a run with --seed {progress.seed}: give that seed or another --state")
    return progress


def save(path: Path, progress: Progress) -> None:
    """Whole or not at all: the run may be killed here."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(asdict(progress)))
    os.replace(draft, path)


def run(server: Server, progress: Progress, tokens: int, state: Path) -> None:
    with ThreadPoolExecutor(max(AT_ONCE)) as pool:
        while progress.tokens < tokens:
            start = time.perf_counter()
            cases = batch(progress.seed, progress.batches)
            answers = list(pool.map(lambda case: generate(server, case.ids, case.count), cases))
            answered = time.perf_counter()
            compare(progress, cases, answers)
            progress.server_seconds += answered - start
            progress.reference_seconds += time.perf_counter() - answered
            save(state, progress)
            print(f"{progress.tokens:9,d} tokens, {progress.ties} ties, {len(progress.wrong)} wrong", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--state", type=Path, default=Path("greedy.json"))
    parser.add_argument("--seed", type=int, default=0, help="another seed sends other requests")
    options = parser.parse_args()
    try:
        progress = load(options.state, options.seed)
    except ValueError as error:
        raise SystemExit(f"greedy: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            run(pool.get(*ARGS), progress, options.tokens, options.state)
        finally:
            pool.stop_all()
    for number, place, token in progress.wrong[:SHOWN]:
        print(f"batch {number}, request {place}: token {token} of the answer is not the reference's")
    print(json.dumps({"bench": "greedy", **asdict(progress)}))
    if progress.wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
