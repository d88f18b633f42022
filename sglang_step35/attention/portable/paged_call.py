"""Few rows of all requests of a pass in one call of the compiled kernel, which reads pools in place. No SGLang here.

Letters: B requests, T query rows of the pass, H query heads, N key/value heads, D head size, S slots of the pool.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sglang_step35.attention.portable import paged_kernel, segment, team
from sglang_step35.attention.portable.kernel_calls import KVReader
from sglang_step35.packed import amx_rows
from sglang_step35.packed.ik_check import usable
from sglang_step35.vector_code import lanes

ALONE = 1 << 19  # products that one core has done before another one has begun
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def kind(dtype: torch.dtype) -> str:
    """What `paged_kernel` calls pools of this type that `reads` accepts."""
    return paged_kernel.BY_AMX if dtype is torch.bfloat16 and amx_rows.supported() else NAMES[dtype]


def reads(pool: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel reads a pool [S, N, D] for queries of this type."""
    return (
        pool.dtype == dtype
        and dtype in NAMES
        and pool.shape[2] % lanes() == 0
        and pool.stride()[1:] == (pool.shape[2], 1)
    )


def prepare(dtype: torch.dtype) -> None:
    """Compile what reads pools of this type, which takes seconds: graphs of layers are for other types than float32."""
    if dtype in NAMES:
        paged_kernel.compiled(kind(dtype))
    if dtype is torch.bfloat16 and usable():
        paged_kernel.compiled_store(kind(dtype))
        paged_kernel.compiled_step(kind(dtype))


@dataclass(frozen=True)
class SlotTable:
    """Where keys lie. of_requests: [R, L] int32, slots of each request's positions. mapping: from those to the slots of
    the sliding pool, int64, for layers that read it."""

    of_requests: Tensor
    mapping: Tensor | None = None

    def __post_init__(self):
        strides, mapping = self.of_requests.stride(), self.mapping
        if self.of_requests.dtype != torch.int32 or strides[1] != 1:
            raise ValueError(f"slots of requests are int32 rows without gaps, not {self.of_requests.dtype} {strides}")
        if mapping is not None and not (mapping.dtype == torch.int64 and mapping.is_contiguous()):
            raise ValueError(f"a mapping of slots is int64 without gaps, not {mapping.dtype} {mapping.stride()}")


@dataclass(frozen=True)
class PagedCall:
    """requests: [B + 1, fields of REQUEST] int64. rows: the most of a request.

    pairs: rows times keys of all requests. blocks: of one head of all requests.
    """

    requests: np.ndarray
    table: SlotTable
    earlier_keys: int
    rows: int
    pairs: int
    blocks: int

    @classmethod
    def of(
        cls,
        first_rows: list[int],
        counts: list[int],
        ends: list[int],
        indices: list[int],
        table: SlotTable,
        earlier_keys: int,
    ) -> "PagedCall":
        """indices: the requests' rows of the table. Rows before position 0 see nothing."""
        ends = [max(end, 0) for end in ends]
        earlier = max(ends) if earlier_keys < 0 else earlier_keys
        # The keys, up to its end, that a request's rows see together; one block at least, by which padding becomes 0.
        spans = [min(end, earlier + count) for end, count in zip(ends, counts, strict=True)]
        blocks = [0, *accumulate(max(1, -(-span // segment.KEYS)) for span in spans)]
        columns = [*first_rows, 0], [*counts, 0], [*ends, 0], [*indices, 0], [*spans, 0], blocks
        requests = np.array(columns).T.copy()
        pairs = sum(count * span for count, span in zip(counts, spans, strict=True))
        return cls(requests, table, earlier_keys, max(counts), pairs, blocks[-1])

    def run(self, q: Tensor, reader: KVReader, scale: float, out: Tensor) -> None:
        if q.stride()[1:] != (q.shape[2], 1):
            q = q.contiguous()
        keys, values = reader.pools
        (_, heads, size), width = keys.shape, q.element_size()
        task = paged_kernel.Task(
            q=q.data_ptr(),
            out=out.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            q_stride=q.stride(0) * width,
            keys_stride=keys.stride(0) * width,
            values_stride=values.stride(0) * width,
            heads=heads,
            group=q.shape[1] // heads,
            size=size,
            width=width,
            q_width=width,
            scale=scale,
            **self.fields(q.shape[1], heads, size, reader.scratch.address),
        )
        team.run(paged_kernel.compiled(kind(q.dtype)), task, task.parts)

    def fields(self, queries: int, heads: int, size: int, memory: Callable[[int], int]) -> dict[str, int]:
        """What a `Task` has of the pass, for layers of so many query and key heads of this size.

        memory: to be written, for a number of bytes its address.
        """
        parts, rows = self._parts(queries * size, heads), self.rows * (queries // heads)
        record, room = paged_kernel.record_floats(rows, size), segment.room_bytes(rows, size)
        rooms = memory(parts * (8 * record + room))
        return dict(
            table=self.table.of_requests.data_ptr(),
            table_stride=self.table.of_requests.stride(0) * self.table.of_requests.itemsize,
            mapping=0 if self.table.mapping is None else self.table.mapping.data_ptr(),
            requests=self.requests.ctypes.data,
            rooms=rooms,
            records=rooms + parts * room,
            earlier_keys=self.earlier_keys,
            count=len(self.requests) - 1,
            record=record,
            room=room,
            parts=parts,
        )

    def _parts(self, channels: int, heads: int) -> int:
        """Threads that pay; channels: of a row's queries."""
        return max(1, min(torch.get_num_threads(), self.blocks * heads, self.pairs * channels // ALONE))
