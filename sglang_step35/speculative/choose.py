"""How a draft is chosen from an MTP layer's logits."""

import torch
from sglang.srt.speculative.eagle_info import EagleDraftInput
from torch import Tensor

from sglang_step35.speculative.acceptance import NO_DRAFT, inverse_cdf
from sglang_step35.speculative.sampling import SamplingRule

# Random streams 0 and 1 belong to the verifier.
_FIRST_DRAFT_STREAM = 2


class DraftChooser:
    """Chooses one draft per request and layer, and keeps what the next verify step needs.

    Greedy drafts serve greedy requests; drafts of sampling requests are drawn from the layer's own
    distribution q (after temperature and filters), which verification takes into account.
    Letters: B requests, V vocabulary.
    """

    def __init__(
        self,
        sampling_info,
        positions: Tensor,
        *,
        num_steps: int,
        thresholds: list[float] | None,
        calibration: list[float],
    ):
        """positions: [B], where each request stands; seeds its random stream.

        thresholds: [num_steps], chance of acceptance below which a draft is not worth its layer;
        None where the depth is fixed, which spares the confidences.
        calibration: chance of acceptance by equal bins of a layer's confidence in its draft.
        """
        self.num_steps = num_steps
        self.sampled = not sampling_info.is_all_greedy
        self.rule = SamplingRule.from_info(sampling_info) if self.sampled else None
        self.positions = positions.long()[:, None]
        self.thresholds = thresholds
        self.calibration = calibration
        self.reach: Tensor | float = 1.0  # chance that all drafts so far are accepted, [B]
        self.alive: Tensor | None = None  # [B] bool, requests that still draft
        self.drafts: list[Tensor] = []
        self.confidences: list[Tensor] = []
        self.proposals: list[Tensor] = []

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        """Drafts [B] int64 from logits [B, V]; valid ids for every request."""
        if self.sampled:
            proposal = self.rule.distribution(logits[:, None]).squeeze(1)
            coin = self.rule.coins(self.positions, _FIRST_DRAFT_STREAM + layer).squeeze(1)
            draft = inverse_cdf(proposal, coin)
            self.proposals.append(proposal)
        else:
            draft = logits.argmax(-1)
        kept = draft
        if self.thresholds is not None:
            probs = proposal if self.sampled else logits.float().softmax(-1)
            kept = self._worthwhile(layer, draft, probs.gather(1, draft[:, None]).squeeze(1))
        self.drafts.append(kept)
        return draft

    @property
    def done(self) -> bool:
        """Whether no request drafts on; reads the device, so only asked where that is free."""
        return self.alive is not None and not bool(self.alive.any())

    def _worthwhile(self, layer: int, draft: Tensor, confidence: Tensor) -> Tensor:
        """The drafts [B], NO_DRAFT where the chance of being reached is below the threshold."""
        self.confidences.append(confidence)
        if self.thresholds[layer] <= 0:
            return draft
        table = torch.tensor(self.calibration, device=draft.device)
        bins = (confidence * len(table)).long().clamp(max=len(table) - 1)
        self.reach = self.reach * table[bins]
        alive = self.reach >= self.thresholds[layer]
        self.alive = alive if self.alive is None else self.alive & alive
        return torch.where(self.alive, draft, NO_DRAFT)

    def draft_input(self, bonus: Tensor) -> EagleDraftInput:
        """What the scheduler relays to the next round; bonus: [B] token ids.

        Steps without a draft are filled with NO_DRAFT, because the relay has a fixed width.
        """
        drafts = bonus.new_full((len(bonus), self.num_steps), NO_DRAFT, dtype=torch.int64)
        confidences = torch.zeros(drafts.shape, device=drafts.device)
        for step, draft in enumerate(self.drafts):
            drafts[:, step] = draft
        for step, confidence in enumerate(self.confidences):
            confidences[:, step] = confidence
        return EagleDraftInput(
            topk_p=confidences,
            topk_index=drafts,
            bonus_tokens=bonus,
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
