"""A CPU server at real widths: this package, llama.cpp and transformers on the same weights.

    python -m scripts.benchmarks.real_width --folder FILES --results FILE.json [--only ours/bf16 bandwidth]
        [--llama-server PATH] [--turns 3] [--plot FILE.png] [--list]

The 0.9B checkpoint (`drafted.py`: hidden 1024, 12 + 3 layers, 64 experts of 320, drafts accepted as often as nano's) in
bf16, FP8 (the routed experts), Q8_0 and Q4_0: speculation off, MTP, adaptive; 1, 4 and 16 clients; prompts of 512 and
of 4,096 tokens, which several clients share but for their last 64. The modes and llama.cpp are measured in turns, their
servers all alive, and compared within a turn: a shared machine changes its pace within minutes. Then a slice of the
published widths, a dense layer and one with experts, layer by layer, with a projection of all 45. `--list` names the
pieces; `--only` runs some, each within minutes, and the results gather in one file. Prints a table and, as the last
line, JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from scripts.benchmarks.real_width import bandwidth, checkpoint, clients, drafted, report, traffic
from scripts.benchmarks.real_width.cells import (
    MODES,
    SLICES,
    TAIL,
    TOKENS,
    TURNS,
    Cell,
    Results,
    cells,
    chosen,
    extras,
    in_turns,
)
from scripts.benchmarks.real_width.files import drafted_file, slice_file
from sglang_step35.bench.servers import Server, ServerPool, free_port, start, stop, wait_until_healthy

SLOTS, CONTEXT = 16, 4608
SERVER_ARGS = (
    "--device", "cpu", "--dtype", "bfloat16", "--skip-tokenizer-init", "--context-length", str(CONTEXT),
    "--max-running-requests", str(SLOTS), "--max-total-tokens", "32768", "--skip-server-warmup",
)  # fmt: skip
SLICE_ROWS = ("1", "4")


def main() -> None:
    options = parse_options()
    plan = cells(options.llama_server is not None)
    if options.list:
        print(*extras(), *(cell.name for cell in plan), sep="\n")
        return
    results = Results(options.results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout`, too, leaves no server behind
    with tempfile.TemporaryDirectory() as logs:
        pool, llama = ServerPool(Path(logs), alive=len(MODES)), Llama(Path(logs), options)
        try:
            for name in (name for name in extras() if chosen(name, options.only)):
                results.add(name, run_extra(name, options))
            wanted = (cell for cell in plan if chosen(cell.name, options.only))
            for compared in in_turns(wanted, options.turns):
                found = defaultdict(list)
                for turn, cell in compared:
                    found[cell].append(run(cell, turn, pool, llama, options))
                for cell, runs in found.items():
                    results.add(cell.name, summary(cell, runs, options))
                    print(report.line(cell.name, results.found[cell.name], results.found.get("bandwidth")), flush=True)
        finally:
            pool.stop_all()
            llama.stop()
    print(*report.table(results.found), sep="\n")
    if options.plot:
        report.plot(results.found, options.plot)
    ratios = report.ratios(results.found)
    print(json.dumps({"bench": "real_width", "threads": options.threads, "results": results.found, "ratios": ratios}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("real-width"), help="keeps the files (14 GB)")
    parser.add_argument("--results", type=Path, default=Path("real-width.json"), help="grows with every piece")
    parser.add_argument("--only", nargs="+", help="pieces by name, beginning or shell pattern")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server")
    parser.add_argument("--llama-args", default="", help="more arguments of it, separated by spaces")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=TURNS, help="of every cell")
    parser.add_argument("--tokens", type=int, help="decoded by each client, instead of what suits their number")
    parser.add_argument("--plot", type=Path, help="also write a PNG here")
    parser.add_argument("--list", action="store_true", help="name the pieces and stop")
    return parser.parse_args()


def run_extra(name: str, options: argparse.Namespace):
    kind, _, form = name.partition("/")
    if kind == "bandwidth":
        return bandwidth.measure(options.threads)
    fields = checkpoint.slice_fields(layers=2, vocabulary=128_896)
    is_slice = form in SLICES
    file = slice_file(form, options.folder, fields) if is_slice else drafted_file(form, options.folder)
    weights = traffic.read(file, fields if is_slice else drafted.fields())
    if kind == "write":
        return {"mb": round(sum(traffic.sizes(file).values()) / 1e6)}
    steps = module(options, "layers", str(file), *SLICE_ROWS)
    read = {rows: [weights.layer(0, int(rows)), weights.layer(1, int(rows)), weights.head] for rows in steps}
    return {rows: step | {"mb": [round(size / 1e6, 1) for size in read[rows]]} for rows, step in steps.items()}


def module(options: argparse.Namespace, name: str, *arguments: str):
    """What a module of this folder prints, run in a process of its own."""
    command = [sys.executable, "-m", f"scripts.benchmarks.real_width.{name}", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(cell: Cell, turn: int, pool: ServerPool, llama: "Llama", options: argparse.Namespace) -> dict[str, Any]:
    """Rates of one turn."""
    file, config = drafted_file(cell.form, options.folder), drafted.fields()
    tokens = tokens_of(cell, options)
    if cell.engine == "transformers":
        pool.stop_all()  # it has the memory to itself
        llama.stop()
        start_at = str(starts(cell, turn)[0])
        return module(options, "generate", str(file), start_at, str(cell.prompt), str(tokens)) | {"accept": None}
    texts = prompts(cell, turn, config["vocab_size"])
    if cell.engine == "llama.cpp":
        return asdict(clients.measure(llama.get(file), clients.ask_llama, texts, tokens, cell.shared))
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    before = pool.started
    server = pool.get("--model-path", str(file), *SERVER_ARGS, *MODES[cell.mode], **threads)
    server.flush_cache()
    if pool.started > before:
        clients.ask_sglang(server, drafted.text(config["vocab_size"], 0, 64), 16, 0)  # first passes are slow
    return asdict(clients.measure(server, clients.ask_sglang, texts, tokens, cell.shared))


def summary(cell: Cell, runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the turns, and every turn's rates; whole: `clients.answer_rate`, where the prefill was timed."""
    rates = {key: [run[key] for run in runs if run[key] is not None] for key in ("prefill", "decode", "accept")}
    pairs = zip(rates["prefill"], rates["decode"], strict=False)
    rates["whole"] = [round(clients.answer_rate(cell.prompt, tokens_of(cell, options), *pair), 2) for pair in pairs]
    middle = {key: round(median(values), 2) if values else None for key, values in rates.items()}
    weights = traffic.read(drafted_file(cell.form, options.folder), drafted.fields())
    read = {"mb_per_token": megabytes(cell, weights, middle["accept"])}
    right = {"right": all(run["right"] for run in runs)} if "right" in runs[0] else {}
    return middle | read | right | {"turns": {key: rates[key] for key in ("prefill", "decode", "whole")}}


def tokens_of(cell: Cell, options: argparse.Namespace) -> int:
    """Decoded by each client."""
    return options.tokens or TOKENS[cell.clients]


def megabytes(cell: Cell, weights: traffic.Traffic, accept: float | None) -> float | None:
    """Weights read for a token, where routing is uniform; None where the depth of drafting varies."""
    if cell.mode == "adaptive":
        return None
    steps = 3 if cell.mode == "mtp" else 0
    read = weights.step(cell.clients * (1 + steps)) + (weights.drafts() if steps else 0)
    return round(read / cell.clients / (accept or 1) / 1e6, 1)


def prompts(cell: Cell, turn: int, size: int) -> list[list[int]]:
    """For each client, text of its own; of a shared prompt only the last TAIL tokens."""
    first, *_ = all_starts = starts(cell, turn)
    if not cell.shared:
        return [drafted.text(size, at, cell.prompt) for at in all_starts]
    common = drafted.text(size, first, cell.prompt - TAIL)
    return [common + drafted.text(size, at, TAIL) for at in all_starts]


def starts(cell: Cell, turn: int) -> list[int]:
    return [1000 + 1900 * client + cell.prompt + 613 * turn for client in range(cell.clients)]


class Llama:
    """llama.cpp's server with SLOTS slots, of the GGUF file asked for last; for bf16 of one of that type."""

    def __init__(self, logs: Path, options: argparse.Namespace):
        self.log, self.options = logs / "llama-server.log", options
        self.file: Path | None = None
        self.server: Server | None = None

    def get(self, file: Path) -> Server:
        if self.server is None or file != self.file:
            self.stop()
            self.file, self.server = file, self._start(file)
            wait_until_healthy(self.server)
        return self.server

    def _start(self, file: Path) -> Server:
        port, options = free_port(), self.options
        if file.is_dir():
            file = drafted_file("BF16", options.folder)
        command = [
            str(options.llama_server), "-m", str(file), "--port", str(port), "--host", "127.0.0.1",
            "-t", str(options.threads), "-tb", str(options.threads), "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT),
            *options.llama_args.split(),
        ]  # fmt: skip
        process = start(command, dict(os.environ), self.log)
        return Server(tuple(command), f"http://127.0.0.1:{port}", self.log, process)

    def stop(self) -> None:
        if self.server is not None:
            stop(self.server)
        self.server = None


if __name__ == "__main__":
    main()
