"""Blocks of a GGUF file, and ordinary floating-point tensors as the same thing with blocks of one weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.packed import unpack
from sglang_step35.packed.tensor import PackedTensor, check_cut


@dataclass(frozen=True)
class GGMLType:
    """A GGML type: `block` consecutive weights of a row stand in `size` bytes. number: GGML's own of the type."""

    name: str
    number: int
    block: int
    size: int
    unpack: Callable[[Tensor], Tensor]

    @property
    def plain(self) -> bool:
        """Whether it is an ordinary floating-point type."""
        return self.block == 1


TYPES = {
    kind.name: kind
    for kind in (
        GGMLType("F32", 0, 1, 4, unpack.f32),
        GGMLType("F16", 1, 1, 2, unpack.f16),
        GGMLType("BF16", 30, 1, 2, unpack.bf16),
        GGMLType("Q4_0", 2, 32, 18, unpack.q4_0),
        GGMLType("Q4_1", 3, 32, 20, unpack.q4_1),
        GGMLType("Q8_0", 8, 32, 34, unpack.q8_0),
        GGMLType("Q4_K", 12, 256, 144, unpack.q4_k),
        GGMLType("Q5_K", 13, 256, 176, unpack.q5_k),
        GGMLType("Q6_K", 14, 256, 210, unpack.q6_k),
        GGMLType("MXFP4", 39, 32, 17, unpack.mxfp4),
    )
}
WIDEST_BLOCK = max(kind.block for kind in TYPES.values())  # weights
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, eq=False)
class GGMLTensor(PackedTensor):
    """Rows of one GGML type. data: [..., rows, bytes of a row] uint8."""

    type: GGMLType
    data: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, size = self.data.shape
        return (*leading, size // self.type.size * self.type.block)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return (self.data,)

    @property
    def kind(self) -> tuple:
        return (*super().kind, self.type.name)

    def __getitem__(self, index) -> "GGMLTensor":
        return GGMLTensor(self.type, self.data[index])

    def rows(self, start: int, end: int) -> "GGMLTensor":
        return GGMLTensor(self.type, self.data[..., start:end, :])

    def columns(self, start: int, end: int) -> "GGMLTensor":
        check_cut(self.shape[-1], start, end, self.type.block, f"{self.type.name} blocks")
        first, last = (at // self.type.block * self.type.size for at in (start, end))
        return GGMLTensor(self.type, self.data[..., first:last])

    def dequantize(self) -> Tensor:
        blocks = self.data.contiguous().view(-1, self.type.size)
        return self.type.unpack(blocks).view(self.shape)


def plain(tensor: Tensor) -> GGMLTensor:
    """An ordinary matrix [..., rows, columns] of float32, float16 or bfloat16, in its own type and memory."""
    return GGMLTensor(TYPES[_FLOATS[tensor.dtype]], tensor.contiguous().view(torch.uint8))
