"""Decode time of one sliding layer against context length, without a server."""

from argparse import Namespace

import torch

from scripts.benchmarks import attention as bench_attention

LENGTHS = (1024, 4096, 16384, 65536, 262144)
# Pages in random order, as after hours of serving; stock's way is timed where it takes no gigabytes.
OPTIONS = Namespace(rows=1, repeats=15, dense_up_to=65536)
PAGE = 16


@torch.inference_mode()
def sliding_curve() -> list[dict]:
    """Per length: milliseconds to plan a pass, for one layer, and for one layer read densely.

    The published sizes: 96 query heads, 8 KV heads of 128, a window of 512, bfloat16, one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for length in LENGTHS:
        pools = torch.ones(2, length + 1, bench_attention.KV_HEADS, bench_attention.SIZE, dtype=torch.bfloat16)
        table = bench_attention.slot_table(1, length, PAGE)
        rows.append({"length": length, **bench_attention.measure("sliding", pools, table, OPTIONS)})
    torch.set_num_threads(threads)
    return rows
