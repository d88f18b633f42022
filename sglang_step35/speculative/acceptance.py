"""Acceptance rules of speculative decoding as pure tensor functions.

Letters: B requests, D drafts per request, V vocabulary.
A verify window is the chain (x_m, d_1 .. d_D); row j of the target's output is its prediction
after that chain's first j + 1 tokens. A draft of -1 means "none drafted" and is never accepted.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

NO_DRAFT = -1
_TINY = 1e-30  # in place of a probability of 0


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
    """Block verification (Sun et al. 2024, arXiv:2403.10444, algorithm 2): the output follows `target`, and more drafts
    are accepted than where one is judged after the other (Leviathan et al. 2023).

    drafts: [B, D] int64. target: [B, D + 1, V] float32 probabilities p.
    proposal: [B, D, V] float32 probabilities q the drafts were sampled from, 0 for those of a one-hot p; may be None
        where D is 0.
    coins: [B, D] and final_coin: [B], uniform in [0, 1), float64. No other round may use them: every one decides.
    Returns tokens [B, D + 1] (entry j valid for j < length) and length [B] int64.
    """
    if proposal is None or not drafts.shape[1]:
        return inverse_cdf(target[:, 0], final_coin)[:, None], torch.ones_like(final_coin, dtype=torch.long)
    index, drafted = drafts.clamp(min=0), drafts != NO_DRAFT
    reach = _reach(target, proposal, index, drafted)
    kept = _last_accepted(_chances(reach, target, proposal, drafted), coins)
    # One more: where drafts are left from norm(max(w p - q, 0)), else from p itself.
    rows = torch.arange(len(kept), device=kept.device)
    final, before = target[rows, kept], proposal[rows, kept.clamp(max=drafts.shape[1] - 1)]
    residual = (reach.gather(1, kept[:, None]) * final - before).clamp(min=0)
    usable = (kept < drafted.sum(dim=1)) & (residual.sum(-1) > 0)
    final = torch.where(usable[:, None], residual, final)
    tokens = pad(index, (0, 1)).scatter(1, kept[:, None], inverse_cdf(final, final_coin)[:, None])
    return tokens, kept + 1


def _reach(target: Tensor, proposal: Tensor, index: Tensor, drafted: Tensor) -> Tensor:
    """[B, D + 1]: the chance w with which the first 0 .. D drafts, index [B, D], are accepted.

    w_0 = 1, w_i = min(w_{i-1} p(d_i) / q(d_i), 1): in logarithms a sum less the largest sum so far.
    """
    p, q = (table.gather(-1, index.unsqueeze(-1)).squeeze(-1) for table in (target[:, :-1], proposal))
    sums = pad((p * drafted / q.clamp(min=_TINY)).log().cumsum(1), (1, 0))
    return (sums - sums.cummax(1).values).exp().nan_to_num(0.0)  # 0 behind a row whose grammar forbids every token


def _chances(reach: Tensor, target: Tensor, proposal: Tensor, drafted: Tensor) -> Tensor:
    """[B, D]: of stopping behind draft 1 .. D, where no longer run of drafts was accepted.

    (w - e) / (1 - e), with the chance e = sum(min(w p, q)) that the next draft is accepted too: 0 behind the last.
    """
    reach = reach[:, 1:]
    going_on = torch.minimum(reach[:, :-1, None] * target[:, 1:-1], proposal[:, 1:]).sum(-1).nan_to_num(0.0)
    going_on = pad(going_on * drafted[:, 1:], (0, 1))
    return (reach - going_on) / (1 - going_on)


def _last_accepted(chances: Tensor, coins: Tensor) -> Tensor:
    """[B] int64: the longest run of drafts whose coin says so, 0 without one. chances, coins: [B, D]."""
    lengths = torch.arange(1, chances.shape[1] + 1, device=chances.device)
    return ((coins < chances) * lengths).amax(dim=1)


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
