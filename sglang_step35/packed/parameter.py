"""The parameter of a layer whose weights stay packed."""

import torch
from torch import nn

from sglang_step35.packed.ggml import plain
from sglang_step35.packed.stack import StackedTensor
from sglang_step35.packed.tensor import PackedTensor


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

    def fill(self, part: str | int | None, tensor: PackedTensor | torch.Tensor, expert: int | None = None) -> None:
        """Take one part, or one expert's of a part [E, rows, columns]; an ordinary tensor stays in its own dtype."""
        if expert is None:
            self.parts[part] = as_packed(tensor)
            return
        stack = self.parts.get(part)
        if not isinstance(stack, StackedTensor):
            stack = self.parts[part] = StackedTensor({})
        stack.matrices[expert] = as_packed(tensor)

    def rows(self) -> list[PackedTensor]:
        """The parts in order."""
        return [self.parts[part] for part in self.order]


def as_packed(tensor: PackedTensor | torch.Tensor) -> PackedTensor:
    """The same weights behind the one interface."""
    return tensor if isinstance(tensor, PackedTensor) else plain(tensor)
