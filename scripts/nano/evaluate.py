"""What the checkpoint is worth: held-out loss, agreement of the heads, accept length, loops.

Accept length needs no draft loop. On text the backbone wrote itself, a draft chain started at position t sees
exactly the true tokens as long as it has been right so far, so one teacher-forced pass gives every head's
draft, and the simulated verify rounds equal the real ones (with the KV of rejected rows recomputed).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nano.generate import generate
from nano.model import BLOCK, NanoStep


def trim(tokens: Tensor, extra: int) -> int:
    """Longest T with T + extra tokens available and T a multiple of the attention block."""
    return (tokens.shape[1] - extra) // BLOCK * BLOCK


@torch.inference_mode()
def heldout_loss(model: NanoStep, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats a token; rows [B, >= T + 1]."""
    t = trim(rows, 1)
    losses = []
    for part in rows.split(16):
        logits = model.logits(model.hidden(part[:, :t]))
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1 : t + 1].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


@torch.inference_mode()
def choices(model: NanoStep, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy choices on rows [B, >= T + 4]: backbone [B, T] (for token t + 1), heads [3, B, T] (for t + 2 + i)."""
    t = trim(rows, 4)
    backbone, heads = [], []
    for part in rows.split(16):
        hidden = model.hidden(part[:, :t])
        backbone.append(model.logits(hidden).argmax(-1))
        heads.append(torch.stack([d.argmax(-1) for d in model.draft_logits(part, hidden)]))
    return torch.cat(backbone), torch.cat(heads, dim=1)


def agreement(model: NanoStep, rows: Tensor) -> list[float]:
    """Share of positions where head i chooses what the backbone chooses for the same token."""
    backbone, heads = choices(model, rows)
    t = backbone.shape[1]
    return [float((heads[i, :, : t - 1 - i] == backbone[:, 1 + i :]).float().mean()) for i in range(len(heads))]


def accept_lengths(tokens: list[int], drafts: list[list[int]], start: int, end: int) -> list[int]:
    """Verify rounds over tokens[start:end]; drafts[i][t] is head i's draft for token t + 2 + i. Each round
    yields the accepted drafts plus the backbone's own token."""
    t, rounds = start - 1, []  # t: the last verified position; token t + 1 is already chosen
    while t + 1 + len(drafts) < end:
        accepted = 0
        while accepted < len(drafts) and drafts[accepted][t] == tokens[t + 2 + accepted]:
            accepted += 1
        rounds.append(accepted + 1)
        t += accepted + 1
    return rounds


def repeated_ngrams(rows: list[list[int]], n: int = 8) -> float:
    """Share of n-grams that occurred earlier in the same row."""
    total = repeated = 0
    for row in rows:
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    return repeated / max(total, 1)


def speculation(model: NanoStep, prompts: list[list[int]], new: int, temperature: float, seed: int) -> dict:
    """Continues the prompts and simulates MTP-3 on the result.

    Drafts are greedy. Under sampling a draft is accepted when it equals the token the backbone sampled,
    which is what topk-1 verification amounts to."""
    longest = max(map(len, prompts))
    length = -(-(longest + new + 4) // BLOCK) * BLOCK + 4
    rows = generate(model, prompts, length, temperature, seed)
    _, heads = choices(model, rows)
    rounds, written = [], []
    for b, prompt in enumerate(prompts):
        row, end = rows[b].tolist(), len(prompt) + new
        rounds += accept_lengths(row, heads[:, b].tolist(), len(prompt), end)
        written.append(row[len(prompt) : end])
    return {
        "accept_length": sum(rounds) / len(rounds),
        "rounds_by_accepted_drafts": [rounds.count(i) for i in range(1, len(heads) + 2)],
        "repeated_8gram_share": repeated_ngrams(written),
        "prompts": len(prompts),
        "new_tokens_each": new,
    }
