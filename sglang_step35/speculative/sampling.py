"""Target and draft distributions of a sampling request, and the random numbers to draw from them.

Letters: B requests, N rows per request, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_TOP_K_OFF = 1 << 30


@dataclass(frozen=True)
class SamplingRule:
    """Per-request sampling parameters as tensors; fields are None where no request needs them.

    temperatures: [B, 1] float32. greedy: [B] bool (SGLang turns temperature 0 into top_k 1).
    top_ks: [B] int32, top_ps and min_ps: [B] float32. seeds: [B] int64.
    """

    temperatures: Tensor
    greedy: Tensor
    top_ks: Tensor | None = None
    top_ps: Tensor | None = None
    min_ps: Tensor | None = None
    seeds: Tensor | None = None

    @classmethod
    def from_info(cls, info) -> "SamplingRule":
        """From SGLang's SamplingBatchInfo."""
        return cls(
            temperatures=info.temperatures,
            greedy=info.top_ks <= 1,
            top_ks=info.top_ks if info.need_top_k_sampling else None,
            top_ps=info.top_ps if info.need_top_p_sampling else None,
            min_ps=info.min_ps if info.need_min_p_sampling else None,
            seeds=info.sampling_seed,
        )

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities a request samples from, after temperature and filters.

        logits: [B, N, V]. Returns [B, N, V] float32; greedy requests get the one-hot argmax.
        """
        best = logits.argmax(-1, keepdim=True)
        probs = torch.softmax(logits.float() / self.temperatures[:, :, None], dim=-1)
        if any(x is not None for x in (self.top_ks, self.top_ps, self.min_ps)):
            probs = self._filter(probs)
        one_hot = torch.zeros_like(probs).scatter_(-1, best, 1.0)
        return torch.where(self.greedy[:, None, None], one_hot, probs)

    def _filter(self, probs: Tensor) -> Tensor:
        """Joint top-k, top-p and min-p, renormalised; the rule of SGLang's PyTorch sampler."""
        ordered, index = probs.sort(dim=-1, descending=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_ks is not None:
            rank = torch.arange(probs.shape[-1], device=probs.device)
            keep &= rank < self.top_ks[:, None, None].clamp(max=_TOP_K_OFF)
        if self.top_ps is not None:
            # A token stays while the mass before it does not exceed top_p.
            keep &= ordered.cumsum(-1) - ordered <= self.top_ps[:, None, None]
        if self.min_ps is not None:
            keep &= ordered >= ordered[..., :1] * self.min_ps[:, None, None]
        kept = torch.zeros_like(probs).scatter_(-1, index, ordered * keep)
        return kept / kept.sum(-1, keepdim=True)

    def coins(self, positions: Tensor, stream: int) -> Tensor:
        """Uniform numbers in [0, 1): one per entry of positions [B, N], float64.

        Seeded requests draw from (seed, position, stream) alone, so their output depends neither
        on the batch nor on timing; `stream` separates draft, acceptance and final draws.
        """
        if self.seeds is None:
            return torch.rand(positions.shape, dtype=torch.float64, device=positions.device)
        return hashed_uniform(self.seeds[:, None], positions, stream)


def hashed_uniform(seeds: Tensor, positions: Tensor, stream: int | Tensor) -> Tensor:
    """Counter-based uniform numbers in [0, 1) from int64 seeds, positions and streams (splitmix64)."""
    state = seeds * -7046029254386353131 + positions * 1442695040888963407 + stream + 1
    state = (state ^ _shift(state, 30)) * -4658895280553007687
    state = (state ^ _shift(state, 27)) * -7723592293110705685
    state = state ^ _shift(state, 31)
    return _shift(state, 11).double() * 2.0**-53


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
