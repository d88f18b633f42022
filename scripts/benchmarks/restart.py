"""The next turn of a long conversation after a restart: its KV read from files, and computed anew.

    python -m scripts.benchmarks.restart [--length 20000] [--page-size 64] [--checkpoint wide] [--folder DIR]

A server with MTP and `--hicache-storage-backend file` computes a conversation of --length tokens and writes it. Then
two new servers get its next turn: one with the files, one with an empty folder. Prints a table and one JSON line.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from scripts.benchmarks.context.checkpoint import wide_checkpoint
from scripts.benchmarks.context.serving import TAIL, Stream, context_ids, stream, warm_up
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, Server, ServerPool

TOKENS = 64  # generated in a turn
QUIET_SECONDS = 3  # without a new file: everything is written


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        pool = ServerPool(Path(folder), alive=1)
        try:
            result = run(pool, Path(folder), options)
        finally:
            pool.stop_all()
    print_table(result)
    asked = {"checkpoint": options.checkpoint, "length": options.length, "dtype": options.dtype}
    print(json.dumps({"bench": "restart"} | asked | result))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=20000, help="tokens of the conversation")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--checkpoint", choices=["nano", "wide"], default="nano")
    parser.add_argument("--dtype", default="bfloat16", help="float32: both answers must be one text")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--folder", type=Path, help="where the files go for the time of the run")
    return parser.parse_args()


def run(pool: ServerPool, folder: Path, options: argparse.Namespace) -> dict:
    model = ("--model-path", str(wide_checkpoint(folder / "wide"))) if options.checkpoint == "wide" else ()
    kept, empty = folder / "kept", folder / "empty"
    ids = context_ids(options.length, seed=1)
    server = start(pool, model, kept, options)
    first = stream(server, ids, TOKENS)
    written = wait_until_written(kept)
    turn = ids + first.ids + context_ids(TAIL, seed=50)
    pool.stop_all()
    answers = {"first turn, computed": first}
    for name, files in {"next turn, read": kept, "next turn, computed": empty}.items():
        answers[name] = stream(start(pool, model, files, options), turn, TOKENS)
        pool.stop_all()
    shutil.rmtree(kept)
    read, computed = (answers[name].ids for name in ("next turn, read", "next turn, computed"))
    found = {name: measured(answer) for name, answer in answers.items()}
    return {"turns": found, "same_text": read == computed, "files": written[0], "mib": written[1] >> 20}


def start(pool: ServerPool, model: tuple[str, ...], files: Path, options: argparse.Namespace) -> Server:
    tokens = options.length + 4096
    server = pool.get(
        *NANO_ARGS, *model, *MTP_ARGS, "--dtype", options.dtype, "--max-total-tokens", str(tokens),
        "--swa-full-tokens-ratio", f"{min(1.0, 8192 / tokens):.5f}", "--chunked-prefill-size", "2048",
        "--page-size", str(options.page_size), "--enable-hierarchical-cache", "--hicache-ratio", "3",
        "--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete",
        "--hicache-storage-backend-extra-config", json.dumps({"file_storage_path": str(files)}),
        OMP_NUM_THREADS=str(options.threads),
    )  # fmt: skip
    warm_up(server)
    return server


def wait_until_written(folder: Path) -> tuple[int, int]:
    """Files and bytes, once no more come."""
    seen, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        if seen != (seen := len(list(folder.iterdir()))):
            since = time.monotonic()
        time.sleep(0.2)
    return seen, sum(file.stat().st_size for file in folder.iterdir())


def measured(turn: Stream) -> dict:
    sources = turn.meta.get("cached_tokens_details") or {}
    return {
        "seconds": round(turn.first, 3),
        "prompt_tokens": turn.meta["prompt_tokens"],
        "read_tokens": sources.get("storage", 0),
        "accept_length": round(TOKENS / turn.meta["spec_verify_ct"], 2),
    }


def print_table(result: dict) -> None:
    print("| turn | prompt | read from files | first token after | accept length |\n|---|---|---|---|---|")
    for name, turn in result["turns"].items():
        print(
            f"| {name} | {turn['prompt_tokens']} | {turn['read_tokens']} | {turn['seconds']} s "
            f"| {turn['accept_length']} |"
        )
    answers = "the same answer" if result["same_text"] else "different answers"
    print(f"{result['files']} files, {result['mib']} MiB; {answers} read and computed")


if __name__ == "__main__":
    main()
