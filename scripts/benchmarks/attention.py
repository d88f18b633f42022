"""Time of one layer's attention against context length: this package's two ways, and a dense reading of everything.

    python -m scripts.benchmarks.attention --rows 1 --contexts 1024 32768 --dtype bfloat16

"in place" is the compiled kernel, where the rows are few; "gathered" is what pools get that it does not read. "dense"
is what SGLang's torch_native backend does: gather all keys of the request, then scaled_dot_product_attention over
them, in sliding layers with a mask. Prints a table and, as the last line, JSON. No SGLang needed.
"""

import argparse
import json
import time
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_step35.attention.portable.kernel_calls import KVReader
from sglang_step35.attention.portable.paged_call import SlotTable
from sglang_step35.attention.portable.plan import SHORT_ROWS, PassRows, cut_pass
from sglang_step35.config import ALL_KEYS

GROUPS = {"full": 8, "sliding": 12}
WINDOW = 512
CALL_BYTES = 4 << 20  # as the backend's
COLUMNS = {"plan_ms": "plan ms", "in_place_ms": "in place", "gathered_ms": "gathered", "dense_ms": "dense"}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    print(f"{'context':>8} {'layer':>8}", *(f"{title:>9}" for title in COLUMNS.values()))
    results = []
    for context in options.contexts:
        pools = [pool_pair(context, options) for _ in range(options.layers)]
        table = slot_table(options.batch, context, options.page_size)
        for kind in ("full", "sliding"):
            result = {"context": context, "layer": kind, **measure(kind, pools, table, options)}
            results.append(result)
            values = ("-" if result[name] is None else f"{result[name]:.4f}" for name in COLUMNS)
            print(f"{context:8d} {kind:>8}", *(f"{value:>9}" for value in values), flush=True)
    print(json.dumps({**vars(options), "results": results}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 262144])
    parser.add_argument("--rows", type=int, default=1, help="query rows per request: 1 decode, 4 verify, more: a chunk")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--layers", type=int, default=1, help="read in turn: with many, none is in a cache")
    parser.add_argument("--page-size", type=int, default=0, help="pages in random order; 0: all slots consecutive")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dense-up-to", type=int, default=65536, help="longest context to time the dense way at")
    return parser.parse_args()


def pool_pair(context: int, options: argparse.Namespace) -> torch.Tensor:
    """Keys and values [2, slots, N, D]."""
    slots = options.batch * context + 1
    return torch.randn(2, slots, options.kv_heads, options.size).to(getattr(torch, options.dtype))


def slot_table(batch: int, context: int, page_size: int) -> torch.Tensor:
    """[batch, context] int32 slots from 1 on."""
    slots = torch.arange(batch * context, dtype=torch.int32)
    if page_size:
        pages = slots.view(-1, page_size)
        slots = pages[torch.randperm(len(pages))].flatten()
    return (slots + 1).view(batch, context)


def measure(kind: str, pools: list[torch.Tensor], table: torch.Tensor, options: argparse.Namespace) -> dict:
    """Milliseconds to plan a pass, to run one layer of it in both ways, and to run the layer densely."""
    earlier_keys = ALL_KEYS if kind == "full" else WINDOW - 1
    batch, context = table.shape
    rows = PassRows(torch.arange(batch), [options.rows] * batch, [context] * batch)
    q = torch.randn(rows.total, GROUPS[kind] * options.kv_heads, options.size).to(pools[0].dtype)
    out, scale, reader = torch.empty_like(q), options.size**-0.5, KVReader()

    own = SlotTable(table.int())

    def plan(in_place: bool):
        find = lambda requests, positions: table[requests, positions].long()
        bytes_of_key = pools[0][0, 0].nbytes
        return cut_pass(rows, earlier_keys, find, CALL_BYTES // bytes_of_key, own if in_place else None)

    def layer(calls, layer_pools):
        reader.of_layer(*layer_pools)
        for call in calls:
            call.run(q, reader, scale, out)

    ways = {"in_place_ms": options.rows <= SHORT_ROWS, "gathered_ms": False}
    result = dict.fromkeys(COLUMNS)
    result["plan_ms"] = best_ms(lambda _: plan(ways["in_place_ms"]), [None], options.repeats)
    for name, in_place in ways.items():
        if in_place or name == "gathered_ms":
            result[name] = best_ms(partial(layer, plan(in_place)), pools, options.repeats)
    if context <= options.dense_up_to and context * options.rows <= 1 << 22:
        result["dense_ms"] = best_ms(lambda pair: dense(q, pair, table, earlier_keys, scale), pools, options.repeats)
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


def best_ms(function, layers: list, repeats: int) -> float:
    """Processor time of the fastest of some runs over all layers, for one, after one to warm up: other programs share
    the machine."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        for layer in layers:
            function(layer)
        times.append(time.process_time() - start)
    return round(min(times[1:]) * 1e3 / len(layers), 4)


if __name__ == "__main__":
    main()
