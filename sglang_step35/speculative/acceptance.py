"""Acceptance rules of speculative decoding as pure tensor functions.

Letters: B requests, D drafts per request, V vocabulary.
A verify window is the chain (x_m, d_1 .. d_D); row j of the target's output is its prediction
after that chain's first j + 1 tokens. A draft of -1 means "none drafted" and is never accepted.
"""

import torch
from torch import Tensor

NO_DRAFT = -1


def accept_greedy(drafts: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the drafts that equal the target's own greedy choice, up to the first difference.

    drafts: [B, D] int64. target: [B, D + 1] int64, argmax of every row.
    Returns tokens [B, D + 1] (entry j valid for j < length) and length [B] int64, the accepted
    drafts plus the one token the target adds itself.
    """
    if not drafts.shape[1]:
        return target, torch.ones_like(target[:, 0])
    matches = drafts == target[:, :-1]
    return target, _leading(matches) + 1


def accept_sampled(
    drafts: Tensor,
    target: Tensor,
    proposal: Tensor | None,
    coins: Tensor,
    final_coin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al. 2023, Chen et al. 2023): the output follows `target`.

    drafts: [B, D] int64. target: [B, D + 1, V] float32 probabilities p.
    proposal: [B, D, V] float32 probabilities q the drafts were sampled from; None when they
        were chosen greedily, which is the one-hot q.
    coins: [B, D] and final_coin: [B], uniform in [0, 1).
    Returns tokens [B, D + 1] (entry j valid for j < length) and length [B] int64.
    """
    drafted = drafts != NO_DRAFT
    index = drafts.clamp(min=0).unsqueeze(-1)
    p = target[:, :-1].gather(-1, index).squeeze(-1)
    q = torch.ones_like(p) if proposal is None else proposal.gather(-1, index).squeeze(-1)

    # Accept draft d with probability min(1, p(d) / q(d)).
    accepted = drafted & (coins * q < p)
    kept = _leading(accepted)  # [B]

    # After the first rejection sample from norm(max(p - q, 0)); without one, from p itself.
    final = _row(target, kept)
    if drafts.shape[1]:
        at = kept.clamp(max=drafts.shape[1] - 1)
        rejected = (kept < drafts.shape[1]) & drafted.gather(1, at[:, None]).squeeze(1)
        if proposal is None:
            removed = torch.zeros_like(final).scatter_(1, _row(index, at), 1.0)
        else:
            removed = _row(proposal, at)
        residual = (final - removed).clamp(min=0)
        usable = rejected & (residual.sum(-1) > 0)
        final = torch.where(usable[:, None], residual, final)
    tokens = torch.cat([index.squeeze(-1), index.new_zeros(len(index), 1)], dim=1)
    tokens = tokens.scatter(1, kept[:, None], inverse_cdf(final, final_coin)[:, None])
    return tokens, kept + 1


def propose_surely(proposal: Tensor, drafts: Tensor, first: Tensor) -> None:
    """Make the proposal [B, D, V] of the drafts [B, D] one-hot from column first[b] on: nothing was drawn for them."""
    sure = (torch.arange(drafts.shape[1], device=drafts.device) >= first[:, None])[:, :, None]
    index = drafts.clamp(min=0)[:, :, None]
    proposal.masked_fill_(sure, 0).scatter_(2, index, torch.where(sure, 1.0, proposal.gather(2, index)))


def inverse_cdf(weights: Tensor, coin: Tensor) -> Tensor:
    """Sample index i with probability weights[i] / sum(weights).

    weights: [B, V] non-negative, not all zero. coin: [B] in [0, 1). Returns [B] int64.
    """
    cdf = weights.double().cumsum(-1)
    point = coin.double()[:, None] * cdf[:, -1:]
    # `right` skips entries of zero weight: the first index whose cdf exceeds the point.
    index = torch.searchsorted(cdf, point, right=True).squeeze(-1)
    last_possible = torch.searchsorted(cdf, cdf[:, -1:].contiguous()).squeeze(-1)
    # A grammar may forbid every token, which makes the weights NaN: any valid id, the request ends.
    return torch.minimum(index, last_possible).clamp(max=weights.shape[-1] - 1)


def _leading(flags: Tensor) -> Tensor:
    """Number of leading True entries of each row: [B, D] bool -> [B] int64."""
    return flags.long().cumprod(dim=1).sum(dim=1)


def _row(values: Tensor, at: Tensor) -> Tensor:
    """values[b, at[b]]: [B, N, ...] and [B] -> [B, ...]."""
    return values[torch.arange(len(at), device=at.device), at]
