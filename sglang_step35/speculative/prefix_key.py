"""Radix-cache keys that look ahead over the tokens the MTP layers' KV depends on.

MTP layer i writes, at position t, KV computed from the tokens up to t + 1 + i. A cached row t is
therefore exact for another request only if that request agrees on the tokens t .. t + S, S being
the number of MTP layers. SGLang's EAGLE keys are bigrams (S = 1), which would share rows that
differ in the deeper layers. Here the unit of a key at t is the tuple of tokens t .. t + S.

SGLang passes the key kind around as `is_bigram` / `is_eagle` and adds it to lengths as an int, so
the number of lookahead tokens travels in the same field: 0 none, 1 bigrams, S for S MTP layers.
"""

from array import array
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore
from sglang.srt.runtime_context import get_spec

from sglang_step35.names import TREE_CORE

# Per request pool: a pool row's last committed positions whose MTP KV is yet to be computed.
_lags: WeakKeyDictionary = WeakKeyDictionary()


class LookaheadKey(RadixKey):
    """RadixKey over (lookahead + 1)-grams; kept: storage, namespaces, `limit`.

    token_ids holds N + lookahead raw tokens for N units; slices share the boundary tokens.
    With is_bigram False or True it behaves exactly as its base class.
    """

    __slots__ = ()

    @property
    def lookahead(self) -> int:
        return int(self.is_bigram)

    def __len__(self) -> int:
        return max(0, self._raw_len() - self.lookahead)

    def __iter__(self):
        if not self.lookahead:
            yield from self.raw_token_ids()
            return
        for start in range(len(self)):
            yield tuple(self.token_ids[start : start + self.lookahead + 1])

    def __getitem__(self, idx):
        if isinstance(idx, int):
            idx = idx + len(self) if idx < 0 else idx
            if not 0 <= idx < len(self):
                raise IndexError(f"key index out of range: {idx}")
            idx = slice(idx, idx + 1)
        start, stop, step = idx.indices(len(self))
        if step != 1:
            raise ValueError("a key slice's step must be 1")
        raw = self.token_ids[start : stop + self.lookahead] if stop > start else array("q")
        return LookaheadKey(raw, self.extra_key, self.is_bigram, cache_salt=self.cache_salt)

    def maybe_to_bigram_view(self, is_eagle, value: torch.Tensor | None = None):
        if is_eagle and not self.is_bigram:
            self.is_bigram = is_eagle
            if value is not None:
                value = value[: len(self)]
        return self, value

    def match_at(self, other: RadixKey, offset: int, page_size: int = 1) -> int:
        """Units shared with `other` from its `offset` on, rounded down to whole pages."""
        if self.lookahead <= 1:
            return super().match_at(other, offset, page_size)
        if self.is_bigram != other.is_bigram:
            raise ValueError("both keys must have the same lookahead")
        shared = _plain(self).match_at(_plain(other), offset) - self.lookahead
        return max(0, shared) // page_size * page_size

    def child_key_at(self, offset: int, page_size: int = 1):
        """Hashable key of the page of units at `offset`, namespaced by extra_key and salt."""
        if self.lookahead <= 1:
            return super().child_key_at(offset, page_size)
        if offset < 0 or offset + page_size > len(self):
            raise IndexError(f"key page {offset}..{offset + page_size} exceeds {len(self)} units")
        plain = tuple(self.token_ids[offset : offset + page_size + self.lookahead])
        if self.cache_salt is not None:
            return ((self.extra_key, self.cache_salt), plain)
        return plain if self.extra_key is None else (self.extra_key, plain)


def _plain(key: RadixKey) -> RadixKey:
    """The same raw tokens without lookahead; nothing is copied."""
    return RadixKey(key.token_ids, key.extra_key, False, key.limit, key.cache_salt)


class LookaheadTreeCore(UnifiedTreeCore):
    """SGLang's Python radix tree; kept: everything, replaced: how far its keys look ahead."""

    def __init__(self, params, components):
        super().__init__(params, components)
        # Stock's flag means "bigram keys"; an int means that many lookahead tokens.
        self.is_eagle = get_spec().speculative_num_steps if self.is_eagle else False


def select_tree_core(selected: str, params) -> str | None:
    """Tree-core choice for this process: ours under EAGLE, SGLang's own otherwise."""
    return TREE_CORE if params.is_eagle else None


def set_lag(req_to_token_pool, lag: Callable[[int], int]) -> None:
    """Let inserts of requests in this pool stop `lag(pool row)` positions early."""
    _lags[req_to_token_pool] = lag


def cap_insert(cache, req, *, up_to: int, **options) -> tuple[tuple, dict]:
    """Insert only rows whose MTP KV is final.

    Rounds that skipped MTP layers leave a request's last rows without their KV. Nothing is inserted
    where fewer units would remain than the request's cached prefix has: SGLang asserts that an
    insert covers the prefix it starts from. A hit of P rows looked at P + lookahead tokens, and a
    chunk, too, may end before that many are computed.
    """
    lag = _lags.get(cache.req_to_token_pool)
    if lag is not None:
        up_to -= lag(req.kv.req_pool_idx)
    if up_to - int(cache.tree_core.is_eagle) < req.kv.cache_protected_len:
        up_to = 0
    return (cache, req), {"up_to": up_to, **options}
