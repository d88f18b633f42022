"""What the worker remembers of each request between rounds: recent tokens and hidden states.

Layer i's KV at position t depends on the tokens up to t + 1 + i, so the KV it wrote for a
request's last i positions came from drafts and must be recomputed once the true tokens are known.
For that the worker keeps the backbone's hidden states and the tokens of every request's last
positions in rings indexed by SGLang's request-pool row: no call-back tells a worker that a request
moved between batches, was retracted or has finished, and the row needs none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class RequestRings:
    """Rings of hidden states and tokens, C positions per request-pool row.

    Position p of a request is entry p % C. Letters: P pool rows, C capacity, H hidden size,
    B requests of the batch, W positions.
    """

    def __init__(self, pool_rows: int, capacity: int, hidden_size: int, dtype, device):
        self.capacity = capacity
        self.hidden = torch.zeros(pool_rows, capacity, hidden_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(pool_rows, capacity, dtype=torch.int64, device=device)
        # First position of which the ring (or its overwritten past) knew the hidden state.
        self.first_row = torch.zeros(pool_rows, dtype=torch.int64, device=device)
        # Host side, per row: the request, its committed length and first_row at its last prefill.
        self._prefills: dict[int, tuple[str, int, int]] = {}

    def rows_before(self, row: int, rid: str, prefix_len: int, decoding: bool = False) -> int:
        """Known hidden states before a prefill from prefix_len.

        0 unless the prefill goes on where the request's last chunk ended, or the request is being
        decoded and shares a batch with prefills (`--enable-mixed-chunk`).
        """
        owner, end, first = self._prefills.get(row, (None, 0, 0))
        continues = owner == rid and (decoding or end == prefix_len)
        return min(prefix_len - first, self.capacity) if continues else 0

    def begin(self, rows: Sequence[int], rids: Sequence[str], firsts, ends) -> None:
        """Note a prefill up to ends[b]; firsts[b]: the first row with a known hidden state."""
        for row, rid, first, end in zip(rows, rids, firsts, ends, strict=True):
            self._prefills[row] = (rid, end, first)
        device = self.first_row.device
        self.first_row[torch.tensor(rows, device=device)] = torch.tensor(firsts, device=device)

    def first_known(self, row: int, prefix_len: int, rows_before: int) -> int:
        """First row with a known hidden state after a prefill with `rows_before`."""
        return self._prefills[row][2] if rows_before else prefix_len

    def put(self, rows: Tensor, positions: Tensor, hidden: Tensor) -> None:
        """Store hidden states [N, H] of positions [N] of pool rows [N]."""
        self.hidden[rows, positions % self.capacity] = hidden

    def put_tokens(self, rows: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Store tokens [N] of positions [N] of pool rows [N]."""
        self.tokens[rows, positions % self.capacity] = tokens

    def window(self, rows: Tensor, start: Tensor, width: int) -> Tensor:
        """Hidden states of positions [start[b], start[b] + width): [B, width, H]."""
        return self.hidden[rows[:, None], self._entries(start, width)]

    def token_window(self, rows: Tensor, start: Tensor, width: int) -> Tensor:
        """Tokens of positions [start[b], start[b] + width): [B, width] int64."""
        return self.tokens[rows[:, None], self._entries(start, width)]

    def _entries(self, start: Tensor, width: int) -> Tensor:
        offsets = torch.arange(width, device=start.device)
        return (start[:, None] + offsets) % self.capacity


class Proposals:
    """Distributions the drafts of sampling requests were drawn from, per request-pool row.

    Kept here and not relayed through the scheduler, so that greedy batches carry none. A greedy
    request's row may hold anything: its target distribution is one-hot, which leaves nothing of q.
    """

    def __init__(self, pool_rows: int, num_steps: int, vocab_size: int, device):
        self._shape = (pool_rows, num_steps, vocab_size)
        self._device = device
        self._values: Tensor | None = None

    def put(self, rows: Tensor, proposals: Sequence[Tensor]) -> None:
        """Store the first steps' distributions, each [B, V], for pool rows [B]."""
        if not proposals:
            return
        if self._values is None:
            self._values = torch.zeros(self._shape, device=self._device)
        for step, proposal in enumerate(proposals):
            self._values[rows, step] = proposal

    def get(self, rows: Tensor, steps: int) -> Tensor | None:
        """[B, steps, V] float32, or None before any sampling request."""
        return None if self._values is None else self._values[rows, :steps]
