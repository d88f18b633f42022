"""A weight as its file stores it: bytes and their type. No SGLang here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.packed import unpack


@dataclass(frozen=True)
class PackedType:
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
        PackedType("F32", 0, 1, 4, unpack.f32),
        PackedType("F16", 1, 1, 2, unpack.f16),
        PackedType("BF16", 30, 1, 2, unpack.bf16),
        PackedType("Q4_0", 2, 32, 18, unpack.q4_0),
        PackedType("Q8_0", 8, 32, 34, unpack.q8_0),
        PackedType("Q4_K", 12, 256, 144, unpack.q4_k),
        PackedType("Q5_K", 13, 256, 176, unpack.q5_k),
        PackedType("Q6_K", 14, 256, 210, unpack.q6_k),
    )
}


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """Rows of packed weights, usually a view of a file mapped into memory.

    data: [..., bytes of a row] uint8. Indexing works on the leading dimensions, as on a tensor.
    """

    type: PackedType
    data: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights: [..., columns]."""
        *leading, size = self.data.shape
        return (*leading, size // self.type.size * self.type.block)

    def __getitem__(self, index) -> "PackedTensor":
        return PackedTensor(self.type, self.data[index])

    def dequantize(self) -> Tensor:
        """The weights in float32; a view where the file stores float32."""
        blocks = self.data.contiguous().view(-1, self.type.size)
        return self.type.unpack(blocks).view(self.shape)

    def equals(self, other: "PackedTensor") -> bool:
        """The same type and the same bytes."""
        return self.type is other.type and torch.equal(self.data, other.data)
