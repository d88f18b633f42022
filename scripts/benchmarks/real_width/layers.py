"""Milliseconds of every layer of a packed checkpoint for a step of a few rows, with 512 keys a row.

    python -m scripts.benchmarks.real_width.layers FILE [ROWS ...]

Prints JSON {rows: {"ms": of each layer .., of embedding and head, "bandwidth": GB/s}}, medians; memory is read once
between the steps, because a machine's pace changes. Tokens are random and weights larger than the caches, so that every
step reads other experts from memory.
"""

import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from torch import Tensor, nn

from scripts.benchmarks.real_width import bandwidth
from sglang_step35.model import single_rank
from sglang_step35.model.graphed_layers import GraphedLayers
from tests.support import model_host

KEYS = 512
WARM, STEPS = 1, 25
READ = 1 << 28  # bytes
SECONDS = 40  # for a number of rows: slow kernels get fewer steps


class Context:
    """An attention backend whose requests all have the same 512 keys."""

    def __init__(self):
        self.keys: tuple[Tensor, Tensor] | None = None

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_unused) -> Tensor:
        heads, groups, dim = layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim
        if self.keys is None:
            self.keys = torch.randn(2, 1, groups, KEYS, dim, dtype=q.dtype).unbind()
        q = q.view(1, -1, heads, dim).transpose(1, 2)
        return F.scaled_dot_product_attention(q, *self.keys, enable_gqa=True)[0].transpose(0, 1).flatten(1)


@torch.inference_mode()
def measure(model: nn.Module, rows: int) -> dict:
    """Of steps of so many rows."""
    backbone, head = model.model, model.lm_head
    layers = [GraphedLayers((layer,)) for layer in backbone.layers]
    steps, backend, begun = [], Context(), time.perf_counter()
    rates, buffer = [], torch.zeros(READ // 4)
    while len(steps) <= WARM or (len(steps) < WARM + STEPS and time.perf_counter() - begun < SECONDS):
        batch = model_host.batch_of(torch.randint(0, model.spec.vocab_size, (rows,)).tolist())
        with forward_context(ForwardContext(attn_backend=backend), forward_batch=batch):
            marks = [time.perf_counter()]
            backbone.rows.start(batch.positions)
            x = backbone.embed_tokens(batch.input_ids)
            marks.append(time.perf_counter())
            for layer in layers:
                x = layer(x, batch)
                marks.append(time.perf_counter())
            single_rank.logits(backbone.norm(x), head)
            marks.append(time.perf_counter())
        before, *of_layers, behind = (end - start for start, end in pairwise(marks))
        steps.append([*of_layers, before + behind])
        rates.append(bandwidth.rate(buffer))
    times = [round(1000 * statistics.median(times), 3) for times in zip(*steps[WARM:], strict=True)]
    return {"ms": times, "bandwidth": round(statistics.median(rates), 2)}


def main(path: str, *rows: str) -> None:
    file = Path(path)
    model = (model_host.load_gguf if file.is_file() else model_host.load)(file, dtype="bfloat16")
    print(json.dumps({int(count): measure(model, int(count)) for count in rows or ("1",)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
