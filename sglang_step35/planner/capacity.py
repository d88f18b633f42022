"""How many requests a pair of pools serves at once, and how large the sliding pool has to be for that.

The per-request figures are SGLang 0.5.23's own worst case, `pool_configurator.py: compute_swa_request_cap`.
"""

import math
from dataclasses import dataclass

from sglang_step35.planner.kv import KVLayout, PoolSizes

EVICTION_INTERVAL = 128  # tokens; SGLANG_SWA_EVICTION_INTERVAL
CHUNKS_IN_FLIGHT = 2  # with overlap scheduling, one batch is prepared while another runs
PREFIX_TAILS = 4  # cached prompts to keep a window of, for each running request; SGLang's figure for DeepSeek-V4


@dataclass(frozen=True)
class Slots:
    """Slots one running request holds, besides its tokens.

    window: earlier tokens kept (`KVLayout.retained`). draft_tokens: verify width
    (`--speculative-num-draft-tokens`), 1 without speculation.
    """

    window: int
    page_size: int
    draft_tokens: int
    chunk: int  # tokens; --chunked-prefill-size

    @property
    def reserve(self) -> int:
        """Slots allocated ahead of the committed tokens: two decode rounds, since rounds overlap."""
        return 2 * self.draft_tokens if self.draft_tokens > 1 else self.page_size

    @property
    def sliding(self) -> int:
        """Most sliding slots a decoding request holds: slots leave the window one by one and are freed in batches."""
        return self.window + EVICTION_INTERVAL * self.draft_tokens + self.page_size + self.reserve

    @property
    def prefill(self) -> int:
        """Sliding slots of the chunks in flight, shared by all requests."""
        return CHUNKS_IN_FLIGHT * self.chunk + self.page_size

    def full(self, tokens: int) -> int:
        """Full slots of a request of `tokens` tokens, in whole pages."""
        return -(-(tokens + self.reserve) // self.page_size) * self.page_size

    def running_pool(self, requests: int, tokens: int) -> int:
        """Sliding slots for `requests` running requests of `tokens` tokens, and the chunks in flight."""
        return requests * min(self.sliding, self.full(tokens)) + self.prefill

    def tails(self, requests: int) -> int:
        """Sliding slots for the windows of the prompts to keep for reuse."""
        return PREFIX_TAILS * requests * (self.window + self.page_size)


def concurrency(pools: PoolSizes, slots: Slots, tokens: int) -> int:
    """Requests of `tokens` tokens each, prompt and answer, that run at once without retraction."""
    by_full = pools.full_tokens // slots.full(tokens)
    by_sliding = max(0, pools.sliding_tokens - slots.prefill) // min(slots.sliding, slots.full(tokens))
    return min(by_full, by_sliding)


def longest(pools: PoolSizes, slots: Slots, requests: int, limit: int) -> int:
    """Longest requests, in tokens, of which `requests` run at once; `limit` is the model's own. 0: none at all."""
    each = pools.full_tokens // requests
    sliding = max(0, pools.sliding_tokens - slots.prefill) // requests
    if sliding < slots.sliding:
        # Too few sliding slots for long requests, perhaps enough for short ones, which never fill a window.
        each = min(each, sliding)
    return max(0, min(limit, each // slots.page_size * slots.page_size - slots.reserve))


def cached_prompts(pools: PoolSizes, slots: Slots, requests: int) -> int:
    """Prompts whose window stays in the sliding pool, for reuse, beside `requests` long running requests."""
    left = pools.sliding_tokens - slots.prefill - requests * slots.sliding
    return max(0, left) // (slots.window + slots.page_size)


def sliding_ratio(budget_bytes: int, layout: KVLayout, slots: Slots, requests: int, tokens: int) -> float:
    """The smallest --swa-full-tokens-ratio, in thousandths, that serves `requests` requests of `tokens` tokens.

    The rest of the budget goes to the full pool, which is what long contexts need. Cached prompts get room where there
    is some. SGLang takes at most 1.0, which suits the shortest requests.
    """
    running = slots.running_pool(requests, tokens)
    for sliding in (running + slots.tails(requests), running):
        full = (budget_bytes - sliding * layout.sliding_cell) / layout.full_cell
        if full > sliding:
            return max(1, math.ceil(1000 * sliding / full)) / 1000
    return 1.0
