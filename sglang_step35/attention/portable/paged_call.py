"""Few rows of all requests of a pass in one call of the compiled kernel, which reads pools in place. No SGLang here.

Letters: B requests, T query rows of the pass, H query heads, N key/value heads, D head size, S slots of the pool.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sglang_step35.attention.portable import paged_kernel, team
from sglang_step35.attention.portable.kernel_calls import KVReader
from sglang_step35.vector_code import lanes

ALONE = 1 << 19  # products that one core has done before another one has begun
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def reads(pool: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel reads a pool [S, N, D] for queries of this type."""
    return (
        pool.dtype == dtype
        and dtype in _NAMES
        and pool.shape[2] % lanes() == 0
        and pool.stride()[1:] == (pool.shape[2], 1)
    )


def prepare(dtype: torch.dtype) -> None:
    """Compile the kernel for pools of this type, which takes seconds, if it reads them."""
    if dtype in _NAMES:
        paged_kernel.compiled(_NAMES[dtype])


@dataclass(frozen=True)
class PagedCall:
    """requests: [B + 1, fields of REQUEST] int64. slots: int64, of each request's keys in the order of their positions.

    rows: the most of a request. pairs: rows times keys of all requests. blocks: of one head of all requests.
    """

    requests: np.ndarray
    slots: Tensor
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
        spans: list[int],
        slots: Tensor,
        earlier_keys: int,
    ) -> "PagedCall":
        """spans: the keys, up to its end, that a request's rows see together; none where its rows are padding."""
        # One block at least, by which rows that see nothing become 0.
        blocks = [max(1, -(-span // paged_kernel.KEYS)) for span in spans]
        starts = [[0, *accumulate(values)] for values in (spans, blocks)]
        columns = [*first_rows, 0], [*counts, 0], [*ends, 0], starts[0], [*spans, 0], starts[1]
        requests = np.array(columns).T.copy()
        pairs = sum(count * span for count, span in zip(counts, spans, strict=True))
        return cls(requests, slots, earlier_keys, max(counts), pairs, starts[1][-1])

    def run(self, q: Tensor, reader: KVReader, scale: float, out: Tensor) -> None:
        if q.stride()[1:] != (q.shape[2], 1):
            q = q.contiguous()
        keys, values = reader.pools
        (_, heads, size), width = keys.shape, q.element_size()
        group = q.shape[1] // heads
        parts, rows = self._parts(q.shape[1] * size, heads), self.rows * group
        record, room = paged_kernel.record_floats(rows, size), paged_kernel.room_bytes(rows, size)
        memory = reader.scratch.address(parts * (8 * record + room))
        task = paged_kernel.Task(
            q=q.data_ptr(),
            out=out.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            slots=self.slots.data_ptr(),
            requests=self.requests.ctypes.data,
            records=memory + parts * room,
            rooms=memory,
            q_stride=q.stride(0) * width,
            keys_stride=keys.stride(0) * width,
            values_stride=values.stride(0) * width,
            heads=heads,
            group=group,
            size=size,
            width=width,
            earlier_keys=self.earlier_keys,
            count=len(self.requests) - 1,
            record=record,
            room=room,
            parts=parts,
            scale=scale,
        )
        team.run(paged_kernel.compiled(_NAMES[q.dtype]), task, parts)

    def _parts(self, channels: int, heads: int) -> int:
        """Threads that pay; channels: of a row's queries."""
        return max(1, min(torch.get_num_threads(), self.blocks * heads, self.pairs * channels // ALONE))
