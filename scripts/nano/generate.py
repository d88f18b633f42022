"""Batched sampling from the backbone with a key-value cache, one token a step."""

from __future__ import annotations

import torch
from torch import Tensor

from scripts.nano.model import Attention, NanoStep


def attend(layer: Attention, x: Tensor, cache: Tensor, t: int) -> Tensor:
    """One query a row. x [B, 1, D] at position t; cache [2, B, G, T, d] is written at t -> [B, 1, D]."""
    q, k, v, gate = layer.project(x, torch.tensor([t]))
    cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
    first = 0 if layer.full else max(0, t + 1 - layer.window)
    k, v = cache[0, :, :, first : t + 1], cache[1, :, :, first : t + 1]
    grouped = q.unflatten(1, (layer.groups, -1)).squeeze(3)  # [B, G, H/G, d]
    weights = (grouped @ k.transpose(-1, -2) * layer.d**-0.5).softmax(-1)
    return layer.close((weights @ v).flatten(1, 2)[:, :, None], gate)


def step(model: NanoStep, tokens: Tensor, caches: list[Tensor], t: int) -> Tensor:
    """tokens [B] at position t -> logits [B, V] for position t + 1."""
    x = model.model.embed_tokens(tokens)[:, None]
    for layer, cache in zip(model.backbone, caches, strict=True):
        x = layer.feed_forward(x + attend(layer.self_attn, layer.input_layernorm(x), cache, t))
    return model.logits(x)[:, 0]


def pick(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """logits [B, V] -> ids [B]; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model: NanoStep, prompts: list[list[int]], length: int, temperature: float, seed: int) -> Tensor:
    """Continues each prompt to `length` tokens [B, length]. Prompts are fed a token at a time, so rows of
    different prompt length need no padding."""
    shape, b = model.shape, len(prompts)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(b, length, dtype=torch.long)
    lengths = torch.tensor([len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    caches = [torch.zeros(2, b, shape.kv_groups, length, shape.head_dim) for _ in range(shape.layers)]
    for t in range(length - 1):
        # Logits are wanted only from the shortest prompt's end on, but the cache needs every step.
        chosen = pick(step(model, tokens[:, t], caches, t), temperature, generator)
        tokens[:, t + 1] = torch.where(lengths > t + 1, tokens[:, t + 1], chosen)
    return tokens.clone()
