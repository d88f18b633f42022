"""Top-k, top-p and min-p over a whole vocabulary without sorting it.

The rule is that of SGLang's PyTorch sampler, all three jointly on the unfiltered probabilities: a token stays while its
rank is below top_k, the mass before it does not exceed top_p, and it has at least min_p times the best one's share.
Letters: R rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 2048  # best tokens looked at first; a filter rarely keeps as many
GROWTH = 8  # then so many times more, if those had at least a fourth of the mass: else the whole vocabulary


@dataclass(frozen=True)
class Filters:
    """Per row; None where no row needs it. top_ks: [R] int32 or int64. top_ps, min_ps: [R] float32."""

    top_ks: Tensor | None = None
    top_ps: Tensor | None = None
    min_ps: Tensor | None = None

    def repeat(self, times: int) -> "Filters":
        """Every row `times` times in a row."""
        return Filters(*(None if x is None else x.repeat_interleave(times) for x in self._fields()))

    def apply(self, probs: Tensor) -> Tensor:
        """probs [R, V] float32 -> the kept ones, renormalised, zero elsewhere.

        Of several equal probabilities at the edge of a set any may stay; on CUDA all do.
        """
        if all(x is None for x in self._fields()):
            return probs
        kept = self._on_cuda(probs) if probs.is_cuda else self._on_host(probs)
        return kept / kept.sum(-1, keepdim=True)

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.top_ks, self.top_ps, self.min_ps

    def _on_host(self, probs: Tensor) -> Tensor:
        """Rows whose last candidate stays are looked at again, with more candidates."""
        vocab = probs.shape[-1]
        kept, rows, size = probs.clone(), self._filtering(vocab), min(CANDIDATES, vocab)
        while len(rows):
            ordered, index = probs[rows].topk(size) if size < vocab else probs[rows].sort(descending=True)
            stays = self._of(rows)._stays(ordered)
            kept[rows] = torch.zeros_like(probs[rows]).scatter_(-1, index, ordered * stays)
            if size == vocab:
                break
            goes_on = stays[:, -1]
            near = bool((ordered[goes_on].sum(-1) >= 0.25).all())
            rows, size = rows[goes_on], min(GROWTH * size, vocab) if near else vocab
        return kept

    def _filtering(self, vocab: int) -> Tensor:
        """Numbers of the rows that lose any token."""
        some = torch.zeros(len(next(x for x in self._fields() if x is not None)), dtype=torch.bool)
        if self.top_ks is not None:
            some |= self.top_ks < vocab
        if self.top_ps is not None:
            some |= self.top_ps < 1
        if self.min_ps is not None:
            some |= self.min_ps > 0
        return some.nonzero()[:, 0]

    def _of(self, rows: Tensor) -> "Filters":
        return Filters(*(None if x is None else x[rows] for x in self._fields()))

    def _stays(self, ordered: Tensor) -> Tensor:
        """ordered [R, C], the best C in descending order -> [R, C] bool: True up to some rank."""
        stays = torch.ones_like(ordered, dtype=torch.bool)
        if self.top_ks is not None:
            stays &= torch.arange(ordered.shape[-1]) < self.top_ks[:, None]
        if self.top_ps is not None:
            stays &= ordered.cumsum(-1) - ordered <= self.top_ps[:, None]
        if self.min_ps is not None:
            stays &= ordered >= ordered[:, :1] * self.min_ps[:, None]
        return stays

    def _on_cuda(self, probs: Tensor) -> Tensor:
        """FlashInfer's kernels find the threshold of each set; a token has to be in all of them."""
        from flashinfer.sampling import top_k_renorm_probs, top_p_renorm_probs

        kept = probs
        if self.top_ks is not None:
            kept = kept * (top_k_renorm_probs(probs, self.top_ks.clamp(max=probs.shape[-1])) > 0)
        if self.top_ps is not None:
            kept = kept * (top_p_renorm_probs(probs, self.top_ps) > 0)
        if self.min_ps is not None:
            kept = kept * (probs >= probs.amax(-1, keepdim=True) * self.min_ps[:, None])
        return kept
