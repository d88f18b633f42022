"""What a round verifies: the MTP layers' drafts and, where they pay, tokens looked up in the request's own text.

Letters: B requests, N verify width, S drafts per round.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.speculative.acceptance import NO_DRAFT
from sglang_step35.speculative.depth import DepthPlanner, depth_limit
from sglang_step35.speculative.device import verify_width
from sglang_step35.speculative.grammar import cut_forbidden
from sglang_step35.speculative.host_copy import host_reads_are_free, to_device
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.state import RequestStore
from sglang_step35.speculative.verify_graphs import NarrowSteps


@dataclass(frozen=True)
class Offer:
    """drafted[b]: the MTP layers' drafts that request b verifies; counts[b]: all drafts that it does.

    drafts: [B, S] or [B, N - 1] int64, NO_DRAFT behind a request's own. width: chain tokens of the verify step.
    """

    drafted: list[int]
    counts: list[int]
    drafts: Tensor
    width: int

    def chain(self, bonus: Tensor) -> Tensor:
        """[B, width]: the bonus tokens [B] and the drafts behind them."""
        if self.width == 1:
            return bonus[:, None]
        return torch.cat([bonus[:, None], self.drafts[:, : self.width - 1]], dim=1)


@dataclass(frozen=True)
class Offers:
    """Puts together what rounds verify."""

    settings: MTPSettings
    store: RequestStore
    depths: DepthPlanner
    narrow: NarrowSteps

    def of(self, batch, pool_idx: list[int], drafts: Tensor) -> Offer:
        """The offer of a batch whose MTP layers drafted `drafts` [B, S]."""
        counts, limits = self.store.drafts.counts(pool_idx), list(map(depth_limit, batch.reqs))
        most = self.depths.most_offered(len(pool_idx))
        drafted = [min(count, limit, most) for count, limit in zip(counts, limits, strict=True)]
        if drafted != counts:
            (kept,) = to_device(drafted, device=drafts.device)
            columns = torch.arange(drafts.shape[1], device=drafts.device)
            drafts = drafts.masked_fill(columns >= kept[:, None], NO_DRAFT)
        if not self.settings.look_ups:
            return Offer(drafted, drafted, drafts, self._width(drafted, drafts.device))
        chains = [chain[:count] for chain, count in zip(drafts.tolist(), drafted, strict=True)]
        return self._looked_up(batch, pool_idx, chains, limits, drafts.device)

    def _looked_up(self, batch, pool_idx: list[int], chains: list[list[int]], limits: list[int], device) -> Offer:
        """The offer of these chains, each with what its text goes on with, or all without."""
        longest = self.settings.num_draft_tokens - 1
        may_go_on = zip(chains, limits, strict=True)
        found, tokens = self.store.texts.find(pool_idx, [c if limit >= longest else None for c, limit in may_go_on])
        if host_reads_are_free(device):
            found = cut_forbidden(batch, chains, found)
        drafted = list(map(len, chains))
        more = [chain + added for chain, added in zip(chains, found, strict=True)]
        free = self._width(drafted, device) == self._width(list(map(len, more)), device)
        if any(found) and (free or self.depths.look_ups_pay(drafted, tokens)):
            chains = more
        rows = [chain + [NO_DRAFT] * (longest - len(chain)) for chain in chains]
        (flat,) = to_device([token for row in rows for token in row], device=device)
        counts = list(map(len, chains))
        return Offer(drafted, counts, flat.view(-1, longest), self._width(counts, device))

    def _width(self, counts: list[int], device: torch.device) -> int:
        """Chain tokens of a verify step for counts[b] drafts of each request; without requests as many as ever."""
        needed = 1 + max(counts, default=self.settings.num_draft_tokens - 1)
        return verify_width(needed, self.narrow, device)
