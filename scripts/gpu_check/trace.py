"""Where a round's time goes, from the chrome trace of torch's profiler. Pure: events in, milliseconds out.

The worker's spans (sglang_step35/speculative/spans.py) say what the host was launching. With a GPU, each kernel counts
for the span it was launched in, graphs included: a kernel and its launch share a correlation id. Without one, the spans
themselves are the times.
"""

import gzip
import json
import statistics
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sglang_step35.speculative.spans import MTP, PREFILL, ROUND, VERIFY, WIDTH

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")

Interval = tuple[float, float]  # start and end, in the trace's microseconds


@dataclass(frozen=True)
class Breakdown:
    """Medians over rounds, in milliseconds. round: from one round's start to the next one's.

    gap: no kernel runs (GPU), or the host is between two rounds (CPU). host: in the worker's code, which on a GPU runs
    beside the kernels. source: "gpu" or "cpu". The parts are medians of their own and need not add up to `round`.
    """

    source: str
    rounds: int
    round: float
    verify: float
    mtp: float
    other: float
    gap: float
    host: float


class NoRounds(ValueError):
    """The trace holds no two rounds in a row."""


def read(path: Path) -> list[dict]:
    """Events of a trace file, .json or .json.gz."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


def breakdown(events: Iterable[dict], width: int | None = None) -> Breakdown:
    """width: only rounds whose verify step has so many tokens. Raises NoRounds."""
    events = [event for event in events if event.get("ph") == "X"]
    spans = {name: _spans(events, name) for name in (ROUND, PREFILL, VERIFY, MTP)}
    kernels = [event for event in events if event.get("cat") in KERNELS]
    rounds = spans[ROUND]
    pairs = [(a, b) for a, b in pairwise(rounds) if not _inside(spans[PREFILL], (a[0], b[0]))]
    if width is not None:
        verified = _spans(events, f"{WIDTH}{width}")
        pairs = [pair for pair in pairs if _inside(verified, pair[0])]
    if not pairs:
        what = "" if width is None else f" that verifies {width} tokens"
        raise NoRounds(f"{len(rounds)} rounds in the trace, none{what} directly before another")
    rows = _gpu_rows(events, kernels, spans, pairs) if kernels else [_cpu_row(spans, *pair) for pair in pairs]
    if not rows:
        raise NoRounds("no kernel belongs to a round: the profiler recorded no launches")
    columns = [round(statistics.median(values) / 1000, 4) for values in zip(*rows, strict=True)]
    return Breakdown("gpu" if kernels else "cpu", len(rows), *columns)


def _spans(events: list[dict], name: str) -> list[Interval]:
    """Spans on the host; the profiler repeats them on the GPU under another category."""
    found = (event for event in events if event["name"] == name and event.get("cat") == "user_annotation")
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in found)


def _inside(spans: list[Interval], outer: Interval) -> list[Interval]:
    return [span for span in spans if outer[0] <= span[0] < outer[1]]


def _total(spans: list[Interval]) -> float:
    return sum(end - start for start, end in spans)


def _cpu_row(spans: dict[str, list[Interval]], this: Interval, following: Interval) -> tuple[float, ...]:
    """round, verify, mtp, other, gap, host."""
    verify, mtp = (_total(_inside(spans[name], this)) for name in (VERIFY, MTP))
    whole, host = following[0] - this[0], this[1] - this[0]
    return whole, verify, mtp, host - verify - mtp, whole - host, host


def _gpu_rows(events: list[dict], kernels: list[dict], spans, pairs) -> list[tuple[float, ...]]:
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    found: dict[Interval, list[tuple[float, Interval]]] = {span: [] for span in spans[ROUND]}
    starts = [start for start, _ in spans[ROUND]]
    for kernel in kernels:
        at = launched.get(kernel.get("args", {}).get("correlation"))
        place = -1 if at is None else bisect_right(starts, at) - 1
        if place >= 0 and at < spans[ROUND][place][1]:
            found[spans[ROUND][place]].append((at, (kernel["ts"], kernel["ts"] + kernel["dur"])))
    busy = sorted((kernel["ts"], kernel["ts"] + kernel["dur"]) for kernel in kernels)
    rows = []
    for this, following in pairs:
        if found[this] and found[following]:
            begin, end = (min(span[0] for _, span in found[key]) for key in (this, following))
            parts = [_union(_launched_in(found[this], _inside(spans[name], this))) for name in (VERIFY, MTP)]
            inside = _union([_cut(span, begin, end) for span in busy if span[0] < end and span[1] > begin])
            rest = inside - sum(parts)
            rows.append((end - begin, *parts, rest, end - begin - inside, this[1] - this[0]))
    return rows


def _launched_in(kernels: list[tuple[float, Interval]], spans: list[Interval]) -> list[Interval]:
    return [when for at, when in kernels if any(start <= at < end for start, end in spans)]


def _cut(span: Interval, begin: float, end: float) -> Interval:
    return max(span[0], begin), min(span[1], end)


def _union(spans: list[Interval]) -> float:
    """Length of all spans together, overlaps counted once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
