"""One server's times and memory at one context length, over HTTP as a client sees them.

Needs tests/ on sys.path, as bench_context.py arranges.
"""

import itertools
import re
import time
from dataclasses import dataclass

import psutil
import requests

from sglang_step35.bench.servers import Server
from tests.support.nano_model import prompts

TIMEOUT = 3600  # seconds; a 256K prefill on one shared core takes many minutes
TAIL = 40  # tokens behind the cached prefix in the second request
USAGE = re.compile(r"full token usage: ([\d.]+).*?swa token usage: ([\d.]+)")


@dataclass(frozen=True)
class Measurement:
    """One variant at one length; lengths and counts in tokens."""

    variant: str
    length: int
    prefill_seconds: float  # until the first token, nothing cached
    hit_seconds: float | None  # the same for a second request with the same prefix
    cached_tokens: int  # of the second request
    decode_ms: float  # per token
    accept_length: float
    rss_mib: int  # of the largest process, the scheduler
    full_pool_tokens: int
    sliding_pool_tokens: int
    sliding_peak_tokens: int | None  # in use, as the server logged it

    @property
    def decode_rate(self) -> float:
        return 1000 / self.decode_ms


@dataclass(frozen=True)
class Stream:
    """Arrival of a streamed answer: (seconds since the request, tokens so far), its meta_info and its tokens."""

    arrivals: list[tuple[float, int]]
    meta: dict
    ids: list[int]

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def ms_per_token(self) -> float:
        """After the first token, which belongs to the prefill."""
        (start, before), (end, count) = self.arrivals[0], self.arrivals[-1]
        return 1000 * (end - start) / (count - before)


def context_ids(length: int, seed: int) -> list[int]:
    """Held-out code up to `length` tokens, in an order that `seed` rotates."""
    texts = prompts()
    code = itertools.chain.from_iterable(itertools.cycle(texts[seed:] + texts[:seed]))
    return list(itertools.islice(code, length))


def stream(server: Server, ids: list[int], count: int) -> Stream:
    """Greedy, `count` tokens."""
    body = {
        "input_ids": ids,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
    }
    arrivals, meta, found = [], {}, []
    start = time.perf_counter()
    for answer in server.stream("/generate", body, TIMEOUT):
        meta, found = answer["meta_info"], answer["output_ids"]
        arrivals.append((time.perf_counter() - start, meta["completion_tokens"]))
    return Stream(arrivals, meta, found)


def warm_up(server: Server) -> None:
    """The first passes of a process are slow whatever their length."""
    stream(server, context_ids(300, seed=150), 16)


def measure(server: Server, variant: str, length: int, tokens: int, again: bool = True) -> Measurement:
    """A prefill from nothing, then a request that continues its prefix and decodes `tokens` tokens.

    again False: one request does both, for stock where its second pass over a long prompt takes minutes.
    """
    server.flush_cache()
    ids = context_ids(length - TAIL - tokens, seed=length % 97)
    prefill = hit = stream(server, ids, 1 if again else tokens)
    if again:
        hit = stream(server, ids + context_ids(TAIL, seed=120), tokens)
    rounds = hit.meta.get("spec_verify_ct") or tokens
    pools = pool_tokens(server)
    peak = sliding_peak(server)
    return Measurement(
        variant=variant,
        length=length,
        prefill_seconds=round(prefill.first, 3),
        hit_seconds=round(hit.first, 3) if again else None,
        cached_tokens=hit.meta["cached_tokens"],
        decode_ms=round(hit.ms_per_token, 3),
        accept_length=round(tokens / rounds, 2),
        rss_mib=resident_mib(server),
        full_pool_tokens=pools[0],
        sliding_pool_tokens=pools[1],
        sliding_peak_tokens=None if peak is None else round(peak * pools[1]),
    )


def resident_mib(server: Server) -> int:
    parent = psutil.Process(server.process.pid)
    return max(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]) >> 20


def pool_tokens(server: Server) -> tuple[int, int]:
    """Slots of the full and of the sliding layers; one shared number without a hybrid pool."""
    info = requests.get(f"{server.url}/server_info", timeout=60).json()
    usage = info["internal_states"][0]["memory_usage"]
    full = usage["token_capacity"]
    return full, usage.get("token_capacity_swa") or full


def sliding_peak(server: Server) -> float | None:
    """Largest share of the sliding pool in use in any line logged so far."""
    shares = [float(found[1]) for found in USAGE.findall(server.log.read_text(errors="replace"))]
    return max(shares, default=None)
