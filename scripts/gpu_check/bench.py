"""Accept length and tokens per second of one kind of server, for every prompt length and concurrency."""

import asyncio
import itertools
import json
import sys
from dataclasses import replace

from tokenizers import Tokenizer

from scripts.gpu_check.options import Setting
from scripts.gpu_check.servers import MODEL, reason, served_kind
from sglang_step35.assets import HELDOUT_PROMPTS, NANO
from sglang_step35.bench import sweep
from sglang_step35.bench.load import Endpoint
from sglang_step35.bench.servers import ServerFailed
from sglang_step35.bench.stats import Run, run_to_json
from sglang_step35.bench.table import table
from sglang_step35.bench.workloads import Sizes

WORKLOAD = "long"  # one question behind a file of the wanted length
REQUESTS = 8  # a cell, or as many as clients


def characters(tokens: int) -> int:
    """How much of the workload's text the checkpoint's tokenizer makes about `tokens` tokens of."""
    entries = json.loads(HELDOUT_PROMPTS.read_text())
    entries = entries if isinstance(entries, list) else entries["prompts"]
    text = "\n".join(entry["text"] for entry in itertools.islice(entries, 50))
    return tokens * len(text) // len(Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(text).ids)


def measure(url: str, setting: Setting, kind: str) -> Run:
    """All cells; a cell's workload is named after its prompt length."""
    runs = []
    for name, length in setting.prompts.items():
        settings = sweep.Settings(
            workloads=(WORKLOAD,),
            concurrency=setting.concurrency,
            requests=2 if setting.tiny else REQUESTS,
            tokens=setting.tokens,
            sizes=Sizes(long_characters=characters(length)),
        )
        endpoint = Endpoint(url, MODEL)
        (run,) = asyncio.run(sweep.run({kind: endpoint}, settings, say=lambda text: print(text, file=sys.stderr)))
        runs.append(replace(run, cells=tuple(replace(cell, workload=name) for cell in run.cells)))
    return replace(runs[-1], cells=tuple(cell for run in runs for cell in run.cells))


def run(setting: Setting, kind: str) -> dict:
    """{"run": ...} as bench's run files hold it, or {"no_start": why the server did not start}."""
    try:
        with served_kind(setting, kind) as server:
            found = measure(server.url, setting, kind)
    except ServerFailed as failure:
        print(f"{kind} does not start: {reason(failure)}")
        return {"kind": kind, "no_start": reason(failure)}
    print(table([found]))
    return {"kind": kind, "run": run_to_json(found)}
