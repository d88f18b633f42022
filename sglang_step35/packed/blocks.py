"""FP8 with a scale for each block of rows and columns: 1 byte a weight, and 4 for each block of 128 x 128."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_step35.packed.ggml import plain
from sglang_step35.packed.tensor import PackedTensor, check_cut


@dataclass(frozen=True, eq=False)
class BlockTensor(PackedTensor):
    """value * scale of its block. Parts may begin and end inside a block, as 1280 columns over 4 ranks do.

    values: [..., R, C] float8. scales: [..., ceil((R + first row) / block), the same of columns].
    block: rows and columns that share a scale. first: row and column of the first weight inside its block.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int]
    first: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.values, self.scales

    def __getitem__(self, index) -> PackedTensor:
        """Rows in no order, as an embedding is asked for, come in float32: no block is left of them."""
        if self.values.dim() > 2:
            return replace(self, values=self.values[index], scales=self.scales[index])
        if not isinstance(index, slice):
            return plain(self._values(self.values.view(torch.uint8)[index].view(self.values.dtype), index))
        start, end, _ = index.indices(len(self.values))
        return self.rows(start, max(start, end))

    def rows(self, start: int, end: int) -> "BlockTensor":
        cut, row = _scale_range(start, end, self.block[0], self.first[0])
        values, scales = self.values[..., start:end, :], self.scales[..., cut, :]
        return replace(self, values=values, scales=scales, first=(row, self.first[1]))

    def columns(self, start: int, end: int) -> "BlockTensor":
        check_cut(self.shape[-1], start, end, 1, "weights")
        cut, column = _scale_range(start, end, self.block[1], self.first[1])
        values, scales = self.values[..., start:end], self.scales[..., cut]
        return replace(self, values=values, scales=scales, first=(self.first[0], column))

    def dequantize(self) -> Tensor:
        return self._values(self.values, torch.arange(self.shape[-2]))

    def _values(self, values: Tensor, rows: Tensor) -> Tensor:
        """values [..., C] of these rows -> float32."""
        columns = torch.arange(self.shape[-1]) + self.first[1]
        scales = self.scales.float()[..., (rows + self.first[0]) // self.block[0], :]
        return values.float() * scales[..., columns // self.block[1]]

    @property
    def kind(self) -> tuple:
        return (*super().kind, self.block, self.first)


def _scale_range(start: int, end: int, block: int, first: int) -> tuple[slice, int]:
    """Which scales weights start .. end - 1 need, and where in its block the first of them lies."""
    start, end = start + first, end + first
    return slice(start // block, -(-end // block)), start % block
