"""What the MTP layers are computed from, kept for every position that has a KV slot.

Letters: P slots, H hidden size, B requests, W positions.
"""

import torch
from torch import Tensor


class SlotStates:
    """Hidden states [P, H] and the tokens behind them [P] by KV slot, read like `RequestRings`.

    A slot in the prefix cache keeps both for whoever hits it: the cache's keys look ahead over the next tokens
    (`prefix_key.py`), so that all its readers agree on them.
    """

    def __init__(self, table: Tensor, num_slots: int, hidden_size: int, dtype, device):
        """table: SGLang's, slots by pool index and position."""
        self.table = table
        self.hidden = torch.zeros(num_slots, hidden_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # Of every pool index: as `RequestRings.first_known`.
        self.first_known = torch.zeros(len(table), dtype=torch.int64, device=device)

    def slots(self, pool_indices: Tensor, positions: Tensor) -> Tensor:
        """Slots of positions, clamped to those there are; the shapes are broadcast."""
        return self.table[pool_indices, positions.clamp(0, self.table.shape[1] - 1)].long()

    def put(self, pool_indices: Tensor, positions: Tensor, hidden: Tensor) -> None:
        """Store hidden states [N, H] of positions [N] of pool indices [N]."""
        self.hidden[self.slots(pool_indices, positions)] = hidden

    def put_tokens(self, pool_indices: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Store tokens of positions of pool indices, each with the position before it, which has a slot."""
        self.tokens[self.slots(pool_indices, positions - 1)] = tokens

    def window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Hidden states of positions [start[b], start[b] + width): [B, width, H]."""
        return self.hidden[self._window(pool_indices, start, width)]

    def token_window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        """Tokens of positions [start[b], start[b] + width): [B, width] int64."""
        return self.tokens[self._window(pool_indices, start - 1, width)]

    def _window(self, pool_indices: Tensor, start: Tensor, width: int) -> Tensor:
        return self.slots(pool_indices[:, None], start[:, None] + torch.arange(width, device=start.device))
