"""The SwiGLU feed-forward network: dense layers and the shared expert."""

import torch.nn.functional as F
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.utils import add_prefix
from torch import Tensor, nn


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """min(silu(gate), limit) * clamp(up, -limit, limit); silu(gate) * up without a limit.

    gate, up: [..., I]. The clamp of the gate comes after silu, not before it.
    """
    gate = F.silu(gate)
    if limit is None:
        return gate * up
    return gate.clamp(max=limit) * up.clamp(min=-limit, max=limit)


class SwiGLU(SiluAndMul):
    """[T, 2 I] (gate half, up half) -> [T, I]. Kept: SGLang's kernels; added: the clamp."""

    def __init__(self, limit: float | None):
        super().__init__()
        self.limit = limit

    def forward_native(self, gate_up: Tensor) -> Tensor:
        return swiglu(*gate_up.chunk(2, dim=-1), self.limit)

    def forward_cuda(self, gate_up: Tensor) -> Tensor:
        if self.limit is None:
            return super().forward_cuda(gate_up)
        return self.forward_native(gate_up)


class MLP(nn.Module):
    """down(swiglu(gate_up(x))). Its sum over ranks is completed by the layer boundary.

    Letters: T tokens, H hidden size, I intermediate size.
    parallel_group: "tp" shards I over the ranks, "replicated" keeps it whole on each.
    """

    def __init__(
        self,
        hidden_size: int,
        size: int,
        limit: float | None,
        quant_config=None,
        prefix: str = "",
        parallel_group: str = "tp",
    ):
        super().__init__()
        shared = dict(bias=False, quant_config=quant_config, parallel_group=parallel_group)
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [size, size], prefix=add_prefix("gate_up_proj", prefix), **shared
        )
        self.down_proj = RowParallelLinear(
            size,
            hidden_size,
            reduce_results=False,
            prefix=add_prefix("down_proj", prefix),
            **shared,
        )
        self.activation = SwiGLU(limit)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H], this rank's part of the sum."""
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.activation(gate_up))
        return out
