"""Tensor functions of the portable attention backend: masks, grouped attention, merging. No SGLang here.

Letters: B requests, Q query rows of a request, K keys read, H query heads, N key/value heads, G = H / N query heads
that share a key head, D head size.

Masks are additive float32 and right-aligned: the last row is the query, the last column the key, of one position. All
attention goes through torch's CPU flash kernel, which takes keys with any outer strides: key pools are read in their
own [slot, N, D] layout, and the G query heads of a key head become rows of one matrix, so that every key is read once.
"""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MASK_KEYS = 256  # masks are kept for multiples of so many keys
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the variant that returns the log-sum-exp


def visible_keys(rows: int, keys: int, earlier_keys: int, device: torch.device | None = None) -> Tensor:
    """Causal window: [rows, keys] bool, True where a row sees a key.

    A row sees its own position and `earlier_keys` positions before it (ALL_KEYS: all of them).
    """
    row = torch.arange(rows, device=device)[:, None] + (keys - rows)
    distance = row - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if earlier_keys < 0 else seen & (distance <= earlier_keys)


def additive(seen: Tensor) -> Tensor:
    """0 where `seen` (bool, any shape) is True, -inf elsewhere; float32."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


def batch_mask(rows: int, keys: int, ends: Tensor, earlier_keys: int) -> Tensor:
    """Mask of requests of different lengths, padded at the left to `rows` rows and `keys` keys.

    ends: [B] int64, the position after each request's last row; columns before position 0 are hidden.
    Returns [B, 1, rows, keys]. Rows before position 0 are padding: they see the last key, so that their softmax is
    finite.
    """
    seen = visible_keys(rows, keys, earlier_keys, ends.device)
    exists = torch.arange(keys, device=ends.device) >= keys - ends[:, None]
    seen = seen & exists[:, None]
    seen[..., -1] |= ~seen.any(-1)
    return additive(seen)[:, None]


def aligned_mask(rows: int, keys: int, earlier_keys: int) -> Tensor:
    """`batch_mask` where nothing is padded: [1, 1, rows, keys], of all requests; keys >= rows. Read only."""
    kept = -(-keys // MASK_KEYS) * MASK_KEYS
    return _kept_mask(rows, kept, earlier_keys)[:, :, :, kept - keys :]


@lru_cache(maxsize=64)
def _kept_mask(rows: int, keys: int, earlier_keys: int) -> Tensor:
    return additive(visible_keys(rows, keys, earlier_keys))[None, None]


def group_mask(mask: Tensor, group: int) -> Tensor:
    """[B, 1, Q, K] -> [B, 1, group * Q, K], the row order of `attend_batch`; one row serves every head as it is."""
    batch, _, rows, keys = mask.shape
    if rows == 1:
        return mask
    return mask.expand(batch, group, rows, keys).reshape(batch, 1, group * rows, keys)


def attend_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of few rows per request, all requests in one call.

    q: [B, Q, H, D]. k, v: [B, K, N, D], same dtype as q. mask: None or `group_mask(...)`. Returns [B, Q, N, G, D],
    a strided view.
    """
    batch, rows, heads, size = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    grouped = q.view(batch, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    out = scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    return out.view(batch, kv_heads, group, rows, size).permute(0, 3, 1, 2, 4)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Rows of one request that all see all keys; the partial result of a larger softmax.

    q: [Q, H, D]. k, v: [K, N, D], same dtype. Returns out [N, G, Q, D] in q's dtype and its log-sum-exp [N, G, Q]
    float32.
    """
    rows, _, size = q.shape
    kv_heads = k.shape[1]
    grouped = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, size)
    out, lse = _flash(grouped, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
    return out[0].unflatten(1, (-1, rows)), lse[0].unflatten(1, (-1, rows))


def attend_block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """A block of many rows of one request, the last row at the last key's position.

    q: [Q, H, D]. k, v: [K, N, D], same dtype. mask: [Q, K], or None for plain causal attention, which needs Q == K.
    Returns as `attend_rows`. Query heads are kept apart (their keys repeat by stride 0), so the mask does not grow
    with G.
    """
    if mask is None and len(q) != len(k):
        raise ValueError(f"causal attention without a mask needs as many keys as rows, got {len(k)} and {len(q)}")
    heads = q.shape[1]
    kv_heads = k.shape[1]
    group = heads // kv_heads
    per_head = q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
    k, v = (t.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for t in (k, v))
    return _flash(per_head, k, v, is_causal=mask is None, attn_mask=mask, scale=scale)


def merge_partials(partials: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Combine partial softmax results over disjoint key sets by their log-sum-exp.

    partials: at least one pair (out [..., D], lse [...] float32). Returns [..., D]: the first out as it is when it is
    the only one, float32 otherwise.
    """
    partials = iter(partials)
    out, lse = next(partials)
    for other, other_lse in partials:
        total = torch.logaddexp(lse, other_lse)
        out = out.float() * (lse - total).exp_()[..., None]
        out += other * (other_lse - total).exp_()[..., None]
        lse = total
    return out


def contiguous_runs(slots: Tensor, shortest: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Split slots into long runs of consecutive ids and the rest.

    slots: [K] int64. shortest: runs below this many slots go to the rest. Returns ([(first slot, length)], rest
    [R] int64), which together hold every slot once; the order changes.
    """
    if len(slots) < shortest:
        return [], slots
    starts = torch.nn.functional.pad((slots.diff() != 1).nonzero().flatten() + 1, (1, 0))
    lengths = torch.diff(starts, append=torch.tensor([len(slots)], device=slots.device))
    long = lengths >= shortest
    if not long.any():
        return [], slots
    runs = list(zip(slots[starts[long]].tolist(), lengths[long].tolist(), strict=True))
    return runs, slots[~long.repeat_interleave(lengths)]
