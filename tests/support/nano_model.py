"""The packaged nano checkpoint as tests use it: reference, prompts, and what servers answered."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from transformers import AutoTokenizer

from sglang_step35.assets import NANO
from tests.support.reference import Reference, load_reference


@cache
def reference() -> Reference:
    """transformers' model of the nano checkpoint, float32."""
    return load_reference(NANO)


@cache
def greedy(ids: tuple[int, ...], count: int) -> list[int]:
    return reference().greedy(list(ids), count)


@cache
def prompts() -> list[list[int]]:
    """Token ids of the 200 held-out prompts."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    entries = json.loads((NANO / "heldout_prompts.json").read_text())
    entries = entries if isinstance(entries, list) else entries["prompts"]
    texts = [entry if isinstance(entry, str) else entry["text"] for entry in entries]
    return [tokenizer(text)["input_ids"] for text in texts]


def random_ids(count: int, length: int, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(20, 2000) for _ in range(length)] for _ in range(count)]


def generate(server, ids: list[int], count: int, **options) -> dict:
    """One native request with `count` tokens, greedy unless the sampling options say otherwise."""
    body = {key: options.pop(key) for key in tuple(options) if key in BODY_FIELDS}
    sampling = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True} | options
    response = server.post("/generate", {"input_ids": ids, "sampling_params": sampling, **body})
    response.raise_for_status()
    return response.json()


BODY_FIELDS = {"return_logprob", "logprob_start_len", "top_logprobs_num", "rid"}


def generate_all(server, requests: list[list[int]], count: int, at_once: int = 16, **options):
    """The same request for every prompt, `at_once` at a time; answers in order."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda ids: generate(server, ids, count, **options), requests))


def logprob_error(ids: list[int], answer: dict) -> float:
    """Largest difference of a server's log-probabilities from the reference's, prompt and output."""
    sequence = ids + answer["output_ids"]
    meta = answer["meta_info"]
    found = [entry[0] for entry in meta["input_token_logprobs"]][1:]
    found += [entry[0] for entry in meta["output_token_logprobs"]]
    table = reference().logprobs(torch.tensor(sequence))
    expected = table[:-1].gather(1, torch.tensor(sequence[1:])[:, None]).squeeze(1)
    assert len(found) == len(expected)
    return (torch.tensor(found) - expected).abs().max().item()


def histogram(answer: dict) -> list[int]:
    """Rounds of a request that accepted 0, 1, 2, 3 drafts."""
    counts = answer["meta_info"].get("spec_correct_drafts_histogram") or []
    return counts + [0] * (4 - len(counts))


def penalised_greedy(ids, count, frequency, presence, repetition):
    """Plain decoding from the reference's logits, one token at a time."""
    output = []
    for _ in range(count):
        row = reference().logits(torch.tensor(ids + output))[-1].clone()
        for token in set(output):
            row[token] -= frequency * output.count(token) + presence
            row[token] = row[token] * repetition if row[token] < 0 else row[token] / repetition
        output.append(row.argmax().item())
    return output


def exact_sequences(ids, temperature, top_k, length):
    """Probability of every continuation under temperature and top-k, from the reference."""
    table = {(): 1.0}
    for _ in range(length):
        grown = {}
        for tail, chance in table.items():
            row = reference().logits(torch.tensor([*ids, *tail]))[-1] / temperature
            best = row.topk(top_k)
            for token, share in zip(best.indices.tolist(), best.values.softmax(-1).tolist()):
                grown[(*tail, token)] = chance * share
        table = grown
    return table


def chi_square(found: list[tuple], expected: dict[tuple, float]) -> tuple[float, float]:
    """The statistic of these samples over all cells of at least 8 expected ones, and 5 sigma above its mean."""
    samples = len(found)
    cells = [key for key, chance in expected.items() if chance * samples >= 8]
    statistic = sum((found.count(key) - expected[key] * samples) ** 2 / (expected[key] * samples) for key in cells)
    return statistic, len(cells) + 5 * (2 * len(cells)) ** 0.5
