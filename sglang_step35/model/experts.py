"""The routed experts in plain torch, for devices without SGLang's fused MoE kernels.

SGLang's own plain-torch path ignores the SwiGLU clamp and visits every expert in a Python loop.
Letters: T tokens, k chosen experts of a token, E experts of this rank, H hidden size,
I intermediate size, N = T k rows.
"""

import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.platforms import current_platform
from torch import Tensor

from sglang_step35.model.mlp import swiglu
from sglang_step35.model.product import as_ggml, is_large
from sglang_step35.packed import amx_rows, ik_kernel, ik_rows
from sglang_step35.packed.ik_check import multiplies_bfloat16, usable

# What one small matrix product costs in Python and dispatch, in multiplications of a CPU core.
CALL_COST = 160_000
LARGE = 1 << 17  # weights of one of an expert's matrices: a call of ggml's runs all chosen experts
ROWS_IN_TURN = 8  # of an expert, on average, from which on more calls cost less than larger results between them


def runs_plain_torch() -> bool:
    """Whether this platform runs SGLang's layers on their plain-torch paths."""
    return current_platform.is_out_of_tree() and current_platform.get_dispatch_key_name() == "native"


class PlainExperts(UnquantizedFusedMoEMethod):
    """Unquantised experts. Kept: SGLang's parameters and loading; replaced: the plain-torch path."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if is_large(layer.w2_weight, LARGE):
            return
        # [E, H, I] in memory order [H, E, I]: `dense_experts` then reads it as [H, E I] in place.
        layer.w2_weight.data = layer.w2_weight.data.transpose(0, 1).contiguous().transpose(0, 1)

    def forward_native(self, layer: torch.nn.Module, dispatch_output) -> StandardCombineInput:
        weights, ids, *_ = dispatch_output.topk_output
        return StandardCombineInput(hidden_states=self.run(layer, dispatch_output.hidden_states, weights, ids))

    def run(self, layer: torch.nn.Module, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `run_experts`."""
        limit = layer.moe_runner_config.gemm1_clamp_limit
        return run_experts(x, layer.w13_weight, layer.w2_weight, weights, ids, limit)


def run_experts(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
    """sum_j weights[t, j] * expert ids[t, j] of x[t].

    x: [T, H]. w13: [E, 2 I, H], gate rows before up rows. w2: [E, H, I]. weights: [T, k] float32.
    ids: [T, k] integer, -1 for experts of other ranks. Returns [T, H] in x's dtype.
    """
    large = x.dtype is torch.bfloat16 and is_large(w2, LARGE)
    if large and _ggml_is_faster(ids, w2) and usable():
        run = ggml_experts
    elif large and ids.numel() >= ROWS_IN_TURN * len(w2):
        run = experts_in_turn
    else:
        run = dense_experts if _dense_is_cheaper(ids, w2) else grouped_experts
    return run(x, w13, w2, weights, ids, limit)


def dense_experts(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
    """`run_experts` with two products: all experts on all tokens, most of them times 0."""
    experts, rows, _ = w13.shape
    gate, up = F.linear(x, w13.flatten(0, 1)).view(-1, experts, 2, rows // 2).unbind(2)
    # Column E collects what is not ours: -1 modulo E + 1 is E.
    share = weights.new_zeros(len(x), experts + 1).scatter_(1, ids.long() % (experts + 1), weights)
    hidden = swiglu(gate, up, limit) * share[:, :experts, None]  # [T, E, I]
    return F.linear(hidden.flatten(1).to(x.dtype), w2.transpose(0, 1).flatten(1))


def grouped_experts(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
    """`run_experts` with each chosen expert run once, on its own tokens."""
    order, chosen = _by_expert(ids, len(w13))
    if not chosen:
        return torch.zeros_like(x)
    used, sizes = zip(*chosen, strict=True)
    token = order // ids.shape[1]  # [N]
    parts = zip(x[token].split(sizes), used, strict=True)
    gate, up = torch.cat([F.linear(part, w13[expert]) for part, expert in parts]).chunk(2, dim=-1)
    parts = zip(swiglu(gate, up, limit).split(sizes), used, strict=True)
    out = torch.cat([F.linear(part, w2[expert]) for part, expert in parts])  # [N, H]
    out = out * weights.flatten()[order].unsqueeze(-1)
    return out.new_zeros(x.shape).index_add_(0, token, out).to(x.dtype)


def experts_in_turn(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
    """`grouped_experts`, each expert from beginning to end: more calls, but what lies between them stays in a cache."""
    order, chosen = _by_expert(ids, len(w13))
    used, sizes = zip(*chosen, strict=True) if chosen else ((), ())
    shares = weights.flatten()[order].unsqueeze(-1).split(sizes)
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert, token, share in zip(used, (order // ids.shape[1]).split(sizes), shares, strict=True):
        gate, up = F.linear(x[token], w13[expert]).chunk(2, dim=-1)
        out.index_add_(0, token, F.linear(swiglu(gate, up, limit), w2[expert]) * share)
    return out.to(x.dtype)


def ggml_experts(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float | None) -> Tensor:
    """`run_experts` in one call of ggml's kernels."""
    gate, up = (as_ggml(half) for half in w13.chunk(2, dim=1))
    return ik_kernel.experts(x, gate, up, as_ggml(w2), weights, ids, limit)


def _by_expert(ids: Tensor, experts: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Places [N] in the flat ids, sorted by expert, and (expert, its places) of each that is chosen."""
    owner = ids.flatten() % (experts + 1)
    counts = owner.bincount(minlength=experts + 1).tolist()[:experts]
    return owner.argsort()[: sum(counts)], [(expert, count) for expert, count in enumerate(counts) if count]


def _ggml_is_faster(ids: Tensor, w2: Tensor) -> bool:
    """As many rows of an expert as `ik_rows.py` takes, or torch without bfloat16 instructions, or those of AMX."""
    return ids.numel() <= ik_rows.ROWS * len(w2) or not multiplies_bfloat16() or amx_rows.supported()


def _dense_is_cheaper(ids: Tensor, w2: Tensor) -> bool:
    """Whether the products `grouped_experts` saves cost less than its calls."""
    (tokens, top_k), (experts, hidden, size) = ids.shape, w2.shape
    saved = tokens * max(0, experts - top_k) * 3 * hidden * size
    calls = 5 + 2 * min(experts, tokens * top_k)
    return saved < calls * CALL_COST
