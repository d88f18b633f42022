"""Penalties inside a verify window, exactly as plain decoding would apply them.

SGLang's speculative path counts only the last token of every accepted run and applies the same
penalty to the whole window. Here row j of a window is penalised for all output so far and for the
j drafts before it.

Letters: B requests, N rows per request, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PenaltyRule:
    """One request's penalties (OpenAI's frequency and presence, CTRL's repetition penalty)."""

    frequency: float
    presence: float
    repetition: float

    @classmethod
    def from_request(cls, req) -> "PenaltyRule | None":
        """None for a request without penalties."""
        params = req.sampling_params
        values = params.frequency_penalty, params.presence_penalty, params.repetition_penalty
        return None if values == (0.0, 0.0, 1.0) else cls(*values)


def penalise(logits: Tensor, counts: Tensor, drafts: Tensor, rule: PenaltyRule) -> Tensor:
    """Penalised logits of one request's window.

    logits: [N, V]. counts: [V], occurrences in the output before the window's second token.
    drafts: [N - 1] int64, the chain after the window's first token (clamped to valid ids).
    """
    added = torch.zeros_like(logits)
    rows = torch.arange(1, len(logits), device=logits.device)
    added[rows, drafts] = 1.0
    seen = counts + added.cumsum(0)
    present = seen > 0
    logits = logits - rule.frequency * seen - rule.presence * present
    scaled = torch.where(logits < 0, logits * rule.repetition, logits / rule.repetition)
    return torch.where(present, scaled, logits)


def count_first_tokens(counts, reqs: Sequence, tokens: Tensor) -> None:
    """Begin the counts (`state.OutputCounts`) of requests with penalties by the tokens [B] that their prefill gave."""
    for b, req in enumerate(reqs):
        if PenaltyRule.from_request(req) is not None:
            index, token = req.kv.req_pool_idx, tokens[b : b + 1].long()
            counts.begin(index, req)
            counts.add(index, req, token, torch.ones_like(token))


def count_accepted(counts, reqs: Sequence, tokens: Tensor, accept_lens: Tensor) -> None:
    """Add the accepted ones of a round's tokens [B, N], accept_lens [B]; requests that left are forgotten."""
    penalised = set()
    for b, req in enumerate(reqs):
        if PenaltyRule.from_request(req) is not None:
            valid = torch.arange(tokens.shape[1], device=tokens.device) < accept_lens[b]
            penalised.add(req.kv.req_pool_idx)
            counts.add(req.kv.req_pool_idx, req, tokens[b], valid)
    counts.forget_except(penalised)
