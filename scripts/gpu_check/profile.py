"""A decode phase under torch's profiler, through SGLang's own endpoints."""

import re
import threading
import time
from dataclasses import asdict
from pathlib import Path

from scripts.gpu_check.accept import STEPS, echo_prompts
from scripts.gpu_check.options import Refused, Setting
from scripts.gpu_check.servers import served_kind
from scripts.gpu_check.trace import NoRounds, breakdown, read
from scripts.gpu_check.truncated import echo_of
from sglang_step35.names import DEPTH_PARAM
from tests.support.nano_model import generate_all

SECONDS_BEFORE = 1.0  # for the prompts to be read: the trace starts in the rounds
SECONDS = 1.0
CAPTURED = re.compile(r"Verify graphs of (\d+) tokens: ([\d.]+) GB")
KEPT_BYTES = 64 << 20  # larger traces are named, not kept


def traced(server, setting: Setting, concurrency: int, folder: Path, **options) -> Path:
    """The trace of the scheduler while `concurrency` requests decode; options: of their sampling."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = echo_prompts(echo_of(setting), concurrency, (64,), seed=concurrency)
    generate_all(server, prompts, 16, at_once=concurrency, **options)  # kernels are chosen and compiled here
    tokens = 800 if setting.tiny else 8000  # enough for the seconds below
    load = threading.Thread(target=generate_all, args=(server, prompts, tokens, concurrency), kwargs=options)
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


def measured(file: Path, width: int | None = None) -> dict:
    """The breakdown of a trace, which is not kept if it is large. Raises Refused."""
    try:
        return asdict(breakdown(read(file), width))
    except NoRounds as error:
        raise Refused(f"{file}: {error}") from None
    finally:
        if file.stat().st_size > KEPT_BYTES:
            file.unlink()


def run(setting: Setting) -> dict:
    rows = []
    with served_kind(setting, "mtp") as server:
        for concurrency in setting.concurrency[:2]:
            file = traced(server, setting, concurrency, (setting.out / f"trace-{concurrency}").resolve())
            rows.append({"concurrency": concurrency} | measured(file))
    for row in rows:
        print(line(row))
    return {"rounds": rows}


def run_adaptive(setting: Setting) -> dict:
    """Rounds by the tokens they verify, with requests that allow so many drafts at most; and what graphs took.

    captured: gigabytes by width, from the server's log; empty on a CPU, where nothing is captured.
    """
    rows, concurrency = [], setting.concurrency[1]
    with served_kind(setting, "adaptive") as server:
        for drafts in range(STEPS + 1):
            folder = (setting.out / f"trace-width-{drafts + 1}").resolve()
            file = traced(server, setting, concurrency, folder, custom_params={DEPTH_PARAM: drafts})
            row = {"concurrency": concurrency, "width": drafts + 1} | measured(file, drafts + 1)
            rows.append(row)
            print(line(row))
        found = CAPTURED.findall(server.log.read_text(errors="replace"))
    captured = {width: float(gigabytes) for width, gigabytes in found}
    print(f"verify graphs by width, GB: {captured}")
    return {"rounds": rows, "captured": captured}


def line(row: dict) -> str:
    """One row of the table, milliseconds."""
    parts = "  ".join(f"{name} {row[name]:.3f}" for name in ("verify", "mtp", "other", "gap", "host"))
    width = f", {row['width']} tokens verified" if "width" in row else ""
    head = f"{row['concurrency']:3d} requests{width}, {row['rounds']} rounds ({row['source']})"
    return f"{head}: round {row['round']:.3f} ms  {parts}"
