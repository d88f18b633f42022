"""Target and draft distributions of a sampling request, and the random numbers to draw from them.

Letters: B requests, N rows per request, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.speculative.filters import Filters


@dataclass(frozen=True)
class SamplingRule:
    """Per-request sampling parameters as tensors; fields are None where no request needs them.

    temperatures: [B, 1] float32. greedy: [B] bool (SGLang turns temperature 0 into top_k 1). seeds: [B] int64.
    """

    temperatures: Tensor
    greedy: Tensor | None = None
    filters: Filters = Filters()
    seeds: Tensor | None = None

    @classmethod
    def from_info(cls, info) -> "SamplingRule":
        """From SGLang's SamplingBatchInfo."""
        return cls(
            temperatures=info.temperatures,
            greedy=info.top_ks <= 1 if info.is_any_greedy else None,
            filters=Filters(
                top_ks=info.top_ks if info.need_top_k_sampling else None,
                top_ps=info.top_ps if info.need_top_p_sampling else None,
                min_ps=info.min_ps if info.need_min_p_sampling else None,
            ),
            seeds=info.sampling_seed,
        )

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities a request samples from, after temperature and filters.

        logits: [B, N, V]. Returns [B, N, V] float32; greedy requests get the one-hot argmax.
        """
        probs = torch.softmax(logits.float() / self.temperatures[:, :, None], dim=-1)
        probs = self.filters.repeat(logits.shape[1]).apply(probs.flatten(0, 1)).view_as(probs)
        if self.greedy is None:
            return probs
        one_hot = torch.zeros_like(probs).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(self.greedy[:, None, None], one_hot, probs)

    def coins(self, positions: Tensor, streams: Tensor) -> Tensor:
        """Uniform numbers in [0, 1): one per entry of positions [B, N or 1] and streams [N], float64 [B, N].

        Seeded requests draw from (seed, position, stream) alone, so their output depends neither
        on the batch nor on timing; `streams` separate draft, acceptance and final draws.
        """
        if self.seeds is None:
            shape = torch.broadcast_shapes(positions.shape, streams.shape)
            return torch.rand(shape, dtype=torch.float64, device=positions.device)
        return hashed_uniform(self.seeds[:, None], positions, streams)


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
