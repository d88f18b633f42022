"""What the worker remembers of each request between rounds, in one store keyed by request-pool index.

No call-back tells a worker that a request moved between batches, was retracted or has finished, and the index needs
none.

Letters: S MTP layers, V vocabulary, B requests of the batch. `pool_idx` are host ints.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import to_device
from sglang_step35.speculative.lookup import LookUps
from sglang_step35.speculative.settings import MTPSettings


@dataclass(frozen=True)
class RequestStore:
    """What drafts and look-ups leave for later rounds; hidden states and tokens are the upkeep's."""

    drafts: "LastDrafts"
    probs: "DraftProbs"
    counts: "OutputCounts"
    texts: LookUps

    @classmethod
    def allocate(cls, settings: MTPSettings, pool_size: int, *, vocab_size: int, device) -> "RequestStore":
        """For every index of a request pool."""
        return cls(
            drafts=LastDrafts(pool_size),
            probs=DraftProbs(vocab_size, device),
            counts=OutputCounts(vocab_size, device),
            texts=LookUps(settings.num_draft_tokens - 1),
        )

    def begin_round(self, pool_idx: Sequence[int]) -> None:
        """A round verifies these requests, the only ones that decode."""
        self.probs.keep(pool_idx)
        self.texts.keep(pool_idx)

    def note_drafts(self, pool_idx: list[int], sampler) -> None:
        """A pass drafted for these requests with this DraftSampler."""
        self.drafts.note(pool_idx, sampler.counts(len(pool_idx)), sampler.confidences)
        self.probs.put(pool_idx, sampler.probs)


class LastDrafts:
    """Host-side: how many tokens a request's last pass drafted, how confidently."""

    def __init__(self, pool_size: int):
        self._counts = [0] * pool_size
        self._confidences: list[list[float]] = [[] for _ in range(pool_size)]

    def note(self, pool_idx: list[int], counts: list[int], confidences: list[list[float]]) -> None:
        """A pass drafted counts[b] tokens for each request; confidences[layer][b], empty if unknown."""
        for b, index in enumerate(pool_idx):
            self._counts[index] = counts[b]
            self._confidences[index] = [chances[b] for chances in confidences]

    def counts(self, pool_idx: list[int]) -> list[int]:
        """Drafts of each request."""
        return [self._counts[index] for index in pool_idx]

    def confidences(self, pool_idx: list[int]) -> list[list[float]]:
        """Probabilities of each request's drafts, empty where unknown."""
        return [self._confidences[index] for index in pool_idx]


class DraftProbs:
    """Distributions the drafts of sampling requests were drawn from: those the last passes left, not copies.

    Kept here and not relayed through the scheduler, so that greedy batches carry none. What no decoding request needs
    goes with the next round: memory follows the running batch and not the pool, whose size SGLang learns only after it
    has shared out the memory.
    """

    def __init__(self, vocab_size: int, device):
        self._vocab_size = vocab_size
        self._device = device
        # Pool index -> its pass's distributions, one [B, V] for each step, and its row in them.
        self._rows: dict[int, tuple[Sequence[Tensor], int]] = {}

    def put(self, pool_idx: Sequence[int], probs: Sequence[Tensor]) -> None:
        """Note a pass over these requests and its first steps' distributions, each [B, V]; none if it was greedy."""
        self._rows |= {index: (probs, row) for row, index in enumerate(pool_idx)}

    def keep(self, pool_idx: Sequence[int]) -> None:
        """Drop the distributions of all other requests."""
        self._rows = {index: self._rows[index] for index in pool_idx if index in self._rows}

    def get(self, pool_idx: Sequence[int], steps: int) -> Tensor:
        """[B, steps, V] float32.

        0 after a greedy pass and for steps without a draft: a greedy request's target is one-hot, which leaves nothing
        of q. Infinite where nothing is known, so that no draft is accepted and the target's own distribution stays.
        """
        runs = self._runs(pool_idx)
        whole = len(runs) == 1 and runs[0][3] == len(pool_idx) and 0 < steps <= len(runs[0][0])
        if whole:  # as in most rounds: no more than the copies
            probs, row, _, count = runs[0]
            return torch.stack([distribution[row : row + count] for distribution in probs[:steps]], dim=1)
        out = torch.full((len(pool_idx), steps, self._vocab_size), torch.inf, device=self._device)
        for probs, row, start, count in runs:
            out[start : start + count] = 0
            for step, distribution in enumerate(probs[:steps]):
                out[start : start + count, step] = distribution[row : row + count]
        return out

    def _runs(self, pool_idx: Sequence[int]) -> list[tuple[Sequence[Tensor], int, int, int]]:
        """(a pass's distributions, first row, first request, count): neighbours that were neighbours in their pass.

        Slices, because index lists would wait for the device.
        """
        runs: list[tuple[Sequence[Tensor], int, int, int]] = []
        for b, index in enumerate(pool_idx):
            if index not in self._rows:
                continue
            probs, row = self._rows[index]
            if runs:
                last, first, start, count = runs[-1]
                if last is probs and (row, b) == (first + count, start + count):
                    runs[-1] = (last, first, start, count + 1)
                    continue
            runs.append((probs, row, b, 1))
        return runs


class OutputCounts:
    """Token counts of the output of every penalised request, kept on the device.

    The scheduler's own record lags one round behind under overlap scheduling, so the worker counts
    what it accepts.
    """

    def __init__(self, vocab_size: int, device):
        self.vocab_size = vocab_size
        self.device = device
        self._counts: dict[int, tuple[str, Tensor]] = {}

    def begin(self, pool_idx: int, req) -> None:
        """(Re)count a request at its prefill; later rounds add to it."""
        counts = torch.zeros(self.vocab_size, device=self.device)
        if req.output_ids:
            (output,) = to_device(req.output_ids, device=self.device)
            counts.index_add_(0, output, torch.ones_like(output, dtype=counts.dtype))
        self._counts[pool_idx] = (req.rid, counts)

    def of(self, pool_idx: int, req) -> Tensor:
        """Counts [V] of the request that holds this index."""
        rid, counts = self._counts.get(pool_idx, (None, None))
        if rid != req.rid:
            self.begin(pool_idx, req)
            counts = self._counts[pool_idx][1]
        return counts

    def add(self, pool_idx: int, req, tokens: Tensor, valid: Tensor) -> None:
        """Count tokens [N] where valid [N]."""
        self.of(pool_idx, req).index_add_(0, tokens, valid.to(torch.float32))

    def forget_except(self, pool_idx: set[int]) -> None:
        """Drop the counts of indices that no longer belong to a penalised request."""
        for index in [index for index in self._counts if index not in pool_idx]:
            del self._counts[index]
