"""Clients of one server, SGLang's or llama.cpp's: prompts first, then tokens, each timed by itself.

The prompts are sent twice. The first time every client asks for one token, which times the prefill. The second time the
prompts are in the server's cache and the clients decode together.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sglang_step35.bench.servers import Server

TIMEOUT = 3600


@dataclass(frozen=True)
class Stream:
    """(time, tokens so far) of an answer's parts, and its last one's record."""

    arrivals: list[tuple[float, int]]
    end: dict[str, Any]


Ask = Callable[[Server, list[int], int, int], Stream]  # server, prompt, tokens, client


@dataclass(frozen=True)
class Rates:
    """Tokens per second; prefill None where clients shared a part of their prompts. accept: tokens a round."""

    prefill: float | None
    decode: float
    accept: float | None


def measure(server: Server, ask: Ask, prompts: list[list[int]], tokens: int, shared: bool) -> Rates:
    """All clients at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:

        def everyone(count: int) -> list[Stream]:
            return list(pool.map(lambda client: ask(server, prompts[client], count, client), range(len(prompts))))

        if shared:
            ask(server, prompts[0], 1, 0)
        started = time.perf_counter()
        everyone(1)
        prefill = None if shared else round(sum(map(len, prompts)) / (time.perf_counter() - started), 1)
        streams = everyone(tokens)
    return Rates(prefill, round(together(streams), 2), accept_length(streams))


def together(streams: list[Stream]) -> float:
    """Tokens per second while all clients decode: from the last one's first token to the first one's last."""
    start = max(stream.arrivals[0][0] for stream in streams)
    end = min(stream.arrivals[-1][0] for stream in streams)
    if end <= start:
        raise ValueError("no moment at which all clients decoded: ask for more tokens")
    return sum(_count(stream, end) - _count(stream, start) for stream in streams) / (end - start)


def _count(stream: Stream, moment: float) -> float:
    """Tokens at a moment, between two arrivals in proportion."""
    before = stream.arrivals[0]
    for after in stream.arrivals:
        if after[0] > moment:
            share = (moment - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1])
        before = after
    return before[1]


def accept_length(streams: list[Stream]) -> float | None:
    """Tokens a verify step; None without speculation."""
    rounds = sum(stream.end.get("spec_verify_ct") or 0 for stream in streams)
    # The first token comes from the prompt.
    return round(sum(stream.arrivals[-1][1] - 1 for stream in streams) / rounds, 2) if rounds else None


def answer_rate(prompt: int, tokens: int, prefill: float, decode: float) -> float:
    """Tokens decoded per second of whole answers, the prefill of their prompts included: what users wait for, and what
    adaptive depth goes by, since drafts cost time in both. prompt, tokens: of each client."""
    return tokens / (prompt / prefill + tokens / decode)


def ask_sglang(server: Server, prompt: list[int], tokens: int, client: int) -> Stream:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "stream": True, "sampling_params": sampling}
    arrivals, meta = [], {}
    for answer in server.stream("/generate", body, TIMEOUT):
        meta = answer["meta_info"]
        arrivals.append((time.perf_counter(), meta["completion_tokens"]))
    return Stream(arrivals, meta)


def ask_llama(server: Server, prompt: list[int], tokens: int, client: int) -> Stream:
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body |= {"cache_prompt": True, "id_slot": client, "return_tokens": True}
    arrivals, end, count = [], {}, 0
    for answer in server.stream("/completion", body, TIMEOUT):
        moment, end = time.perf_counter(), answer
        count += len(answer.get("tokens") or ())
        if answer.get("tokens"):
            arrivals.append((moment, count))
    return Stream(arrivals, end)
