"""Greedy output and accepted drafts of servers against offline loops.

The truncated checkpoint says by construction what comes next and which drafts come true (echo.py), with margins that
bfloat16 cannot turn: every id and every round must be right. The nano checkpoint is trained, so near ties may fall
either way: there the accept length is compared with a loop that recomputes everything in float32 (check_mtp).
"""

import random
from collections import Counter
from dataclasses import asdict, dataclass

from scripts.benchmarks.check_mtp import STEPS, Comparison, compare, mixed_prompts
from scripts.gpu_check.echo import Echo
from scripts.gpu_check.options import Refused, Setting
from scripts.gpu_check.servers import served, served_kind
from scripts.gpu_check.truncated import echo_of
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from tests.support.nano_model import generate_all, histogram

TOLERANCE = 0.03  # of the nano checkpoint's accept length in bfloat16


@dataclass(frozen=True)
class EchoComparison:
    """accepted: rounds by number of accepted drafts, of all requests."""

    requests: int
    tokens: int
    wrong_ids: int
    requests_with_other_drafts: int
    accepted: list[int]
    accepted_offline: list[int]


def accept_length(accepted: list[int]) -> float:
    """Tokens a round commits."""
    return round(1 + sum(count * drafts for drafts, count in enumerate(accepted)) / max(1, sum(accepted)), 3)


def echo_prompts(echo: Echo, count: int, lengths: tuple[int, ...], seed: int = 3) -> list[list[int]]:
    """Ordinary tokens at random, of these lengths in turn."""
    chance, tokens = random.Random(seed), echo.spoken.tolist()
    return [chance.choices(tokens, k=lengths[i % len(lengths)]) for i in range(count)]


def compare_echo(echo: Echo, prompts: list[list[int]], answers: list[dict]) -> EchoComparison:
    wrong, other, served_rounds, offline = 0, 0, Counter(), Counter()
    for ids, answer in zip(prompts, answers, strict=True):
        output = answer["output_ids"]
        text = echo.text(ids[-1], len(output) + STEPS)
        expected, found = echo.rounds(text, len(output)), Counter(dict(enumerate(histogram(answer))))
        wrong += sum(a != b for a, b in zip(output, text, strict=False))
        other += found != expected
        served_rounds, offline = served_rounds + found, offline + expected
    return EchoComparison(
        requests=len(prompts),
        tokens=sum(len(answer["output_ids"]) for answer in answers),
        wrong_ids=wrong,
        requests_with_other_drafts=other,
        accepted=[served_rounds[i] for i in range(STEPS + 1)],
        accepted_offline=[offline[i] for i in range(STEPS + 1)],
    )


def on_truncated(setting: Setting) -> EchoComparison:
    echo = echo_of(setting)
    lengths = (1, 7, 40, 200) if setting.tiny else (1, 40, 600, 3000)
    prompts = echo_prompts(echo, 8 if setting.tiny else 48, lengths)
    with served_kind(setting, "mtp") as server:
        answers = generate_all(server, prompts, setting.tokens * 2, at_once=max(setting.concurrency))
    return compare_echo(echo, prompts, answers)


def on_nano(setting: Setting) -> Comparison:
    """float32 on a CPU, where the loop is met exactly; bfloat16 on a GPU."""
    count, tokens = (5, 24) if setting.tiny else (60, 96)
    dtype = "float32" if setting.device == "cpu" else "bfloat16"
    args = (*NANO_ARGS, *MTP_ARGS, "--device", setting.device, "--dtype", dtype)
    requests, at_once = mixed_prompts(count), max(setting.concurrency)
    with served(*args) as server:
        # STEPS more, because the last round may draft past the end. From the same server: its own text is judged.
        longer = generate_all(server, requests, tokens + STEPS, at_once=at_once)
        answers = generate_all(server, requests, tokens, at_once=at_once)
    kept = [i for i, answer in enumerate(answers) if longer[i]["output_ids"][:tokens] == answer["output_ids"]]
    if len(kept) < len(requests) / 2:
        raise Refused(f"only {len(kept)} of {len(requests)} greedy answers were the same when asked again")
    chosen = [[items[i] for i in kept] for items in (requests, longer, answers)]
    return compare(*chosen, concurrency=at_once, seconds=0)


def run(setting: Setting) -> dict:
    echo, nano = on_truncated(setting), on_nano(setting)
    found = {
        "truncated": asdict(echo)
        | {"accept_length": accept_length(echo.accepted), "offline": accept_length(echo.accepted_offline)},
        "nano": asdict(nano)
        | {"accept_length": accept_length(nano.accepted), "offline": accept_length(nano.accepted_offline)},
    }
    ratio = found["nano"]["accept_length"] / found["nano"]["offline"]
    found["right"] = not (echo.wrong_ids or echo.requests_with_other_drafts) and abs(ratio - 1) <= TOLERANCE
    for name in ("truncated", "nano"):
        part = found[name]
        print(f"{name}: accept length {part['accept_length']}, offline loop {part['offline']}")
        print(f"  rounds by accepted drafts {part['accepted']}, offline {part['accepted_offline']}")
        print(f"  requests with other drafts: {part['requests_with_other_drafts']} of {part['requests']}")
    print(f"truncated: ids unlike the offline loop: {echo.wrong_ids} of {echo.tokens}")
    return found
