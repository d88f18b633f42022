"""Step-3.5's decoder layer in plain torch, straight from config.json and the checkpoint's names.

Float32, one sequence at a time, no cache, no batching, no code of the package under test. Letters: T rows (tokens),
H hidden, Q query heads, K key/value heads, D channels of a head, E experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerFields:
    """What config.json says about one layer; `window` counts keys, the query's own among them."""

    heads: int
    groups: int
    head_dim: int
    window: int | None
    inv_freq: Tensor  # [rotated channels / 2], scaled where llama3 scaling applies
    eps: float
    top_k: int | None  # None: dense
    scaling_factor: float
    limit: float
    limit_shared: float


def layer_fields(fields: Mapping[str, Any], index: int) -> LayerFields:
    """The fields of layer `index`, MTP layers included."""
    kind = fields["layer_types"][index]
    sliding = kind == "sliding_attention"
    heads = fields["attention_other_setting"] if sliding else fields
    rotated = int(heads["head_dim"] * fields["partial_rotary_factors"][index])
    inv_freq = fields["rope_theta"][index] ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    if kind in fields["yarn_only_types"]:
        inv_freq = llama3(inv_freq, fields["rope_scaling"])
    sparse = str(index) in fields["moe_layers_enum"].split(",")

    def clamp(name: str) -> float:
        return (fields[name][index] if fields.get(name) else 0) or math.inf

    return LayerFields(
        heads=heads["num_attention_heads"],
        groups=heads["num_attention_groups"],
        head_dim=heads["head_dim"],
        window=fields["sliding_window"] if sliding else None,
        inv_freq=inv_freq,
        eps=fields.get("rms_norm_eps", 1e-5),
        top_k=fields["moe_top_k"] if sparse else None,
        scaling_factor=fields["moe_router_scaling_factor"],
        limit=clamp("swiglu_limits"),
        limit_shared=clamp("swiglu_limits_shared"),
    )


def llama3(inv_freq: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = original * inv_freq / (2 * math.pi)  # full turns over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zero-centred: the scale is 1 + weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def rotate(x: Tensor, inv_freq: Tensor) -> Tensor:
    """RoPE on the first channels of x [heads, T, D]; row t has position t. Channel pairs are (i, i + half)."""
    half = inv_freq.numel()
    angle = torch.arange(x.shape[1])[:, None] * inv_freq  # [T, half]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(
        (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest), dim=-1
    )


def attention(x: Tensor, w: Weights, layer: LayerFields) -> Tensor:
    """Grouped-query attention with q/k norm, window and head gate; x [T, H] is the normed input, result [T, H]."""
    rows = x.shape[0]

    def heads(name: str, count: int) -> Tensor:
        return (x @ w[f"self_attn.{name}_proj.weight"].T).view(rows, count, layer.head_dim).transpose(0, 1)

    q = rms_norm(heads("q", layer.heads), w["self_attn.q_norm.weight"], layer.eps)  # [Q, T, D]
    k = rms_norm(heads("k", layer.groups), w["self_attn.k_norm.weight"], layer.eps)  # [K, T, D]
    q, k = rotate(q, layer.inv_freq), rotate(k, layer.inv_freq)
    k, v = (t.repeat_interleave(layer.heads // layer.groups, dim=0) for t in (k, heads("v", layer.groups)))
    distance = torch.arange(rows)[:, None] - torch.arange(rows)  # query row minus key row
    seen = (distance >= 0) & (distance < (layer.window or rows))
    scores = (q @ k.transpose(1, 2) / math.sqrt(layer.head_dim)).masked_fill(~seen, -math.inf)
    out = (scores.softmax(-1) @ v).transpose(0, 1)  # [T, Q, D]
    gate = torch.sigmoid(x @ w["self_attn.g_proj.weight"].T)  # [T, Q]
    return (out * gate[..., None]).flatten(1) @ w["self_attn.o_proj.weight"].T


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float) -> Tensor:
    """min(silu(gate), L) * clamp(up, -L, L), then down."""
    return (silu(x @ gate.T).clamp(max=limit) * (x @ up.T).clamp(-limit, limit)) @ down.T


def experts(x: Tensor, w: Weights, layer: LayerFields) -> Tensor:
    """Routed experts, chosen by score + bias and weighted by the score alone, plus the shared expert; [T, H]."""
    scores = torch.sigmoid(x @ w["moe.gate.weight"].T)  # [T, E]
    chosen = (scores + w["moe.router_bias"]).topk(layer.top_k).indices
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(-1, keepdim=True) * layer.scaling_factor
    stacks = [w[f"moe.{name}_proj.weight"] for name in ("gate", "up", "down")]
    routed = torch.stack(
        [
            sum(weights[t, j] * swiglu(x[t], *(stack[e] for stack in stacks), layer.limit) for j, e in enumerate(row))
            for t, row in enumerate(chosen.tolist())
        ]
    )
    shared = (w[f"share_expert.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return routed + swiglu(x, *shared, layer.limit_shared)


def decoder_layer(x: Tensor, w: Weights, layer: LayerFields) -> Tensor:
    """One layer on a whole sequence: x [T, H], row t at position t, residuals included."""
    x = x + attention(rms_norm(x, w["input_layernorm.weight"], layer.eps), w, layer)
    normed = rms_norm(x, w["post_attention_layernorm.weight"], layer.eps)
    if layer.top_k is not None:
        return x + experts(normed, w, layer)
    dense = (w[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return x + swiglu(normed, *dense, layer.limit_shared)


def mtp_layer(embeds: Tensor, hidden: Tensor, w: Weights, layer: LayerFields) -> Tensor:
    """MTP layer before its shared_head norm: embeds and hidden [T, H] -> [T, H]."""
    parts = rms_norm(embeds, w["enorm.weight"], layer.eps), rms_norm(hidden, w["hnorm.weight"], layer.eps)
    return decoder_layer(torch.cat(parts, -1) @ w["eh_proj.weight"].T, w, layer)
