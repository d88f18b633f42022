"""A plain-torch Step-3.5 for training: whole sequences, float32, parameters named as in the checkpoint.

Letters: B rows, T tokens, D hidden, V vocab, H query heads, G KV groups, d head_dim, E experts, I expert width.
Numerics follow transformers' models/step3p7 (text model); the MTP chain follows the Step-3.5 report.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.nano.config import Shape

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
    share, theta = (shape.rotary_full, shape.theta_full) if full else (shape.rotary_sliding, shape.theta_sliding)
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
    """Causal attention over the last `window` keys. q [B, G, R, T, d], k and v [B, G, T, d] -> like q; T % BLOCK == 0.

    A block of queries sees its own block and the one before it: O(T) work instead of O(T^2). The R = H / G heads
    of a group are rows of one product, so that no key or value is copied."""
    b, g, r, t, d = q.shape
    n = t // BLOCK
    pair = lambda x: torch.cat((F.pad(x, (0, 0, BLOCK, 0))[:, :, :t], x), -1).reshape(b * g * n, BLOCK, 2, d)
    keys, values = (pair(x).transpose(1, 2).reshape(b * g * n, 2 * BLOCK, d) for x in (k, v))
    rows = q.reshape(b, g, r, n, BLOCK, d).transpose(2, 3).reshape(b * g * n, r * BLOCK, d)
    i, j = torch.arange(BLOCK)[:, None] + BLOCK, torch.arange(2 * BLOCK)[None]
    seen = (j <= i) & (j > i - window)
    first = torch.arange(n)[:, None, None] == 0
    mask = (seen & ~(first & (j < BLOCK)))[:, None]  # [n, 1, BLOCK, 2 BLOCK]: block 0 has no predecessor
    scores = (torch.bmm(rows, keys.transpose(1, 2)) * d**-0.5).reshape(b * g, n, r, BLOCK, 2 * BLOCK)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).reshape(b * g * n, r * BLOCK, 2 * BLOCK)
    return torch.bmm(weights, values).reshape(b, g, n, r, BLOCK, d).transpose(2, 3).reshape(b, g, r, t, d)


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

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, D], positions [T] -> q [B, H, T, d], k and v [B, G, T, d], rotated; gate [B, T, H].

        The four matrices are joined for one product: on a CPU one wide product is faster than four narrow ones."""
        parts = (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        joined = F.linear(x, torch.cat([p.weight for p in parts]))
        q, k, v, gate = joined.split([p.out_features for p in parts], dim=-1)
        angle = positions[:, None].float() * self.freq
        cos, sin = (f(torch.cat((angle, angle), -1))[None, :, None] for f in (torch.cos, torch.sin))
        heads = lambda y: y.unflatten(-1, (-1, self.d))
        q, k = rotate(self.q_norm(heads(q)), cos, sin), rotate(self.k_norm(heads(k)), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), heads(v).transpose(1, 2), torch.sigmoid(gate)

    def close(self, out: Tensor, gate: Tensor) -> Tensor:
        """out [B, H, T, d] times its head's gate [B, T, H], then the output projection."""
        return self.o_proj((out.transpose(1, 2) * gate[..., None]).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x, torch.arange(x.shape[1]))
        if self.full:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = sliding_attention(q.unflatten(1, (self.groups, -1)), k, v, self.window).flatten(1, 2)
        return self.close(out, gate)


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
        gate, up = F.linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight))).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up, self.limit))


class Stack(nn.Module):
    """One stacked expert matrix, so that its name ends in `.weight` as in the checkpoint."""

    def __init__(self, experts: int, out_dim: int, in_dim: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_dim, in_dim) * std)


class MoE(nn.Module):
    """All experts are computed for all tokens and weighted by zero where not chosen: they are tiny, and together
    with the router and the shared expert this is two plain matrix products."""

    def __init__(self, shape: Shape, limit: float | None):
        super().__init__()
        e, i, d = shape.experts, shape.expert_width, shape.hidden
        self.top_k, self.scale, self.limit = shape.top_k, shape.router_scale, limit
        self.gate = linear(e, d)
        self.gate_proj, self.up_proj = Stack(e, i, d, d**-0.5), Stack(e, i, d, d**-0.5)
        self.down_proj = Stack(e, d, i, 0.0)
        self.router_bias = nn.Parameter(torch.zeros(e), requires_grad=False)
        self.register_buffer("load", torch.zeros(e), persistent=False)

    def route(self, scores: Tensor) -> Tensor:
        """Sigmoid scores [B, T, E] -> weights [B, T, E]: chosen by score + bias, weighted by the score alone."""
        chosen = (scores + self.router_bias).topk(self.top_k, dim=-1).indices
        kept = scores * torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        if self.training:
            self.load += (kept.detach() > 0).float().sum((0, 1))
        return kept / kept.sum(-1, keepdim=True) * self.scale

    def forward(self, x: Tensor, shared: MLP) -> Tensor:
        """x [B, T, D] -> routed plus shared experts' output [B, T, D]."""
        stacks = (self.gate_proj.weight.flatten(0, 1), self.up_proj.weight.flatten(0, 1))
        matrices = (*stacks, shared.gate_proj.weight, shared.up_proj.weight, self.gate.weight)
        joined = F.linear(x, torch.cat(matrices))
        gate, up, shared_gate, shared_up, scores = joined.split([len(m) for m in matrices], dim=-1)
        act = swiglu(gate, up, self.limit).unflatten(-1, (self.gate.out_features, -1))
        weighted = (act * self.route(torch.sigmoid(scores))[..., None]).flatten(-2)
        both = torch.cat((weighted, swiglu(shared_gate, shared_up, shared.limit)), dim=-1)
        down = self.down_proj.weight.transpose(0, 1).flatten(1)  # [D, E I]
        return F.linear(both, torch.cat((down, shared.down_proj.weight), dim=1))


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
        return x + (self.moe(y, self.share_expert) if self.sparse else self.mlp(y))

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
