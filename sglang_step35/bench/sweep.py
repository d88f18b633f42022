"""A whole run: every workload at every concurrency, against one endpoint or several in turns."""

import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

from sglang_step35.bench import metrics
from sglang_step35.bench.load import Endpoint, connect, identify, run_sessions
from sglang_step35.bench.stats import Cell, Run, summarize
from sglang_step35.bench.stream import Result
from sglang_step35.bench.workloads import Sizes, sessions

WARM_UP_LEVEL = -1  # prompts that no measured level uses
DETAILS_SHOWN = 3


@dataclass(frozen=True)
class Settings:
    workloads: tuple[str, ...]
    concurrency: tuple[int, ...] = (1, 4)
    requests: int = 16
    tokens: int = 128
    warm_up: int = 2
    seed: int = 0
    sizes: Sizes = Sizes()

    def __post_init__(self):
        low = min(self.requests, self.tokens, *self.concurrency)
        if low < 1 or self.warm_up < 0:
            raise ValueError("concurrency, requests and tokens start at 1, warm-up at 0")


class Progress:
    """A bar per cell, on a terminal only; errors are counted beside it while it runs."""

    def __init__(self, title: str, total: int):
        self.errors, self.tokens = 0, 0
        # disable=None: no bar when the output is a file
        self.bar = tqdm(total=total, desc=title, unit="req", disable=None, leave=False)

    def __call__(self, result: Result) -> None:
        self.errors += result.error is not None
        self.tokens += result.tokens
        self.bar.set_postfix(tokens=self.tokens, errors=self.errors, refresh=False)
        self.bar.update()


async def run(targets: Mapping[str, Endpoint], settings: Settings, say: Callable[[str], None] = print) -> list[Run]:
    """Measures endpoints by label. Several take turns cell by cell, so that all see the same state of the machine."""
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    cells: dict[str, list[Cell]] = {label: [] for label in targets}
    async with AsyncExitStack() as stack:
        clients = {label: await stack.enter_async_context(connect(e)) for label, e in targets.items()}
        known = {label: await _identified(clients[label], e) for label, e in targets.items()}
        for name in settings.workloads:
            warm_up = sessions(name, settings.warm_up, settings.seed, WARM_UP_LEVEL, settings.sizes)
            for label, endpoint in known.items():
                await run_sessions(clients[label], endpoint, warm_up, 1, settings.tokens)
            for level in range(len(settings.concurrency)):
                for label, endpoint in known.items():
                    cells[label].append(await _cell(clients[label], endpoint, settings, label, name, level, say))
    chosen = asdict(settings)
    return [Run(label, e.model, e.engine, started, chosen, tuple(cells[label])) for label, e in known.items()]


async def _identified(client, endpoint: Endpoint) -> Endpoint:
    if endpoint.engine != "other":
        return endpoint
    return replace(endpoint, engine=await identify(client, endpoint))


async def _cell(client, endpoint, settings: Settings, label: str, name: str, level: int, say) -> Cell:
    concurrency = settings.concurrency[level]
    work = sessions(name, settings.requests, settings.seed, level, settings.sizes, clients=concurrency)
    progress = Progress(f"{label}: {name}, {concurrency} at once", sum(s.requests for s in work))
    before = await metrics.scrape(client, endpoint)
    results, seconds = await run_sessions(client, endpoint, work, concurrency, settings.tokens, progress)
    change = metrics.difference(before, await metrics.scrape(client, endpoint))
    progress.bar.close()
    for result in [r for r in results if r.error][:DETAILS_SHOWN]:
        say(f"{label}, {name}, {concurrency} at once: {result.error}: {result.detail}")
    return summarize(name, concurrency, results, seconds, change)
