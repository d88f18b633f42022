"""Prefill, cache hits, decode and memory against context length, and against SGLang's own attention.

    python -m scripts.benchmarks.context [--lengths 1024 8192 16384 32768] [--stock-lengths 1024 8192 16384 32768]
                                    [--plot FILE]
    python -m scripts.benchmarks.context --full-context

One server after the other, bfloat16, one request at a time, prefill in chunks of 2,048 (SGLang's
default below 20 GB): ours with MTP and without, then SGLang's torch_native attention without
speculation. That one computes the whole sequence again for every chunk and for a hit, so that
prompts past --stock-chunked-up-to go in as a single chunk, its best case, and are not repeated. The
checkpoint has random weights and the published attention (context/checkpoint.py); `--checkpoint nano`
takes the packaged one. --full-context serves the whole context of 262,144 tokens with MTP and a
sliding-window pool of 8,192, on the nano checkpoint unless told otherwise. Prints tables and ends in
one JSON line.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from scripts.benchmarks.context.checkpoint import wide_checkpoint
from scripts.benchmarks.context.report import HEADER, line, plot, ratio_table, ratios, sliding_table
from scripts.benchmarks.context.serving import Measurement, measure, warm_up
from scripts.benchmarks.context.sliding import sliding_curve
from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS, ServerPool

FULL_CONTEXT = 262144
RESERVED = 16  # SGLang refuses a request whose tokens and draft windows do not fit the context
MTP, PLAIN, STOCK, STOCK_WHOLE = "ours + MTP", "ours", "torch_native", "torch_native, one chunk"
# SGLang's own attention reads the hybrid pool wrongly, so it gets a plain one.
STOCK_ARGS = ("--attention-backend", "torch_native", "--disable-hybrid-swa-memory")
# SGLang reserves memory by the chunk size, and without one more than a small host has.
ONE_CHUNK = ("--chunked-prefill-size", "-1", "--mem-fraction-static", "0.5")
SLIDING_POOL = 8192


def main() -> None:
    options = parse_options()
    results: list[Measurement] = []
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pool = ServerPool(Path(folder))
        model = model_args(options, Path(folder))
        try:
            for variant, flags, lengths in runs(options):
                common = (*NANO_ARGS, *model, "--dtype", options.dtype)
                flags = (*common, "--chunked-prefill-size", str(options.chunk), *flags)
                server = pool.get(*flags, OMP_NUM_THREADS=str(options.threads))
                for result in measured(server, variant, lengths, options):
                    results.append(result)
                    print(line(result), flush=True)
                pool.stop_all()
        finally:
            pool.stop_all()
    finish(results, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=lengths, default="1024,8192,16384,32768", help="ours; prompt and output")
    parser.add_argument("--stock-lengths", type=lengths, default="1024,8192,16384,32768")
    parser.add_argument("--stock-chunked-up-to", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill chunk")
    parser.add_argument("--full-context", action="store_true", help="262,144 tokens instead, ours with MTP only")
    parser.add_argument("--tokens", type=int, default=96, help="decoded per length")
    parser.add_argument("--stock-tokens", type=int, default=24)
    parser.add_argument("--checkpoint", choices=["wide", "nano"], help="default: wide; nano with --full-context")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--plot", type=Path, help="also write a PNG here")
    return parser.parse_args()


def model_args(options: argparse.Namespace, folder: Path) -> tuple[str, ...]:
    """Server arguments beyond NANO_ARGS that pick the checkpoint."""
    if options.checkpoint == "nano" or (options.full_context and options.checkpoint is None):
        return ()
    return "--model-path", str(wide_checkpoint(folder / "wide"))


def lengths(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def runs(options: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...], list[int]]]:
    """(variant, server arguments, lengths) in the order to run them."""
    if options.full_context:
        yield MTP, (*MTP_ARGS, *pool_args(FULL_CONTEXT)), [FULL_CONTEXT - RESERVED]
        return
    own = pool_args(max(options.lengths))
    yield MTP, (*MTP_ARGS, *own), options.lengths
    yield PLAIN, own, options.lengths
    if options.stock_lengths:
        size = ("--max-total-tokens", str(max(options.stock_lengths) + 1024))
        chunked = [n for n in options.stock_lengths if n <= options.stock_chunked_up_to]
        whole = [n for n in options.stock_lengths if n > options.stock_chunked_up_to]
        if chunked:
            yield STOCK, (*STOCK_ARGS, *size), chunked
        if whole:
            yield STOCK_WHOLE, (*STOCK_ARGS, *size, *ONE_CHUNK), whole


def pool_args(longest: int) -> tuple[str, ...]:
    """Room for one context of the longest length in the full layers, for window and chunk in the sliding ones."""
    tokens = longest + 1024
    ratio = min(1.0, SLIDING_POOL / tokens)
    sizes = ("--max-total-tokens", str(tokens), "--swa-full-tokens-ratio", f"{ratio:.5f}")
    return (*sizes, "--context-length", str(FULL_CONTEXT))


def measured(server, variant: str, lengths: list[int], options: argparse.Namespace) -> Iterator[Measurement]:
    warm_up(server)
    tokens = options.stock_tokens if variant in (STOCK, STOCK_WHOLE) else options.tokens
    for length in lengths:
        yield measure(server, variant, length, tokens, again=variant != STOCK_WHOLE)


def finish(results: list[Measurement], options: argparse.Namespace) -> None:
    """Ratios, the sliding layers alone, plot and JSON."""
    summary = {"bench": "context", "dtype": options.dtype, "results": [asdict(r) for r in results]}
    if not options.full_context:
        summary["ratios"] = ratios(results, (PLAIN, MTP), (STOCK, STOCK_WHOLE))
        summary["sliding"] = sliding_curve()
        print(ratio_table(summary["ratios"]))
        print(sliding_table(summary["sliding"]))
        if options.plot:
            plot(results, summary["sliding"], options.plot)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
