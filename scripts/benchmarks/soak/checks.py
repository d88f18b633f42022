"""What is looked at: processes, KV, metrics; and whether a series of measurements stays flat."""

import math
import time
from dataclasses import dataclass

import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from sglang_step35.bench.servers import Server

IDLE_SECONDS = 60
UNKNOWN = ("sglang:fwd_occupancy",)  # NaN where SGLang has no timer: on CPUs


@dataclass(frozen=True)
class Sample:
    """The server at rest, its cache flushed; over all its processes."""

    minutes: float
    rss_mib: float
    files: int
    threads: int


@dataclass(frozen=True)
class Slope:
    """Units a minute by least squares, with the bounds of 95 % confidence."""

    value: float
    low: float
    high: float


def sample(server: Server, minutes: float) -> Sample:
    main = psutil.Process(server.process.pid)
    tree = [main, *main.children(recursive=True)]
    return Sample(
        minutes=round(minutes, 3),
        rss_mib=round(sum(process.memory_info().rss for process in tree) / 2**20, 1),
        files=sum(process.num_fds() for process in tree),
        threads=sum(process.num_threads() for process in tree),
    )


def slope(times: list[float], values: list[float]) -> Slope:
    """Least squares through at least three points."""
    count = len(times)
    mean_t, mean_v = sum(times) / count, sum(values) / count
    spread = sum((t - mean_t) ** 2 for t in times)
    value = sum((t - mean_t) * (v - mean_v) for t, v in zip(times, values, strict=True)) / spread
    rest = sum((v - mean_v - value * (t - mean_t)) ** 2 for t, v in zip(times, values, strict=True))
    error = student(count - 2) * math.sqrt(rest / (count - 2) / spread)
    return Slope(value, value - error, value + error)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; within 1 % from 3 degrees of freedom on)."""
    z, n = 1.959964, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


def rest(server: Server) -> str | None:
    """Wait until nothing runs, flush the cache; what is wrong if KV is still in use then."""
    deadline = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        flushed = server.post("/flush_cache", {}).ok
        (load,) = requests.get(f"{server.url}/v1/loads", timeout=30).json()["loads"]
        if flushed and not any(load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")):
            return None
        time.sleep(0.2)
    return f"not at rest after {IDLE_SECONDS} s: {load}"


def counters(text: str) -> dict[tuple, float]:
    """Everything Prometheus must never see fall: counters, and the buckets of histograms."""
    found = {}
    for family in text_string_to_metric_families(text):
        if family.type in ("counter", "histogram"):
            for point in family.samples:
                if not point.name.endswith("_created"):
                    found[point.name, *sorted(point.labels.items())] = point.value
    return found


def wrong_metrics(before: str, after: str) -> list[str]:
    """Values that are no finite numbers, and counters that fell or went away."""
    points = [point for family in text_string_to_metric_families(after) for point in family.samples]
    wrong = [f"metric {p.name} is {p.value}" for p in points if not math.isfinite(p.value) and p.name not in UNKNOWN]
    old, new = counters(before), counters(after)
    wrong += [f"counter {key[0]} is gone" for key in old.keys() - new.keys()]
    return wrong + [f"counter {key[0]} fell" for key in old.keys() & new.keys() if new[key] < old[key]]
