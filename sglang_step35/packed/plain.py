"""`kernel.py` in plain torch, in float32: the reference, what float32 models run on, and the fallback.

A block of rows is unpacked to float32, multiplied and dropped, so that no float copy of a whole matrix exists.
Letters: T tokens, k chosen experts of a token, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_step35.model.mlp import swiglu
from sglang_step35.packed.tensor import PackedTensor

BLOCK_WEIGHTS = 1 << 20  # unpacked at a time: 4 MB of float32, which stays in a CPU's cache


def linear(x: Tensor, parts: Sequence[PackedTensor]) -> Tensor:
    """See `kernel.linear`."""
    wide = x.float()
    # One buffer from the start: small results kept between the large temporaries would leave gigabytes of heap in
    # pieces too small for the next block.
    out = wide.new_empty(len(wide), sum(part.shape[0] for part in parts))
    start = 0
    for part in parts:
        for block in _row_blocks(part):
            end = start + block.shape[0]
            out[:, start:end] = F.linear(wide, block.dequantize())
            start = end
    return out.to(x.dtype)


def experts(
    x: Tensor,
    gate: PackedTensor,
    up: PackedTensor,
    down: PackedTensor,
    weights: Tensor,
    ids: Tensor,
    limit: float | None,
) -> Tensor:
    """See `kernel.experts`; each chosen expert is unpacked once."""
    wide = x.float()
    out = torch.zeros_like(wide)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rows = wide[token]
        hidden = swiglu(linear(rows, (gate[expert],)), linear(rows, (up[expert],)), limit)
        out.index_add_(0, token, linear(hidden, (down[expert],)) * weights[token, slot].unsqueeze(-1))
    return out.to(x.dtype)


def _row_blocks(part: PackedTensor):
    rows, columns = part.shape
    step = max(1, BLOCK_WEIGHTS // columns)
    return (part[start : start + step] for start in range(0, rows, step))
