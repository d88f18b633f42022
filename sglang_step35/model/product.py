"""Products by unquantised weights: torch's own, or ggml's graphs where those are faster.

One core reads weights for one row at 10 GB/s by torch's bfloat16 product and at 22 to 30 by `ik_rows.py`, which takes
up to 64 rows (Zen 4). For more torch is ahead on CPUs with bfloat16 instructions, and elsewhere far behind ggml's own
kernel. Small products stay torch's, because a call of ggml's costs 25 microseconds. Letters: T tokens, N rows,
K columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_step35.packed import ik_kernel, kernel
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.ik_check import usable
from sglang_step35.packed.parameter import PackedParameter

LARGE = 1 << 20  # weights of a matrix


def is_packed(layer: nn.Module) -> bool:
    """Whether a linear layer or a table keeps its file's packed rows."""
    return isinstance(getattr(layer, "qweight", None), PackedParameter)


def of_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """x [T, K] times the transpose of a layer's weights [N, K], packed or not -> [T, N] in x's dtype."""
    return kernel.linear(x, layer.qweight.rows()) if is_packed(layer) else linear(x, layer.weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times the transpose of weight [N, K] -> [T, N] in x's dtype."""
    large = is_large(weight, LARGE) and x.dtype is torch.bfloat16
    if not large or kernel.is_native(x) or not usable():
        return F.linear(x, weight)
    return ik_kernel.linear(x, (as_ggml(weight),))


def is_large(weight: Tensor, least: int) -> bool:
    """Whether ggml's kernels may be worth their call for such a matrix [N, K], or each of a stack [E, N, K]:
    one of `least` weights."""
    return weight.shape[-1] * weight.shape[-2] >= least and weight.dtype is torch.bfloat16


def as_ggml(weight: Tensor) -> GGMLTensor:
    """bfloat16 weights [.., N, K] with their rows in one piece, in place."""
    return GGMLTensor(TYPES["BF16"], weight.view(torch.uint8))
