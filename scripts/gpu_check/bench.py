"""Accept length and tokens per second of one kind of server, for every prompt length and concurrency."""

import asyncio
import random
import time
from dataclasses import asdict

from scripts.gpu_check.options import Setting
from scripts.gpu_check.servers import KINDS, MODEL, reason, served_kind
from scripts.gpu_check.truncated import echo_of
from sglang_step35.bench import metrics
from sglang_step35.bench.load import Endpoint, connect, run_sessions
from sglang_step35.bench.servers import ServerFailed
from sglang_step35.bench.stats import Cell, Run, run_to_json, summarize
from sglang_step35.bench.table import table
from sglang_step35.bench.workloads import Session

REQUESTS = 8  # a cell, or as many as clients
WARM_UP = 2


def sessions(tokens: list[int], length: int, count: int, seed: str) -> list[Session]:
    """Plain completions of `length` random tokens. Their ends differ, and with them the text and the experts: behind a
    chat template's end all requests would say the same."""
    chance = random.Random(seed)
    return [Session(prompt=tuple(chance.choices(tokens, k=length))) for _ in range(count)]


async def cell(client, endpoint: Endpoint, work: list[Session], name: str, clients: int, tokens: int) -> Cell:
    before = await metrics.scrape(client, endpoint)
    results, seconds = await run_sessions(client, endpoint, work, clients, tokens)
    change = metrics.difference(before, await metrics.scrape(client, endpoint))
    return summarize(name, clients, results, seconds, change)


async def measure(url: str, setting: Setting, kind: str) -> Run:
    """All cells; a cell's workload is named after its prompt length."""
    endpoint, spoken, cells = Endpoint(url, MODEL, engine="sglang"), echo_of(setting).spoken.tolist(), []
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    async with connect(endpoint) as client:
        for name, length in setting.prompts.items():
            await run_sessions(client, endpoint, sessions(spoken, length, WARM_UP, name), WARM_UP, setting.tokens)
            for clients in setting.concurrency:
                work = sessions(spoken, length, max(clients, 2 if setting.tiny else REQUESTS), f"{name} {clients}")
                cells.append(await cell(client, endpoint, work, name, clients, setting.tokens))
    chosen = {key: str(value) for key, value in asdict(setting).items()} | {"server": KINDS[kind]}
    return Run(kind, MODEL, endpoint.engine, started, chosen, tuple(cells))


def run(setting: Setting, kind: str) -> dict:
    """{"run": ...} as bench's run files hold it, or {"no_start": why the server did not start}."""
    try:
        with served_kind(setting, kind) as server:
            found = asyncio.run(measure(server.url, setting, kind))
    except ServerFailed as failure:
        print(f"{kind} does not start: {reason(failure)}")
        return {"kind": kind, "no_start": reason(failure)}
    print(table([found]))
    return {"kind": kind, "run": run_to_json(found)}
