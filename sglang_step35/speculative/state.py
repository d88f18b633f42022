"""What the worker remembers of each request between rounds, in one store keyed by request-pool index.

Layer i's KV at position t depends on the tokens up to t + 1 + i, so the KV it wrote for a
request's last i positions came from drafts and must be recomputed once the true tokens are known.
For that the worker keeps the backbone's hidden states and the tokens of every request's last
positions. The key is SGLang's request-pool index: no call-back tells a worker that a request moved
between batches, was retracted or has finished, and the index needs none.

Letters: P pool size, C ring capacity, S MTP layers, H hidden size, V vocabulary, B requests of the
batch, W positions. `pool_idx` are host ints, `pool_indices` a tensor [B].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import to_device
from sglang_step35.speculative.lag import Lag
from sglang_step35.speculative.lookup import LookUps
from sglang_step35.speculative.settings import MTPSettings

NEVER = 1 << 62  # a position no request reaches


@dataclass(frozen=True)
class RequestStore:
    """All state of requests between rounds."""

    rings: "RequestRings"
    lag: Lag
    drafts: "LastDrafts"
    probs: "DraftProbs"
    counts: "OutputCounts"
    texts: LookUps

    @classmethod
    def allocate(
        cls, settings: MTPSettings, pool_size: int, *, hidden_size: int, vocab_size: int, eager_rows: int, dtype, device
    ) -> "RequestStore":
        """For every index of a request pool; eager_rows: `device.eager_rows`; dtype: of the hidden states."""
        capacity, steps = settings.ring_capacity, settings.num_steps
        return cls(
            rings=RequestRings(pool_size, capacity, hidden_size, dtype, device),
            lag=Lag(pool_size, steps, capacity, eager_rows),
            drafts=LastDrafts(pool_size),
            probs=DraftProbs(vocab_size, device),
            counts=OutputCounts(vocab_size, device),
            texts=LookUps(settings.num_draft_tokens - 1),
        )

    def begin_prefill(self, pool_idx: Sequence[int], rids: Sequence[str], firsts, ends) -> None:
        """A prefill runs every layer up to ends[b]; firsts[b]: the first position with a known hidden state."""
        self.rings.begin(pool_idx, rids, firsts, ends)
        self.lag.clear(pool_idx)

    def begin_round(self, pool_idx: Sequence[int]) -> None:
        """A round verifies these requests, the only ones that decode."""
        self.rings.leave_prefill(pool_idx)
        self.probs.keep(pool_idx)
        self.texts.keep(pool_idx)

    def note_drafts(self, pool_idx: list[int], count: int, sampler) -> None:
        """A pass drafted `count` tokens for each request, with this DraftSampler."""
        self.drafts.note(pool_idx, count, sampler.confidences)
        self.probs.put(pool_idx, sampler.probs)


class RequestRings:
    """Rings of hidden states and tokens: position p of a request is entry p % C."""

    def __init__(self, pool_size: int, capacity: int, hidden_size: int, dtype, device):
        self.capacity = capacity
        self.hidden = torch.zeros(pool_size, capacity, hidden_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(pool_size, capacity, dtype=torch.int64, device=device)
        # First position of which the ring (or its overwritten past) knew the hidden state.
        self.first_known = torch.zeros(pool_size, dtype=torch.int64, device=device)
        self.first_known[:1] = NEVER  # index 0 belongs to nobody: SGLang pads captured batches with it
        # Host side: the request, its committed length and first_known at its last prefill; no length once it decodes.
        self._prefills: dict[int, tuple[str, int | None, int]] = {}

    def known_before(self, pool_idx: int, rid: str, prefix_len: int, decoding: bool = False) -> int:
        """Known hidden states before a prefill from prefix_len.

        0 unless the prefill goes on where the request's last chunk ended, or the request is being
        decoded and shares a batch with prefills (`--enable-mixed-chunk`).
        """
        owner, end, first = self._prefills.get(pool_idx, (None, 0, 0))
        continues = owner == rid and (decoding or end == prefix_len)
        return min(prefix_len - first, self.capacity) if continues else 0

    def begin(self, pool_idx: Sequence[int], rids: Sequence[str], firsts, ends) -> None:
        """Note a prefill up to ends[b]; firsts[b]: the first position with a known hidden state."""
        for index, rid, first, end in zip(pool_idx, rids, firsts, ends, strict=True):
            self._prefills[index] = (rid, end, first)
        index, first_known = to_device(pool_idx, firsts, device=self.first_known.device)
        self.first_known[index] = first_known

    def leave_prefill(self, pool_idx: Sequence[int]) -> None:
        """These requests decode from here on, and later positions take the entries of the ones before a prefill's end.

        Should one be retracted and come back to this index, its prefix from the cache may end just there again.
        """
        for index in pool_idx:
            if index in self._prefills:
                rid, _, first = self._prefills[index]
                self._prefills[index] = (rid, None, first)

    def first_after_prefill(self, pool_idx: int, prefix_len: int, known: int) -> int:
        """First position with a known hidden state after a prefill with `known` of them before it."""
        return self._prefills[pool_idx][2] if known else prefix_len

    def put(self, pool_indices: Tensor, positions: Tensor, hidden: Tensor) -> None:
        """Store hidden states [N, H] of positions [N] of pool indices [N]."""
        self.hidden[pool_indices, positions % self.capacity] = hidden

    def put_tokens(self, pool_indices: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Store tokens [N] of positions [N] of pool indices [N]."""
        self.tokens[pool_indices, positions % self.capacity] = tokens

    def window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Hidden states of positions [start[b], start[b] + width): [B, width, H]."""
        return self.hidden[pool_indices[:, None], self._entries(start, width)]

    def token_window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Tokens of positions [start[b], start[b] + width): [B, width] int64."""
        return self.tokens[pool_indices[:, None], self._entries(start, width)]

    def _entries(self, start: Tensor, width: int) -> Tensor:
        if width > self.capacity:
            raise ValueError(f"{width} positions do not fit a ring of {self.capacity}: one would stand for two")
        offsets = torch.arange(width, device=start.device)
        return (start[:, None] + offsets) % self.capacity


class LastDrafts:
    """Host-side: how many tokens a request's last pass drafted, how confidently."""

    def __init__(self, pool_size: int):
        self._counts = [0] * pool_size
        self._confidences: list[list[float]] = [[] for _ in range(pool_size)]

    def note(self, pool_idx: list[int], count: int, confidences: list[list[float]]) -> None:
        """A pass drafted `count` tokens for each request; confidences[layer][b], empty if unknown."""
        for b, index in enumerate(pool_idx):
            self._counts[index] = count
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
