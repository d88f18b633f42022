"""How a draft is drawn from an MTP layer's logits, and when a pass stops drafting."""

from collections.abc import Sequence

import torch
from sglang.srt.speculative.eagle_info import EagleDraftInput
from torch import Tensor

from sglang_step35.speculative.acceptance import NO_DRAFT, inverse_cdf
from sglang_step35.speculative.confidence import StopRule
from sglang_step35.speculative.device import greedy_choice
from sglang_step35.speculative.grammar import DraftGrammars
from sglang_step35.speculative.ranks import ALONE, Ranks
from sglang_step35.speculative.sampling import SamplingRule

FIRST_DRAFT_STREAM = 64  # those before belong to the columns of the verify step at the same position


class DraftSampler:
    """Draws one draft per request and layer, and keeps what the next verify step needs.

    Greedy drafts serve greedy requests; drafts of sampling requests are drawn from the layer's own
    distribution q (after temperature and filters), which verification takes into account.
    Letters: B requests, S MTP layers, V vocabulary.
    """

    def __init__(
        self,
        sampling_info,
        positions: Tensor,
        *,
        num_steps: int,
        stop_rule: StopRule | None = None,
        ranks: Ranks = ALONE,
    ):
        """positions: [B], where each request stands; seeds its random stream.

        stop_rule: when a pass ends before its last layer; None: never, which spares the
        confidences. ranks: those that must draw the same drafts.
        """
        self.ranks = ranks
        self.num_steps = num_steps
        self.sampled = not sampling_info.is_all_greedy
        self.rule = SamplingRule.from_info(sampling_info) if self.sampled else None
        if self.rule is not None:
            streams = torch.arange(FIRST_DRAFT_STREAM, FIRST_DRAFT_STREAM + num_steps, device=positions.device)
            self.coins = self.rule.coins(positions.long()[:, None], streams)  # [B, S]
        self.stop_rule = stop_rule
        self.grammars: DraftGrammars | None = None  # set while a pass keeps to them
        self.silent: Sequence[bool] = ()  # requests that a pass cannot draft for; none: all are drafted for
        self.drafts: list[Tensor] = []
        self.probs: list[Tensor] = []
        self.confidences: list[list[float]] = []  # per layer and request, of all layers but the last

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        """Drafts [B] int64 from logits [B, V]."""
        if self.grammars is not None:
            logits = self.grammars.mask(logits)
        if self.sampled:
            proposal = self.rule.distribution(logits[:, None]).squeeze(1)
            draft = self.ranks.same(inverse_cdf(proposal, self.coins[:, layer]))
            self.probs.append(proposal)
        else:
            draft = greedy_choice(logits)
        if self.stop_rule is not None and layer < self.num_steps - 1:  # behind the last there is nothing to stop
            probs = proposal if self.sampled else logits.float().softmax(-1)
            self.confidences.append(self.ranks.same(probs.gather(1, draft[:, None])).squeeze(1).tolist())
        if self.grammars is not None:
            for b, token in enumerate(draft.tolist()):
                self.grammars.take(b, [token])
        self.drafts.append(draft)
        return draft

    @property
    def done(self) -> bool:
        """Whether the next layer is not worth running."""
        return self.stop_rule is not None and self.stop_rule.stops(self.confidences)

    def counts(self, requests: int) -> list[int]:
        """Drafts of each."""
        return [0 if out else len(self.drafts) for out in self.silent or [False] * requests]

    def draft_input(self, bonus: Tensor) -> EagleDraftInput:
        """What the scheduler relays to the next round; bonus: [B] token ids.

        Steps without a draft are filled with NO_DRAFT, because the relay has a fixed width.
        """
        missing = self.num_steps - len(self.drafts)
        columns = [torch.stack(self.drafts, dim=1)] if self.drafts else []
        if missing:
            columns.append(bonus.new_full((len(bonus), missing), NO_DRAFT, dtype=torch.int64))
        drafts = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
        if any(self.silent):
            drafts = drafts.masked_fill(torch.tensor(self.silent)[:, None], NO_DRAFT)
        return EagleDraftInput(
            topk_p=torch.empty(drafts.shape, device=drafts.device),  # relayed, never read
            topk_index=drafts,
            bonus_tokens=bonus,
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
