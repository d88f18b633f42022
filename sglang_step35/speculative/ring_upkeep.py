"""The MTP layers' KV kept up to date from rings of the last positions: on CUDA, and with a hierarchical cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.device import eager_rows, pass_rows, window_width
from sglang_step35.speculative.lag import Lag
from sglang_step35.speculative.prefill import Chunks, PrefillPass
from sglang_step35.speculative.prefix_key import set_lag
from sglang_step35.speculative.rings import RequestRings
from sglang_step35.speculative.round_cost import RoundCost
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.window import CatchUp, RoundWindow, Verified, WindowReader


class RingUpkeep:
    """Layer i's KV at position t depends on the tokens up to t + 1 + i, so what it wrote for a request's last i
    positions came from drafts and is computed anew once the true tokens are known. For that the rings keep the
    backbone's hidden states and the tokens of every request's last positions, and some more where rounds that draft
    nothing may leave the layers out.
    """

    def __init__(self, settings: MTPSettings, req_to_token_pool, *, hidden_size: int, dtype, device):
        """dtype: of the hidden states."""
        table, capacity = req_to_token_pool.req_to_token, settings.ring_capacity
        self.settings = settings
        self.rings = RequestRings(len(table), capacity, hidden_size, dtype, device)
        self.lag = Lag(len(table), settings.num_steps, capacity, eager_rows(device))
        self.reader = WindowReader(self.rings, table, settings.num_steps)
        set_lag(req_to_token_pool, self.lag.of)

    def owed(self, pool_idx: Sequence[int]) -> float:
        """Nothing that rounds without drafts were not charged for."""
        return 0.0

    def foretold(self, cost: RoundCost, batch: int) -> Foretold:
        """Of rounds of `batch` requests."""
        return Foretold(cost.by_depth(batch), upkeep=cost.upkeep(batch, self.lag.wait(batch)))

    @contextmanager
    def prefill(self, batch, chunks: Chunks, next_token_ids: Tensor, hidden: Tensor, drafts: bool) -> Iterator[CatchUp]:
        """The pass over a prefill's rows, whether or not any request is to draft.

        next_token_ids: [B] sampled. hidden: [sum of chunk lengths, H], the backbone's.
        """
        found = PrefillPass(batch, chunks, self.rings, self.lag, self.reader.req_to_token)
        rows = found.rows(next_token_ids)
        hidden = found.hidden(hidden)
        found.remember(rows, hidden)
        yield CatchUp(rows, hidden)

    @contextmanager
    def round(self, batch, pool_idx: list[int], verified: Verified, depth: int) -> Iterator[RoundWindow | None]:
        """The pass behind a verify step; None where nothing is to be drafted and the layers may lag."""
        lag, width, device = self.lag, verified.tokens.shape[1], verified.tokens.device
        self.rings.leave_prefill(pool_idx)
        if not depth and not lag.is_due(pool_idx, width, self.settings.num_draft_tokens):
            self.reader.remember(verified)
            lag.note(pool_idx, width)
            yield None
            return
        window = window_width(width, self.settings.num_draft_tokens, device)
        num_rows = pass_rows(lag.rows_needed(pool_idx, window), self.settings.pass_rows, device)
        lag.clear(pool_idx)
        yield RoundWindow(self.reader, verified, window, num_rows)
