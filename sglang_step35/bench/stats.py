"""From results to the numbers of a report: pure functions and the two records a run file holds."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from sglang_step35.bench import metrics
from sglang_step35.bench.stream import Result

QUANTILES = (50, 95, 99)
FORMAT = 1  # of run files


@dataclass(frozen=True)
class Spread:
    """Percentiles in milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Cell:
    """One workload at one concurrency. None: the endpoint does not tell, or nothing succeeded."""

    workload: str
    concurrency: int
    requests: int
    errors: dict[str, int]
    seconds: float
    tokens: int
    tokens_counted: bool
    tokens_per_second: float
    ttft: Spread | None
    tpot: Spread | None
    latency: Spread | None
    accept_length: float | None
    acceptance: list[float] | None  # [i]: share of rounds that accepted draft i + 1
    cache_hit_rate: float | None
    tool_calls: int

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


@dataclass(frozen=True)
class Run:
    label: str
    model: str
    engine: str
    started: str
    settings: dict
    cells: tuple[Cell, ...]
    format: int = FORMAT


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the closest ranks, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(seconds: Sequence[float]) -> Spread | None:
    if not seconds:
        return None
    values = [1000 * s for s in seconds]
    mean = sum(values) / len(values)
    return Spread(*(round(v, 3) for v in (mean, *(percentile(values, q) for q in QUANTILES))))


def time_per_token(result: Result) -> float | None:
    """Seconds for each token after the first; None for an answer of one token."""
    if result.tokens < 2 or result.latency is None or result.ttft is None:
        return None
    return (result.latency - result.ttft) / (result.tokens - 1)


def accept_length(results: Sequence[Result]) -> float | None:
    """Tokens a verification round yields: its accepted drafts and the target's own token."""
    rounds = sum(r.rounds or 0 for r in results)
    return 1 + sum(r.accepted or 0 for r in results if r.rounds) / rounds if rounds else None


def acceptance(results: Sequence[Result]) -> list[float] | None:
    """Draft i + 1 is accepted in every round that accepted more than i drafts."""
    histograms = [r.histogram for r in results if r.histogram]
    if not histograms:
        return None
    totals = [sum(h[k] for h in histograms if k < len(h)) for k in range(max(map(len, histograms)))]
    return [sum(totals[k:]) / sum(totals) for k in range(1, len(totals))]


def cache_hit_rate(results: Sequence[Result]) -> float | None:
    told = [r for r in results if r.cached_tokens is not None and r.prompt_tokens]
    prompts = sum(r.prompt_tokens or 0 for r in told)
    return sum(r.cached_tokens or 0 for r in told) / prompts if told else None


def summarize(
    workload: str, concurrency: int, results: Sequence[Result], seconds: float, change: metrics.Counters
) -> Cell:
    """What answers say about themselves comes first; `change` of the server's counters fills the gaps."""
    good = [r for r in results if r.error is None]
    tokens = sum(r.tokens for r in good)
    positions = acceptance(good) or metrics.acceptance(change)
    return Cell(
        workload=workload,
        concurrency=concurrency,
        requests=len(results),
        errors=dict(Counter(r.error for r in results if r.error)),
        seconds=round(seconds, 3),
        tokens=tokens,
        tokens_counted=all(r.tokens_counted for r in good),
        tokens_per_second=round(tokens / seconds, 2),
        ttft=spread([r.ttft for r in good if r.ttft is not None]),
        tpot=spread([t for t in map(time_per_token, good) if t is not None]),
        latency=spread([r.latency for r in good if r.latency is not None]),
        accept_length=_rounded(_first(accept_length(good), metrics.accept_length(change))),
        acceptance=[round(share, 3) for share in positions] if positions else None,
        cache_hit_rate=_rounded(_first(cache_hit_rate(good), metrics.cache_hit_rate(change))),
        tool_calls=sum(r.tool_calls for r in good),
    )


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def workloads_of(runs: Sequence[Run]) -> list[str]:
    """In the order in which they first appear."""
    return list(dict.fromkeys(cell.workload for run in runs for cell in run.cells))


def run_to_json(run: Run) -> dict:
    return asdict(run)


def run_from_json(data: dict) -> Run:
    """Unknown or missing keys mean another version of this file: refused rather than half read."""
    if data.get("format") != FORMAT:
        raise ValueError(f"run file of format {data.get('format')!r}, expected {FORMAT}")
    cells = tuple(_cell(cell) for cell in data["cells"])
    return Run(**{**_checked(Run, data), "cells": cells})


def _cell(data: dict) -> Cell:
    spreads = {name: Spread(**data[name]) if data[name] else None for name in ("ttft", "tpot", "latency")}
    return Cell(**{**_checked(Cell, data), **spreads})


def _checked(kind: type, data: dict) -> dict:
    names = {f.name for f in fields(kind)}
    if names != set(data):
        raise ValueError(f"{kind.__name__} with unexpected keys: {sorted(names ^ set(data))}")
    return data
