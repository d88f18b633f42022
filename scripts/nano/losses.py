"""What is learnt: the corpus, to not repeat oneself, and the backbone's distribution by the MTP heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.nano.model import NanoStep

EXTRA = 4  # a row holds T + 4 tokens: the last MTP layer's label lies four past its position


def text_loss(model: NanoStep, rows: Tensor) -> Tensor:
    """rows [B, T + 4] -> mean loss for token t + 1 in nats."""
    t = rows.shape[1] - EXTRA
    logits = model.logits(model.hidden(rows[:, :t]))
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1 : t + 1].flatten())


def joint_loss(model: NanoStep, rows: Tensor) -> list[Tensor]:
    """rows [B, T + 4] -> the loss of the text and of each MTP layer, whose gradients reach the backbone too."""
    t = rows.shape[1] - EXTRA
    hidden = model.hidden(rows[:, :t])
    text = F.cross_entropy(model.logits(hidden).flatten(0, 1), rows[:, 1 : t + 1].flatten())
    return [text, *head_losses(model, rows, hidden)]


def repeats(rows: Tensor, n: int) -> Tensor:
    """[B, T] -> [B, T] bool: the token completes an n-gram that occurred earlier in its row."""
    found = torch.zeros(rows.shape, dtype=torch.bool)
    for b, row in enumerate(rows.tolist()):
        seen: set[tuple[int, ...]] = set()
        for end in range(n, len(row) + 1):
            gram = tuple(row[end - n : end])
            found[b, end - 1] = gram in seen
            seen.add(gram)
    return found


def unloop_loss(model: NanoStep, own: Tensor, true: Tensor, n: int) -> list[Tensor]:
    """Both [B, T + 4]. The corpus loss of `true`, and on the model's greedy text `own` the unlikelihood of tokens
    that complete a repeated n-gram (Welleck et al. 2019, https://arxiv.org/abs/1908.04319)."""
    t = own.shape[1] - EXTRA
    logits = model.logits(model.hidden(torch.cat((own, true))[:, :t]))
    own_logits, true_logits = logits.split((len(own), len(true)))
    likelihood = F.cross_entropy(true_logits.flatten(0, 1), true[:, 1 : t + 1].flatten())
    token, repeated = own[:, 1 : t + 1, None], repeats(own, n)[:, 1 : t + 1]
    # -log(1 - p) from the other tokens' logits: exact where p is nearly 1, as in a loop it is.
    wide = own_logits.float()
    others = wide.scatter(-1, token, float("-inf")).logsumexp(-1)
    unlikelihood = wide.logsumexp(-1) - others
    return [likelihood, (unlikelihood * repeated).sum() / repeated.sum().clamp(min=1)]


def head_losses(model: NanoStep, rows: Tensor, hidden: Tensor) -> list[Tensor]:
    """Loss of each head against the backbone's own distribution p for the same token: what a head is for is to
    guess the backbone. Cross-entropy for fast learning, plus the total variation 1 - sum min(p, q), which is the
    share of drafts that speculative sampling rejects. rows [B, T + 4], hidden [B, T, D] of the backbone."""
    with torch.no_grad():
        teacher = model.logits(hidden).softmax(-1)
    losses = []
    for i, draft in enumerate(model.draft_logits(rows, hidden)):
        p = teacher[:, 1 + i :]  # the backbone at t + 1 + i names token t + 2 + i
        log_q = draft[:, : p.shape[1]].log_softmax(-1)
        cross_entropy = -(p * log_q).sum(-1).mean()
        rejected = 1 - torch.minimum(p, log_q.exp()).sum(-1).mean()
        losses.append(cross_entropy + rejected)
    return losses
