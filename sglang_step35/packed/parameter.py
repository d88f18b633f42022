"""The parameter of a layer whose weights stay packed."""

from collections.abc import Callable

import torch
from torch import nn

from sglang_step35.packed.ggml import plain
from sglang_step35.packed.stack import StackedTensor
from sglang_step35.packed.tensor import PackedTensor

Cut = Callable[[str | int | None, PackedTensor], PackedTensor]


class PackedParameter(nn.Parameter):
    """Packed weights of one layer, by the names SGLang gives the parts of a fused layer ("q", 0, "w1"; None alone).

    As a tensor it is empty: the bytes stay where the reader left them, normally in files mapped into memory.
    """

    parts: dict[str | int | None, PackedTensor]
    order: tuple[str | int | None, ...]
    experts: range | None
    cut: Cut

    @classmethod
    def of(cls, *order: str | int | None, cut: Cut, experts: range | None = None) -> "PackedParameter":
        """order: the parts this parameter needs, as their rows follow each other. cut: gives this rank's share of a
        part. experts: the numbers of those that this rank keeps."""
        parameter = cls(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        parameter.parts, parameter.order, parameter.cut, parameter.experts = {}, order, cut, experts
        return parameter

    def fill(self, part: str | int | None, tensor: PackedTensor | torch.Tensor, expert: int | None = None) -> None:
        """Take this rank's share of a whole part, or of one expert's; an ordinary tensor stays in its own dtype.

        Raises ValueError where the ranks would cut what shares a scale.
        """
        packed = as_packed(tensor)
        if expert is None:
            mine = packed if self.experts is None else packed[self.experts.start : self.experts.stop]
            self.parts[part] = self.cut(part, mine)
        elif self.experts is not None and expert in self.experts:
            stack = self.parts.get(part)
            if not isinstance(stack, StackedTensor):
                stack = self.parts[part] = StackedTensor({})
            stack.matrices[expert - self.experts.start] = self.cut(part, packed)

    def rows(self) -> list[PackedTensor]:
        """The parts in order."""
        return [self.parts[part] for part in self.order]


def as_packed(tensor: PackedTensor | torch.Tensor) -> PackedTensor:
    """The same weights behind the one interface."""
    return tensor if isinstance(tensor, PackedTensor) else plain(tensor)
