"""Kernel calls of a planned pass: which rows attend to which key slots, by which kernel call. No SGLang here.

Letters: T query rows of the pass (flat over requests), B requests, Q query rows of a request, K keys read, N key/value
heads, H query heads, G = H / N, D head size.

Every call has `run(q, reader, scale, out)`: q [T, H, D] and the layer's pools are read, its rows of out [T, H, D]
(contiguous) are written.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sglang_step35.attention.portable.functions import (
    attend_batch,
    attend_block,
    attend_rows,
    group_mask,
    merge_partials,
)
from sglang_step35.packed.ik_library import Scratch


@dataclass(frozen=True)
class KeySlots:
    """Key slots of one request, consecutive ones from `start`, else `slots` [K] int64; of B requests [B, K]."""

    count: int
    start: int = 0
    slots: Tensor | None = None
    _by_head: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def by_head(self, heads: int) -> Tensor:
        """[B * heads * K] int64 rows of a pool of so many heads, seen as [slots * heads, D]."""
        assert self.slots is not None
        if heads not in self._by_head:
            rows = self.slots[..., None, :] * heads + torch.arange(heads, device=self.slots.device)[:, None]
            self._by_head[heads] = rows.flatten()
        return self._by_head[heads]


class KVReader:
    """Key and value pools of one layer [slots, N, D], read into memory that all layers and passes share.

    Gathering into fresh memory costs up to three times as much: the allocator gives it back to the system after every
    layer, and every page of it is faulted in anew. The keys of a head lie together, so that the core that gathers them
    is, mostly, the one that reads them: from another core's cache they take several times as long.
    """

    def __init__(self):
        self.pools: tuple[Tensor, ...] = ()
        self._memory: list[Tensor | None] = [None, None]
        self.scratch = Scratch()  # of one kernel call at a time

    def of_layer(self, k_pool: Tensor, v_pool: Tensor) -> "KVReader":
        self.pools = k_pool, v_pool
        return self

    def read(self, keys: KeySlots, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [K, N, D], or [B, K, N, D], in dtype, valid until the next read: views of the pools where
        possible."""
        return self._read(0, keys, dtype), self._read(1, keys, dtype)

    def _read(self, which: int, keys: KeySlots, dtype: torch.dtype) -> Tensor:
        pool = self.pools[which]
        if keys.slots is None:
            found = pool[keys.start : keys.start + keys.count]
        else:
            _, heads, size = pool.shape
            rows = keys.by_head(heads)
            gathered = torch.index_select(pool.view(-1, size), 0, rows, out=self._room(which, len(rows), pool))
            *batch, count = keys.slots.shape
            found = gathered.view(*batch, heads, count, size).transpose(-3, -2)
        return found if found.dtype == dtype else found.to(dtype)

    def _room(self, which: int, count: int, pool: Tensor) -> Tensor:
        """[count, D] uninitialised."""
        memory, size = self._memory[which], pool.shape[2]
        if memory is None or len(memory) < count or memory.dtype != pool.dtype or memory.shape[1] != size:
            memory = self._memory[which] = torch.empty(count, size, dtype=pool.dtype, device=pool.device)
        return memory[:count]


class KernelCall(Protocol):
    """One kernel call or a few, for some rows of the pass."""

    def run(self, q: Tensor, reader: KVReader, scale: float, out: Tensor) -> None: ...


def as_key_slots(slots: Tensor) -> KeySlots:
    """Keys in the order of slots [K] int64, read in place if they are consecutive."""
    count = len(slots)
    if count and bool((slots.diff() == 1).all()):
        return KeySlots(count, start=int(slots[0]))
    return KeySlots(count, slots=slots)


@dataclass
class BatchCall:
    """Few rows of B requests, padded at the left to Q rows and K keys.

    rows: the flat rows, a slice where they are dense, else [B * Q] int64 with repeated padding rows; then `real` holds
    where the real rows stand in the padded batch and in the flat one, both [T] int64.
    """

    rows: slice | Tensor
    real: tuple[Tensor, Tensor] | None
    shape: tuple[int, int, int]  # B, Q, K
    keys: KeySlots
    mask: Tensor | None  # [B or 1, 1, Q, K]
    _group_masks: dict[int, Tensor] = field(default_factory=dict)

    def run(self, q: Tensor, reader: KVReader, scale: float, out: Tensor) -> None:
        batch, rows, _ = self.shape
        k, v = (t if t.dim() == 4 else t[None] for t in reader.read(self.keys, q.dtype))
        own = q[self.rows] if self.real is None else q.index_select(0, self.rows)
        found = attend_batch(own.view(batch, rows, *q.shape[1:]), k, v, self._mask(q.shape[1] // k.shape[2]), scale)
        if self.real is None:
            out[self.rows].view(found.shape).copy_(found)
        else:
            padded, flat = self.real
            out[flat] = found.reshape(-1, *q.shape[1:])[padded]

    def _mask(self, group: int) -> Tensor | None:
        if self.mask is None:
            return None
        if group not in self._group_masks:
            self._group_masks[group] = group_mask(self.mask, group)
        return self._group_masks[group]


@dataclass
class StreamCall:
    """Rows of one request over all its keys: pieces that every row sees, then the rows' own keys, causally."""

    rows: slice
    pieces: list[KeySlots]
    own: KeySlots | None  # None where a single row's key is among the pieces

    def run(self, q: Tensor, reader: KVReader, scale: float, out: Tensor) -> None:
        found = merge_partials(self._partials(q[self.rows], reader, scale))  # [N, G, Q, D]
        out[self.rows].view(-1, *found.shape[:2], found.shape[3]).copy_(found.permute(2, 0, 1, 3))

    def _partials(self, q: Tensor, reader: KVReader, scale: float):
        if self.own is not None:
            yield attend_block(q, *reader.read(self.own, q.dtype), None, scale)
        for piece in self.pieces:
            yield attend_rows(q, *reader.read(piece, q.dtype), scale)


@dataclass
class BlockCall:
    """A block of rows of one request in a sliding layer; mask [Q, K], or None where the block is plainly causal."""

    rows: slice
    keys: KeySlots
    mask: Tensor | None

    def run(self, q: Tensor, reader: KVReader, scale: float, out: Tensor) -> None:
        found, _ = attend_block(q[self.rows], *reader.read(self.keys, q.dtype), self.mask, scale)
        out[self.rows].view(-1, *found.shape[:2], found.shape[3]).copy_(found.permute(2, 0, 1, 3))
