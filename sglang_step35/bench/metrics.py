"""Prometheus counters of an endpoint: read before and after a cell, what the difference says."""

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from sglang_step35.bench.load import PROBE_SECONDS, Endpoint

Counters = dict[tuple[str, str], float]  # (sample name, position label or "") -> sum over all other labels

# SGLang counts when a request ends, vLLM round by round; both are complete once the answers are here.
CACHE = (
    ("sglang:cached_tokens_total", "sglang:prompt_tokens_total"),
    ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
)
SGLANG_ROUNDS = "sglang:spec_verify_calls_total"
VLLM_ROUNDS = "vllm:spec_decode_num_drafts_total"
ACCEPTED, OFFERED = "sglang:spec_accepted_drafts_total", "sglang:spec_offered_drafts_total"
VLLM_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"


def parse(text: str) -> Counters:
    counters: Counters = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, sample.labels.get("position", "")
            counters[key] = counters.get(key, 0.0) + sample.value
    return counters


async def scrape(client: aiohttp.ClientSession, endpoint: Endpoint) -> Counters | None:
    """None where there are no metrics. The key is sent too: some servers protect /metrics with it."""
    try:
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        async with client.get(f"{endpoint.root}/metrics", timeout=timeout) as response:
            if response.status != 200 or "text/plain" not in response.headers.get("Content-Type", ""):
                return None
            return parse(await response.text())
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def difference(before: Counters | None, after: Counters | None) -> Counters:
    """A counter that appeared in between started from zero."""
    if before is None or after is None:
        return {}
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def cache_hit_rate(change: Counters) -> float | None:
    for hits, queries in CACHE:
        if change.get((queries, "")):
            return change.get((hits, ""), 0.0) / change[queries, ""]
    return None


def accept_length(change: Counters) -> float | None:
    """Tokens a verification round yields, the target's own among them."""
    if rounds := change.get((SGLANG_ROUNDS, "")):
        # The prefill yields every request's first token, without a round.
        made = change.get(("sglang:generation_tokens_total", ""), 0.0)
        return (made - change.get(("sglang:num_requests_total", ""), 0.0)) / rounds
    if rounds := change.get((VLLM_ROUNDS, "")):
        return 1 + change.get(("vllm:spec_decode_num_accepted_tokens_total", ""), 0.0) / rounds
    return None


def acceptance(change: Counters) -> list[float] | None:
    """Share of rounds that accepted the draft at each position, first position first."""
    offered = {p: v for (name, p), v in change.items() if name == OFFERED and v}
    if offered:
        return [change.get((ACCEPTED, p), 0.0) / offered[p] for p in sorted(offered, key=int)]
    rounds = change.get((VLLM_ROUNDS, ""))
    places = sorted((p for name, p in change if name == VLLM_ACCEPTED), key=int)
    return [change[VLLM_ACCEPTED, p] / rounds for p in places] if rounds and places else None
