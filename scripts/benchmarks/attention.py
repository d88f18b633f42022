"""Time of one layer's attention against context length: this package's plan and a dense reading of the whole context.

    python -m scripts.benchmarks.attention --rows 1 --contexts 1024 32768 --dtype bfloat16

"dense" is what SGLang's torch_native backend does: gather all keys of the request, then scaled_dot_product_attention
over them, in sliding layers with a mask. Prints a table and, as the last line, JSON. No SGLang needed.
"""

import argparse
import json
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_step35.attention.portable.kernel_calls import KVReader
from sglang_step35.attention.portable.plan import PassRows, cut_pass
from sglang_step35.config import ALL_KEYS

HEADS = {"full": 64, "sliding": 96}
KV_HEADS, SIZE, WINDOW = 8, 128, 512


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    dtype = getattr(torch, options.dtype)
    print(f"{'context':>8} {'layer':>8} {'plan ms':>9} {'layer ms':>9} {'dense ms':>9}")
    results = []
    for context in options.contexts:
        pools = torch.randn(2, options.batch * context + 1, KV_HEADS, SIZE, dtype=dtype)
        table = slot_table(options.batch, context, options.page_size)
        for kind in ("full", "sliding"):
            result = {"context": context, "layer": kind, **measure(kind, pools, table, options)}
            results.append(result)
            dense = result["dense_ms"]
            print(
                f"{context:8d} {kind:>8} {result['plan_ms']:9.3f} {result['layer_ms']:9.3f} "
                + (f"{dense:9.3f}" if dense is not None else f"{'-':>9}"),
                flush=True,
            )
    print(json.dumps({**vars(options), "results": results}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 262144])
    parser.add_argument("--rows", type=int, default=1, help="query rows per request: 1 decode, 4 verify, more: a chunk")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--page-size", type=int, default=0, help="pages in random order; 0: all slots consecutive")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dense-up-to", type=int, default=65536, help="longest context to time the dense way at")
    return parser.parse_args()


def slot_table(batch: int, context: int, page_size: int) -> torch.Tensor:
    """[batch, context] int32 slots from 1 on."""
    slots = torch.arange(batch * context, dtype=torch.int32)
    if page_size:
        pages = slots.view(-1, page_size)
        slots = pages[torch.randperm(len(pages))].flatten()
    return (slots + 1).view(batch, context)


def measure(kind: str, pools: torch.Tensor, table: torch.Tensor, options: argparse.Namespace) -> dict:
    """Milliseconds to plan a pass, to run one layer of it, and to run the layer densely."""
    earlier_keys = ALL_KEYS if kind == "full" else WINDOW - 1
    batch, context = table.shape
    rows = PassRows(torch.arange(batch), [options.rows] * batch, [context] * batch)
    q = torch.randn(rows.total, HEADS[kind], SIZE, dtype=pools.dtype)
    out, scale, reader = torch.empty_like(q), SIZE**-0.5, KVReader().of_layer(*pools)

    def plan():
        return cut_pass(rows, earlier_keys, lambda requests, positions: table[requests, positions].long())

    calls = plan()

    def layer():
        for call in calls:
            call.run(q, reader, scale, out)

    result = {"plan_ms": best_ms(plan, options.repeats), "layer_ms": best_ms(layer, options.repeats), "dense_ms": None}
    if context <= options.dense_up_to and context * options.rows <= 1 << 22:
        result["dense_ms"] = best_ms(lambda: dense(q, pools, table, earlier_keys, scale), options.repeats)
    return result


def dense(q: torch.Tensor, pools: torch.Tensor, table: torch.Tensor, earlier_keys: int, scale: float) -> None:
    """Every request by itself over its whole context."""
    context, rows = table.shape[1], len(q) // len(table)
    for own, slots in zip(q.split(rows), table, strict=True):
        k, v = (pool[slots].transpose(0, 1)[None] for pool in pools)
        mask = None
        if rows > 1 or earlier_keys >= 0:
            distance = torch.arange(context - rows, context)[:, None] - torch.arange(context)
            mask = distance >= 0
            if earlier_keys >= 0:
                mask &= distance <= earlier_keys
        scaled_dot_product_attention(own.transpose(0, 1)[None], k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def best_ms(function, repeats: int) -> float:
    """Processor time of the fastest of some runs, after one to warm up: other programs share the machine."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return round(min(times) * 1e3, 4)


if __name__ == "__main__":
    main()
