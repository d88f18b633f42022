"""A decode phase under torch's profiler, through SGLang's own endpoints."""

import threading
import time
from dataclasses import asdict
from pathlib import Path

from scripts.gpu_check.accept import echo_prompts
from scripts.gpu_check.options import Refused, Setting
from scripts.gpu_check.servers import served_kind
from scripts.gpu_check.trace import NoRounds, breakdown, read
from scripts.gpu_check.truncated import echo_of
from tests.support.nano_model import generate_all

SECONDS_BEFORE = 1.0  # for the prompts to be read: the trace starts in the rounds
SECONDS = 1.0
KEPT_BYTES = 64 << 20  # larger traces are named, not kept


def traced(server, setting: Setting, concurrency: int, folder: Path) -> Path:
    """The trace of the scheduler while `concurrency` requests decode."""
    prompts = echo_prompts(echo_of(setting), concurrency, (64,), seed=concurrency)
    generate_all(server, prompts, 16, at_once=concurrency)  # kernels are chosen and compiled here
    tokens = 800 if setting.tiny else 8000  # enough for the seconds below
    load = threading.Thread(target=generate_all, args=(server, prompts, tokens, concurrency))
    load.start()
    time.sleep(SECONDS_BEFORE)
    body = {"output_dir": str(folder), "activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
    server.post("/start_profile", body).raise_for_status()
    time.sleep(SECONDS)
    server.post("/stop_profile", {}, timeout=300).raise_for_status()
    load.join()
    found = sorted(folder.glob("*.trace.json.gz"))
    if not found:
        raise Refused(f"SGLang left no trace in {folder}")
    return found[-1]


def run(setting: Setting) -> dict:
    rows = []
    with served_kind(setting, "mtp") as server:
        for concurrency in setting.concurrency[:2]:
            folder = (setting.out / f"trace-{concurrency}").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            try:
                file = traced(server, setting, concurrency, folder)
                rows.append({"concurrency": concurrency} | asdict(breakdown(read(file))))
            except NoRounds as error:
                raise Refused(f"{folder}: {error}") from None
            if file.stat().st_size > KEPT_BYTES:
                file.unlink()
    for row in rows:
        print(line(row))
    return {"rounds": rows}


def line(row: dict) -> str:
    """One row of the table, milliseconds."""
    parts = "  ".join(f"{name} {row[name]:.3f}" for name in ("verify", "mtp", "other", "gap", "host"))
    head = f"{row['concurrency']:3d} requests, {row['rounds']} rounds ({row['source']})"
    return f"{head}: round {row['round']:.3f} ms  {parts}"
