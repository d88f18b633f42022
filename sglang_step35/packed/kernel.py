"""Multiplying by packed weights: the one interface of everything that does it, and which kernel runs.

ggml's kernels where the library can be used (`ik_check.py`) and the activations are not float32: they round each row's
activations to 8 bits for types of 8 bits and fewer, within what bfloat16 activations cost. Else plain torch, exact.
Letters: T tokens, k chosen experts of a token, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from sglang_step35.packed import ik_kernel, plain, wide_rows
from sglang_step35.packed.ggml import GGMLTensor
from sglang_step35.packed.ik_check import multiplies_bfloat16, usable
from sglang_step35.packed.ik_rows import ROWS
from sglang_step35.packed.tensor import PackedTensor


def linear(x: Tensor, parts: Sequence[PackedTensor]) -> Tensor:
    """x [T, columns] times the transpose of the parts [rows, columns], one below the other -> [T, all rows].

    Summed in float32, returned in x's dtype. The parts of a fused layer may have different types.
    """
    if x.dtype is torch.float32 or not usable():
        return plain.linear(x, parts)
    by_torch = [_torch_is_faster(x, part) for part in parts]
    if all(by_torch):
        return wide_rows.linear(x, parts)
    if not any(by_torch) and all(ik_kernel.reads(part) for part in parts):
        return ik_kernel.linear(x, parts)
    if len(parts) == 1:
        return plain.linear(x, parts)
    return torch.cat([linear(x, (part,)) for part in parts], dim=-1)


def is_native(x: Tensor) -> bool:
    """Whether torch is ahead with bfloat16 weights: by the CPU's instructions, beyond what `ik_rows.py` takes."""
    return x.dtype is torch.bfloat16 and len(x) > ROWS and multiplies_bfloat16()


def _torch_is_faster(x: Tensor, part: PackedTensor) -> TypeGuard[GGMLTensor]:
    return is_native(x) and isinstance(part, GGMLTensor) and ik_kernel.reads(part) and wide_rows.takes(len(x), part)


def gather(ids: Tensor, table: PackedTensor) -> Tensor:
    """Rows ids [...] of the table [V, H] -> [..., H] float32, the same numbers by either way."""
    if usable() and isinstance(table, GGMLTensor) and ik_kernel.reads(table):
        return ik_kernel.gather(ids, table)
    return table[ids].dequantize()


def experts(
    x: Tensor,
    gate: PackedTensor,
    up: PackedTensor,
    down: PackedTensor,
    weights: Tensor,
    ids: Tensor,
    limit: float | None,
) -> Tensor:
    """sum_j weights[t, j] * expert ids[t, j] of x[t], in x's dtype.

    x: [T, H]. gate, up: [E, I, H]. down: [E, H, I]. weights: [T, k] float32. ids: [T, k], -1 for none.
    """
    fast = x.dtype is not torch.float32 and usable() and ik_kernel.reads_experts(gate, up, down)
    run = ik_kernel.experts if fast else plain.experts
    return run(x, gate, up, down, weights, ids, limit)
