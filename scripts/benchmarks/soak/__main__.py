"""Hours of mixed traffic in minutes: what a server must not lose, leak or answer differently.

    python -m scripts.benchmarks.soak [--minutes 30] [--period 1] [--seed 0] [--plot FILE]

A float32 server of the nano checkpoint with MTP and a small KV pool gets, side by side, the load generator's six
workloads, and schemas, tools, sampling, aborts, disconnects, malformed requests, prompts at the context's limit, every
API and cache flushes at random. Every `period` minutes it rests: KV in use must be 0 after a flush, counters may not
have fallen, no metric may be NaN; resident memory, open files and threads are noted. Ten canaries are asked under
traffic in each period and must be transformers' greedy answers. At the end SIGTERM must end the server with 0. Prints
a table and one JSON line; exits with 1 if anything was wrong.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from scripts.benchmarks.soak.loop import ARGS, Soak, soak
from scripts.benchmarks.soak.report import plot, table
from sglang_step35.bench.servers import Server, ServerPool

DRAIN_SECONDS = 60
SHOWN = 20


def drained(server: Server) -> str | None:
    """What is wrong with its end: a request that SGLang still counts as running would keep it alive."""
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        return f"still running {DRAIN_SECONDS} s after SIGTERM"
    return None if code == 0 else f"exit code {code} after SIGTERM"


def summary(found: Soak) -> dict:
    memory = found.memory()
    return {
        "bench": "soak",
        "minutes": found.samples[-1].minutes,
        "requests": dict(found.sent),
        "canaries": found.canaries,
        "rss_mib_per_minute": memory and asdict(memory),
        "first": asdict(found.settled()[0]),
        "last": asdict(found.samples[-1]),
        "problems": found.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--period", type=float, default=1, help="minutes between two looks at the server at rest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="also write a PNG here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        try:
            server = pool.get(*ARGS)
            found = soak(server, options.minutes, options.period, options.seed)
            found.problems += filter(None, [drained(server)])
        finally:
            pool.stop_all()
    print(table(found.samples))
    for problem in found.problems[:SHOWN]:
        print(problem)
    if options.plot:
        plot(found.samples, options.plot)
    print(json.dumps(summary(found)))
    if found.problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
