"""The parameter of a layer whose weights stay packed."""

import torch
from torch import nn

from sglang_step35.packed.tensor import TYPES, PackedTensor


class PackedParameter(nn.Parameter):
    """Packed weights of one layer, by the names SGLang gives the parts of a fused layer ("q", 0, "w1"; None alone).

    As a tensor it is empty: the bytes stay where the reader left them, normally in files mapped into memory.
    """

    parts: dict[str | int | None, PackedTensor]
    order: tuple[str | int | None, ...]

    @classmethod
    def of(cls, *order: str | int | None) -> "PackedParameter":
        """order: the parts this parameter needs, as their rows follow each other."""
        parameter = cls(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        parameter.parts, parameter.order = {}, order
        return parameter

    def fill(self, part: str | int | None, tensor: "PackedTensor | torch.Tensor") -> None:
        """Take one part; an ordinary tensor becomes a packed one of float32."""
        self.parts[part] = tensor if isinstance(tensor, PackedTensor) else _float32(tensor)

    def rows(self) -> list[PackedTensor]:
        """The parts in order."""
        return [self.parts[part] for part in self.order]


def _float32(tensor: torch.Tensor) -> PackedTensor:
    return PackedTensor(TYPES["F32"], tensor.float().contiguous().view(torch.uint8))
