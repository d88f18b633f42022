"""A plain-torch Step-3.5 for training: whole sequences, float32, parameters named as in the checkpoint.

Letters: B rows, T tokens, D hidden, V vocab, H query heads, G KV groups, d head_dim, E experts, I expert width.
Numerics follow transformers' models/step3p7 (text model); the MTP chain follows the Step-3.5 report.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano.config import Shape

BLOCK = 64  # sliding attention runs on blocks of this many queries; the window must not exceed it


def linear(out_dim: int, in_dim: int) -> nn.Linear:
    """A bias-free matrix with orthogonal-scale noise (std 1/sqrt(in))."""
    layer = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.normal_(layer.weight, std=in_dim**-0.5)
    return layer


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight): zero-centred, so that zeros are the identity."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)


def inverse_frequencies(shape: Shape, full: bool) -> Tensor:
    """Rotary frequencies [rotary_dim / 2] in radians per position; llama3 scaling on full layers only."""
    share, theta = (
        (shape.rotary_full, shape.theta_full) if full else (shape.rotary_sliding, shape.theta_sliding)
    )
    dim = int(shape.head_dim * share)
    freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if not full:
        return freq
    # llama3: long wavelengths are slowed by `factor`, short ones kept, those between blended.
    turns = shape.rope_original * freq / (2 * math.pi)
    keep = ((turns - shape.rope_low) / (shape.rope_high - shape.rope_low)).clamp(0, 1)
    return freq * (keep + (1 - keep) / shape.rope_factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first cos.shape[-1] dims of x [B, T, heads, d] (half-split layout), leaves the rest."""
    r = cos.shape[-1]
    a, b = x[..., :r].chunk(2, dim=-1)
    turned = x[..., :r] * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, x[..., r:]), dim=-1) if r < x.shape[-1] else turned


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys. q, k, v [B, H, T, d] -> [B, H, T, d]; T % BLOCK == 0.

    A block of queries sees its own block and the one before it: O(T) work instead of O(T^2)."""
    b, h, t, d = q.shape
    n = t // BLOCK
    own = lambda x: x.reshape(b, h, n, BLOCK, d)
    pair = lambda x: torch.cat((F.pad(own(x), (0, 0, 0, 0, 1, 0))[:, :, :-1], own(x)), dim=3)
    i, j = torch.arange(BLOCK)[:, None] + BLOCK, torch.arange(2 * BLOCK)[None]
    seen = (j <= i) & (j > i - window)
    first = torch.arange(n)[:, None, None] == 0
    mask = seen & ~(first & (j < BLOCK))  # [n, BLOCK, 2 BLOCK]: block 0 has no predecessor
    scores = own(q) @ pair(k).transpose(-1, -2) * d**-0.5
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ pair(v)).reshape(b, h, t, d)


class Attention(nn.Module):
    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.full, self.window = shape.is_full(layer), shape.window
        self.heads = shape.heads_full if self.full else shape.heads_sliding
        self.groups, self.d = shape.kv_groups, shape.head_dim
        self.q_proj = linear(self.heads * self.d, shape.hidden)
        self.k_proj = linear(self.groups * self.d, shape.hidden)
        self.v_proj = linear(self.groups * self.d, shape.hidden)
        self.o_proj = linear(shape.hidden, self.heads * self.d)
        self.g_proj = linear(self.heads, shape.hidden)
        self.q_norm, self.k_norm = RMSNorm(self.d, shape.eps), RMSNorm(self.d, shape.eps)
        nn.init.zeros_(self.o_proj.weight)  # every block starts as the identity
        self.register_buffer("freq", inverse_frequencies(shape, self.full), persistent=False)

    def qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D], positions [T] -> q [B, H, T, d], k and v [B, G, T, d], rotated."""
        angle = positions[:, None].float() * self.freq
        cos, sin = (f(torch.cat((angle, angle), -1))[None, :, None] for f in (torch.cos, torch.sin))
        split = lambda y, heads: y.unflatten(-1, (heads, self.d))
        q = rotate(self.q_norm(split(self.q_proj(x), self.heads)), cos, sin)
        k = rotate(self.k_norm(split(self.k_proj(x), self.groups)), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), split(self.v_proj(x), self.groups).transpose(1, 2)

    def spread(self, x: Tensor) -> Tensor:
        """KV [B, G, T, d] -> [B, H, T, d]: each group serves H / G neighbouring query heads."""
        return x.repeat_interleave(self.heads // self.groups, dim=1)

    def close(self, x: Tensor, out: Tensor) -> Tensor:
        """Head-wise gate sigmoid(g_proj(x)) on out [B, H, T, d], then the output projection."""
        gated = out.transpose(1, 2) * torch.sigmoid(self.g_proj(x))[..., None]
        return self.o_proj(gated.flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x, torch.arange(x.shape[1]))
        k, v = self.spread(k), self.spread(v)
        if self.full:
            return self.close(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.close(x, sliding_attention(q, k, v, self.window))


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """min(silu(gate), L) * clamp(up, -L, L); no clamp where the layer has no limit."""
    if limit is None:
        return F.silu(gate) * up
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


class MLP(nn.Module):
    def __init__(self, shape: Shape, width: int, limit: float | None):
        super().__init__()
        self.limit = limit
        self.gate_proj, self.up_proj = linear(width, shape.hidden), linear(width, shape.hidden)
        self.down_proj = linear(shape.hidden, width)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Stack(nn.Module):
    """One stacked expert matrix, so that its name ends in `.weight` as in the checkpoint."""

    def __init__(self, experts: int, out_dim: int, in_dim: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_dim, in_dim) * std)


class MoE(nn.Module):
    """All experts are computed for all tokens and weighted by zero where not chosen: they are tiny, and this
    is two plain matrix products."""

    def __init__(self, shape: Shape, limit: float | None):
        super().__init__()
        e, i, d = shape.experts, shape.expert_width, shape.hidden
        self.top_k, self.scale, self.limit = shape.top_k, shape.router_scale, limit
        self.gate = linear(e, d)
        self.gate_proj, self.up_proj = Stack(e, i, d, d**-0.5), Stack(e, i, d, d**-0.5)
        self.down_proj = Stack(e, d, i, 0.0)
        self.router_bias = nn.Parameter(torch.zeros(e), requires_grad=False)
        self.register_buffer("load", torch.zeros(e), persistent=False)

    def route(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> weights [B, T, E]: chosen by sigmoid score + bias, weighted by the score alone."""
        scores = torch.sigmoid(self.gate(x))
        chosen = (scores + self.router_bias).topk(self.top_k, dim=-1).indices
        kept = scores * torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        if self.training:
            self.load += (kept.detach() > 0).float().sum((0, 1))
        return kept / kept.sum(-1, keepdim=True) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        gate = F.linear(x, self.gate_proj.weight.flatten(0, 1))  # [B, T, E I]
        up = F.linear(x, self.up_proj.weight.flatten(0, 1))
        act = swiglu(gate, up, self.limit).unflatten(-1, (self.gate.out_features, -1))
        weighted = (act * self.route(x)[..., None]).flatten(-2)
        return F.linear(weighted, self.down_proj.weight.transpose(0, 1).flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, shape: Shape, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        routed, shared = dict(shape.limits_routed).get(layer), dict(shape.limits_shared).get(layer)
        self.sparse = shape.is_moe(layer)
        if self.sparse:
            self.moe = MoE(shape, routed)
            self.share_expert = MLP(shape, shape.shared_width, shared)
        else:
            self.mlp = MLP(shape, shape.intermediate, shared)

    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.post_attention_layernorm(x)
        return x + (self.moe(y) + self.share_expert(y) if self.sparse else self.mlp(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x + self.self_attn(self.input_layernorm(x)))


class MTPLayer(DecoderLayer):
    """Decoder layer behind eh_proj, with its own norm before the shared head."""

    def __init__(self, shape: Shape, layer: int):
        super().__init__(shape, layer)
        self.enorm, self.hnorm = RMSNorm(shape.hidden, shape.eps), RMSNorm(shape.hidden, shape.eps)
        self.eh_proj = linear(shape.hidden, 2 * shape.hidden)
        self.transformer = nn.Module()
        self.transformer.shared_head = nn.Module()
        self.transformer.shared_head.norm = RMSNorm(shape.hidden, shape.eps)

    def forward(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """embedding and hidden [B, T, D] -> the next hidden, before the head's norm."""
        pair = torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1)
        return super().forward(self.eh_proj(pair))


class NanoStep(nn.Module):
    """Backbone plus MTP chain; state_dict names are the checkpoint's."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        backbone = [DecoderLayer(shape, i) for i in range(shape.layers)]
        mtp = [MTPLayer(shape, i) for i in range(shape.layers, shape.total_layers)]
        self.model.layers = nn.ModuleList(backbone + mtp)
        self.model.norm = RMSNorm(shape.hidden, shape.eps)
        self.lm_head = linear(shape.vocab, shape.hidden)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def backbone(self) -> list[DecoderLayer]:
        return list(self.model.layers[: self.shape.layers])

    @property
    def mtp(self) -> list[MTPLayer]:
        return list(self.model.layers[self.shape.layers :])

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> last hidden state before the final norm [B, T, D]."""
        x = self.model.embed_tokens(tokens)
        for layer in self.backbone:
            x = layer(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model.norm(hidden))

    def draft_logits(self, tokens: Tensor, hidden: Tensor) -> list[Tensor]:
        """tokens [B, >= T + 3], hidden [B, T, D] -> per layer i the logits [B, T, V] for token t + 2 + i."""
        out, t = [], hidden.shape[1]
        for i, layer in enumerate(self.mtp):
            hidden = layer(self.model.embed_tokens(tokens[:, 1 + i : 1 + i + t]), hidden)
            out.append(self.lm_head(layer.transformer.shared_head.norm(hidden)))
        return out
