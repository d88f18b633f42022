"""The loop: traffic for a while, then rest, then a look at everything."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from scripts.benchmarks.soak import checks
from scripts.benchmarks.soak.traffic import CONTEXT, Traffic
from sglang_step35.bench.load import Endpoint, connect, run_sessions
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, Server, ServerFailed
from sglang_step35.bench.workloads import WORKLOADS, Sizes, sessions
from tests.support.clients import MODEL
from tests.support.nano_model import generate, greedy, prompts

# float32: greedy answers must not depend on who else is in the batch. The pool is small, so that it is full at times.
ARGS = (
    *NANO_ARGS, *MTP_ARGS, "--dtype", "float32", "--enable-metrics", "--chunked-prefill-size", "256",
    "--context-length", str(CONTEXT), "--max-total-tokens", "6144", "--max-running-requests", "16",
)  # fmt: skip
CANARIES, CANARY_TOKENS = 10, 48
SIZES = Sizes(long_characters=1200, random_characters=160, agent_turns=2)
CLIENTS, TOKENS = 3, 48
SETTLED = 0.25  # of the samples: a process grows while it meets everything for the first time
GROWTH = 0.5  # MiB a minute: with 95 % confidence resident memory grows less
EXTRA_FILES, EXTRA_THREADS = 8, 4


@dataclass
class Soak:
    """What was sent and seen."""

    samples: list[checks.Sample] = field(default_factory=list)
    sent: Counter = field(default_factory=Counter)
    canaries: int = 0
    problems: list[str] = field(default_factory=list)

    def settled(self) -> list[checks.Sample]:
        return self.samples[int(SETTLED * len(self.samples)) :]

    def memory(self) -> checks.Slope | None:
        """MiB a minute once settled; None from fewer than five samples."""
        found = self.settled()
        return checks.slope([s.minutes for s in found], [s.rss_mib for s in found]) if len(found) >= 5 else None

    def growth(self) -> list[str]:
        """What was not flat."""
        found, wrong = self.settled(), []
        memory = self.memory()
        if memory and memory.low > GROWTH:
            wrong.append(f"resident memory grows by {memory.value:.2f} MiB a minute")
        if found[-1].files > found[0].files + EXTRA_FILES:
            wrong.append(f"open files grew from {found[0].files} to {found[-1].files}")
        if found[-1].threads > found[0].threads + EXTRA_THREADS:
            wrong.append(f"threads grew from {found[0].threads} to {found[-1].threads}")
        return wrong


def soak(server: Server, minutes: float, period: float, seed: int = 0, say: Callable[[str], None] = print) -> Soak:
    """Traffic against the server for this time; every `period` minutes it rests and is looked at."""
    found, start = Soak(), time.monotonic()
    found.problems += filter(None, [checks.rest(server)])
    metrics = server.metrics()
    while (passed := (time.monotonic() - start) / 60) < minutes:
        traffic = _period(server, found, min(period, minutes - passed), seed + len(found.samples))
        found.sent.update(traffic.sent)
        found.problems += [*traffic.problems, *filter(None, [checks.rest(server)])]
        after = server.metrics()
        found.problems += checks.wrong_metrics(metrics, after)
        metrics = after
        found.samples.append(checks.sample(server, (time.monotonic() - start) / 60))
        say(f"{found.samples[-1]}, {found.sent.total()} requests, {len(found.problems)} problems")
    found.problems += found.growth()
    return found


def _period(server: Server, found: Soak, minutes: float, seed: int) -> Traffic:
    """Load, odd requests and canaries side by side until the time is over. Raises ServerFailed when the server ends."""
    stop, traffic = threading.Event(), Traffic(server, seed)
    timer = threading.Timer(60 * minutes, stop.set)
    timer.start()
    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(traffic.run, stop), pool.submit(traffic.run, stop)]
        parts.append(pool.submit(lambda: asyncio.run(_load(server, traffic, stop, seed))))
        parts.append(pool.submit(_ask_canaries, server, found))
    if server.process.poll() is not None:
        raise ServerFailed(f"the server ended with {server.process.returncode}; its log ends:\n{server.tail()}")
    for part in parts:
        part.result()
    return traffic


def _ask_canaries(server: Server, found: Soak) -> None:
    """Ten greedy answers while others are served, each the reference's."""
    for ids in prompts()[:CANARIES]:
        answer = generate(server, ids, CANARY_TOKENS)["output_ids"]
        found.canaries += 1
        if answer != greedy(tuple(ids), CANARY_TOKENS):
            found.problems.append(f"canary {ids[:8]}...: {answer} is not the reference's answer")


async def _load(server: Server, traffic: Traffic, stop: threading.Event, seed: int) -> None:
    """The load generator's six workloads in turn."""
    endpoint, level = Endpoint(server.url, MODEL, engine="sglang"), 0
    while not stop.is_set():
        for name in WORKLOADS:
            if stop.is_set():
                return
            work = sessions(name, CLIENTS, seed, level, SIZES, clients=CLIENTS)
            async with connect(endpoint) as client:
                results, _ = await run_sessions(client, endpoint, work, CLIENTS, TOKENS)
            traffic.sent += [name] * len(results)
            traffic.problems += [f"{name}: {r.error}: {r.detail}" for r in results if r.error]
        level += 1
