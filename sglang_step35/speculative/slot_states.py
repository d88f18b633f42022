"""What the MTP layers are computed from, kept for the positions of the KV pool that were computed last.

Integers are numpy's, whose small operations cost a third of torch's. Letters: P slots, C states, H hidden size, N rows.
"""

import numpy as np
import torch
from torch import Tensor


class SlotStates:
    """Hidden states [C, H] of the C slots written last, and of every slot the token behind it.

    A slot in the prefix cache keeps both for whoever hits it: the cache's keys look ahead over the next tokens
    (`prefix_key.py`), so that all its readers agree on them.
    """

    def __init__(self, table: Tensor, num_slots: int, capacity: int, hidden_size: int, dtype):
        """table: SGLang's, slots by pool index and position."""
        self.table = table.numpy()
        self.capacity = min(capacity, num_slots)
        # Entry 0 is nobody's, and what is read where nothing is known.
        self.hidden = torch.zeros(self.capacity + 1, hidden_size, dtype=dtype)
        self.tokens = np.zeros(num_slots, np.int64)
        self._entry = np.zeros(num_slots, np.int64)
        self._owner = np.full(self.capacity + 1, -1)
        self._next = 0

    def slots(self, pool_indices, positions: np.ndarray) -> np.ndarray:
        """Slots of positions, 0 before the first one; the shapes are broadcast."""
        return np.where(positions >= 0, self.table[pool_indices, np.maximum(positions, 0)], 0)

    def entries(self, slots: np.ndarray) -> np.ndarray:
        """Where the hidden states of slots are kept, 0 where they are not."""
        entries = self._entry[slots]
        return np.where(self._owner[entries] == slots, entries, 0)

    def rows(self, entries: np.ndarray) -> Tensor:
        """Hidden states [N, H] of entries [N]."""
        return self.hidden.index_select(0, torch.from_numpy(entries))

    def keep(self, slots: np.ndarray, hidden: Tensor, tokens: np.ndarray) -> None:
        """Hidden states [N, H] of slots [N], the last C of them, in place of those kept longest; the tokens [N] behind
        all of them."""
        self.tokens[slots] = tokens
        slots, hidden = slots[-self.capacity :], hidden[-self.capacity :]
        entries = (self._next + np.arange(len(slots))) % self.capacity + 1
        self._next = (self._next + len(slots)) % self.capacity
        self._entry[slots], self._owner[entries] = entries, slots
        self.hidden.index_copy_(0, torch.from_numpy(entries), hidden)
