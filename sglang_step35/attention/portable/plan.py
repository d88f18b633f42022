"""What one forward pass reads, computed once and shared by all its layers of a kind. No SGLang here.

Letters: B requests, Q query rows of a request, K keys read.

A pass is described by its requests' rows and ends alone (`PassRows`), whatever SGLang's forward mode is. For a kind of
layers (a window, or none) `cut_pass` turns it into kernel calls.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sglang_step35.attention.portable.functions import (
    additive,
    aligned_mask,
    batch_mask,
    contiguous_runs,
    visible_keys,
)
from sglang_step35.attention.portable.kernel_calls import (
    BatchCall,
    BlockCall,
    KernelCall,
    KeySlots,
    StreamCall,
    as_key_slots,
)
from sglang_step35.attention.portable.paged_call import PagedCall, SlotTable

SHORT_ROWS = 16  # requests with at most this many rows are padded into one batch
FULL_BLOCK_ROWS, WINDOW_BLOCK_ROWS = 1024, 128  # longer requests are cut into blocks of so many rows
BATCH_KEYS = 1024  # full layers: requests with more keys are streamed instead of padded
CALL_KEYS = 16384  # padded keys of one batched call, unless the caller knows better
PIECE_KEYS, BLOCK_PIECE_KEYS = 1024, 4096  # keys gathered at a time while streaming, for few rows and for a block
SHORTEST_RUN = 512  # consecutive slots worth a kernel call of their own, read in place

# (requests [...] int64, positions [...] int64) -> KV slots [...] int64 of the layer kind's pool
SlotLookup = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PassRows:
    """The rows of a pass.

    requests: [B] int64 rows of req_to_token. counts: rows of each request, in the order of the flat batch. ends: the
    position after each request's last row, which is also the number of keys that row sees in a full layer.
    """

    requests: Tensor
    counts: list[int]
    ends: list[int]

    def __post_init__(self):
        if not len(self.requests) == len(self.counts) == len(self.ends):
            raise ValueError(
                f"a pass needs one row count and one end per request, got {len(self.requests)} requests, "
                f"{len(self.counts)} counts and {len(self.ends)} ends"
            )

    @cached_property
    def first_rows(self) -> list[int]:
        """Flat index of each request's first row, and the number of all rows as last entry."""
        starts = [0]
        for count in self.counts:
            starts.append(starts[-1] + count)
        return starts

    @cached_property
    def indices(self) -> list[int]:
        return self.requests.tolist()

    @property
    def total(self) -> int:
        return self.first_rows[-1]


def cut_pass(
    rows: PassRows,
    earlier_keys: int,
    find_slots: SlotLookup,
    call_keys: int | None = None,
    in_place: SlotTable | None = None,
) -> list[KernelCall]:
    """Kernel calls of one kind of layers; every row is in exactly one.

    earlier_keys: keys before the row's own, -1 for all (config.ALL_KEYS). call_keys: padded keys a batched call may
    read, CALL_KEYS by default; it exceeds that only for a single request. in_place: what `find_slots` looks up, where
    the compiled kernel reads the pools for all requests of few rows.
    """
    if in_place is not None:
        few = [b for b, count in enumerate(rows.counts) if count > 0 and (count <= SHORT_ROWS or rows.ends[b] < count)]
        calls: list[KernelCall] = [_paged(rows, few, earlier_keys, in_place)] if few else []
    else:
        few = [b for b in range(len(rows.counts)) if _is_batched(rows, b, earlier_keys)]
        calls = list(_batches(rows, few, earlier_keys, find_slots, call_keys or CALL_KEYS))
    block_rows = FULL_BLOCK_ROWS if earlier_keys < 0 else WINDOW_BLOCK_ROWS
    for b in sorted(set(range(len(rows.counts))).difference(few)):
        for first, end, size in _blocks(rows, b, block_rows):
            flat = slice(first, first + size)
            request = rows.requests[b]
            if earlier_keys < 0:
                calls.append(_stream(flat, request, end, find_slots))
            else:
                calls.append(_block(flat, request, end, earlier_keys, find_slots))
    return calls


def _paged(rows: PassRows, chosen: list[int], earlier_keys: int, table: SlotTable) -> PagedCall:
    columns = rows.first_rows, rows.counts, rows.ends, rows.indices
    first_rows, counts, ends, indices = ([column[b] for b in chosen] for column in columns)
    return PagedCall.of(first_rows, counts, ends, indices, table, earlier_keys)


def _is_batched(rows: PassRows, b: int, earlier_keys: int) -> bool:
    count, end = rows.counts[b], rows.ends[b]
    if count == 0:
        return False
    if end < count:
        return True  # rows before position 0, which only batches can pad
    return count <= SHORT_ROWS and (earlier_keys >= 0 or end <= BATCH_KEYS)


def _blocks(rows: PassRows, b: int, block_rows: int) -> Iterator[tuple[int, int, int]]:
    """(first flat row, position after the last row, rows) of each block of request b."""
    count, start = rows.counts[b], rows.ends[b] - rows.counts[b]
    for done in range(0, count, block_rows):
        size = min(block_rows, count - done)
        yield rows.first_rows[b] + done, start + done + size, size


def _batches(
    rows: PassRows, chosen: list[int], earlier_keys: int, find_slots: SlotLookup, call_keys: int
) -> Iterator[BatchCall]:
    """The chosen requests in as few padded batches as call_keys allows."""
    while chosen:
        widest = max(_span(rows, b, earlier_keys) for b in chosen)
        fitting = max(1, call_keys // widest)
        yield _batch(rows, chosen[:fitting], earlier_keys, find_slots)
        chosen = chosen[fitting:]


def _span(rows: PassRows, b: int, earlier_keys: int) -> int:
    """Keys that request b's rows see together."""
    end = max(rows.ends[b], 1)
    return end if earlier_keys < 0 else min(end, earlier_keys + rows.counts[b])


def _batch(rows: PassRows, chosen: list[int], earlier_keys: int, find_slots: SlotLookup) -> BatchCall:
    width = max(rows.counts[b] for b in chosen)
    spans = [_span(rows, b, earlier_keys) for b in chosen]
    keys = max(spans)
    device = rows.requests.device
    ends = torch.tensor([max(rows.ends[b], 1) for b in chosen], device=device)
    # Padding columns repeat the first key the request really reads: its own slot, never an evicted or foreign one.
    first = ends - torch.tensor(spans, device=device)
    positions = torch.maximum(ends[:, None] + torch.arange(-keys, 0, device=device), first[:, None])
    requests = rows.requests if len(chosen) == len(rows.counts) else rows.requests[chosen]
    slots = find_slots(requests[:, None], positions)
    mask = None
    if min(spans) < keys or keys < width:
        mask = batch_mask(width, keys, ends, earlier_keys)
    elif width > 1:  # a single row sees every key
        mask = aligned_mask(width, keys, earlier_keys)
    flat, real = _flat_rows(rows, chosen, width)
    return BatchCall(
        rows=flat,
        real=real,
        shape=(len(chosen), width, keys),
        keys=as_key_slots(slots[0]) if len(chosen) == 1 else KeySlots(slots.numel(), slots=slots),
        mask=mask,
    )


def _flat_rows(rows: PassRows, chosen: list[int], width: int) -> tuple[slice | Tensor, tuple[Tensor, Tensor] | None]:
    """`rows` and `real` of a BatchCall: the chosen requests' rows, padded at the left to `width` each."""
    first = rows.first_rows
    if all(rows.counts[b] == width for b in chosen) and chosen[-1] - chosen[0] == len(chosen) - 1:
        return slice(first[chosen[0]], first[chosen[-1] + 1]), None
    device = rows.requests.device
    starts = torch.tensor([first[b] for b in chosen], device=device)[:, None]
    stops = torch.tensor([first[b + 1] for b in chosen], device=device)[:, None]
    index = stops + torch.arange(-width, 0, device=device)
    real = (index >= starts).flatten().nonzero().flatten()
    flat = torch.maximum(index, starts).flatten()
    return flat, (real, flat[real])


def _stream(flat: slice, request: Tensor, end: int, find_slots: SlotLookup) -> StreamCall:
    slots = find_slots(request, torch.arange(end, device=request.device))
    size = flat.stop - flat.start
    own = None if size == 1 else as_key_slots(slots[end - size :])
    runs, rest = contiguous_runs(slots if own is None else slots[: end - size], SHORTEST_RUN)
    pieces = [KeySlots(length, start=start) for start, length in runs]
    piece_keys = PIECE_KEYS if size <= SHORT_ROWS else BLOCK_PIECE_KEYS
    pieces += [KeySlots(len(part), slots=part) for part in rest.split(piece_keys) if len(part)]
    return StreamCall(flat, pieces, own)


def _block(flat: slice, request: Tensor, end: int, earlier_keys: int, find_slots: SlotLookup) -> BlockCall:
    size = flat.stop - flat.start
    keys = min(end, earlier_keys + size)
    slots = find_slots(request, torch.arange(end - keys, end, device=request.device))
    causal = keys == size and size <= earlier_keys + 1
    mask = None if causal else additive(visible_keys(size, keys, earlier_keys, request.device))
    return BlockCall(flat, as_key_slots(slots), mask)
