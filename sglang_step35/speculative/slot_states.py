"""What the MTP layers are computed from, kept for the positions of the KV pool that were computed last.

Letters: P slots, C states, H hidden size, B requests, N, W positions.
"""

import torch
from torch import Tensor


class SlotStates:
    """Hidden states [C, H] of the C slots written last, and of every slot the token behind it; read as rings are.

    A slot in the prefix cache keeps both for whoever hits it: the cache's keys look ahead over the next tokens
    (`prefix_key.py`), so that all its readers agree on them.
    """

    def __init__(self, table: Tensor, num_slots: int, capacity: int, hidden_size: int, dtype):
        """table: SGLang's, slots by pool index and position."""
        self.table = table
        self.capacity = min(capacity, num_slots)
        # Entry 0 is nobody's, and what is read where nothing is known.
        self.hidden = torch.zeros(self.capacity + 1, hidden_size, dtype=dtype)
        self.tokens = torch.zeros(num_slots, dtype=torch.int64)
        self._entry = torch.zeros(num_slots, dtype=torch.int64)
        self._owner = torch.full((self.capacity + 1,), -1)
        self._next = 0

    def slots(self, pool_indices: Tensor, positions: Tensor) -> Tensor:
        """Slots of positions, clamped to those there are; the shapes are broadcast."""
        return self.table[pool_indices, positions.clamp(0, self.table.shape[1] - 1)].long()

    def entries(self, slots: Tensor) -> Tensor:
        """Where the hidden states of slots are kept, 0 where they are not."""
        entries = self._entry[slots]
        return entries.where(self._owner[entries] == slots, 0)

    def keep(self, slots: Tensor, hidden: Tensor) -> None:
        """Hidden states [N, H] of slots [N], the last C of them, in place of those kept longest."""
        slots, hidden = slots[-self.capacity :], hidden[-self.capacity :]
        entries = (self._next + torch.arange(len(slots))) % self.capacity + 1
        self._next = (self._next + len(slots)) % self.capacity
        self._entry.index_copy_(0, slots, entries)
        self._owner.index_copy_(0, entries, slots)
        self.hidden.index_copy_(0, entries, hidden)

    def put(self, pool_indices: Tensor, positions: Tensor, hidden: Tensor) -> None:
        """Store hidden states of positions of pool indices; the same leading shape."""
        self.keep(self.slots(pool_indices, positions).flatten(), hidden.flatten(0, -2))

    def put_tokens(self, pool_indices: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Store tokens of positions of pool indices, each with the position before it, which has a slot."""
        self.tokens[self.slots(pool_indices, positions - 1)] = tokens

    def window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Hidden states of positions [start[b], start[b] + width): [B, width, H]."""
        return self.hidden[self.entries(self._window(pool_indices, start, width))]

    def token_window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Tokens of positions [start[b], start[b] + width): [B, width] int64."""
        return self.tokens[self._window(pool_indices, start - 1, width)]

    def known(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Whether the hidden states of positions [start[b], start[b] + width) are kept: [B, width] bool."""
        exists = start[:, None] + torch.arange(width) >= 0
        return exists & (self.entries(self._window(pool_indices, start, width)) > 0)

    def _window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        return self.slots(pool_indices[:, None], start[:, None] + torch.arange(width))
