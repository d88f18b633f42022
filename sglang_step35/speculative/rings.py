"""What the MTP layers are computed from, kept for every request's last positions.

Letters: P pool size, C ring capacity, H hidden size, B requests, W positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sglang_step35.speculative.host_copy import to_device

NEVER = 1 << 62  # a position no request reaches


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

    def known(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Whether the hidden states of positions [start[b], start[b] + width) are known: [B, width] bool."""
        positions = start[:, None] + torch.arange(width, device=start.device)
        return positions >= self.first_known[pool_indices][:, None].clamp(min=0)

    def _entries(self, start: Tensor, width: int) -> Tensor:
        if width > self.capacity:
            raise ValueError(f"{width} positions do not fit a ring of {self.capacity}: one would stand for two")
        offsets = torch.arange(width, device=start.device)
        return (start[:, None] + offsets) % self.capacity
