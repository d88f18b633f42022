"""The parameter of a layer whose weights stay packed."""

from collections.abc import Callable

import torch
from torch import nn

from sglang_step35.packed.ggml import plain
from sglang_step35.packed.prepare import prepared
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
    given: dict[str | int | None, PackedTensor]
    cut: Cut
    prepares: bool
    keeps: bool

    @classmethod
    def of(
        cls,
        *order: str | int | None,
        cut: Cut,
        experts: range | None = None,
        prepares: bool = False,
        keeps: bool = False,
    ) -> "PackedParameter":
        """order: the parts this parameter needs, as their rows follow each other. cut: gives this rank's share of a
        part. experts: the numbers of those that this rank keeps. prepares: whether `prepare` may rearrange the
        weights: they are only multiplied by, and not in float32, which reads them as they are. keeps: whether what was
        given stays at hand nevertheless (`as_given`), normally in a mapped file."""
        parameter = cls(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        parameter.parts, parameter.order, parameter.cut, parameter.experts = {}, order, cut, experts
        parameter.given, parameter.prepares, parameter.keeps = {}, prepares, keeps
        return parameter

    def fill(self, part: str | int | None, tensor: PackedTensor | torch.Tensor, expert: int | None = None) -> None:
        """Take this rank's share of a whole part, or of one expert's; an ordinary tensor stays in its own dtype.

        Raises ValueError where the ranks would cut what shares a scale.
        """
        packed = as_packed(tensor)
        self.given.pop(part, None)
        if expert is None:
            mine = packed if self.experts is None else packed[self.experts.start : self.experts.stop]
            self.parts[part] = self.cut(part, mine)
        elif self.experts is not None and expert in self.experts:
            stack = self.parts.get(part)
            if not isinstance(stack, StackedTensor):
                stack = self.parts[part] = StackedTensor({})
            stack.matrices[expert - self.experts.start] = self.cut(part, packed)

    def prepare(self) -> None:
        """Put the parts as the kernels read them fastest, if this parameter may be.

        Raises ValueError where a weight update brought some experts only of a stack.
        """
        if not self.prepares:
            return
        for part, tensor in self.parts.items():
            if isinstance(tensor, StackedTensor) and self.experts and len(tensor.matrices) < len(self.experts):
                raise ValueError("an update of packed experts must bring all of a layer's")
            self.parts[part] = prepared(tensor)
            if self.keeps and self.parts[part] is not tensor:
                self.given[part] = tensor

    def rows(self) -> list[PackedTensor]:
        """The parts in order."""
        return [self.parts[part] for part in self.order]

    def as_given(self) -> list[PackedTensor]:
        """The parts in order, as the file has them."""
        return [self.given.get(part, self.parts[part]) for part in self.order]


def as_packed(tensor: PackedTensor | torch.Tensor) -> PackedTensor:
    """The same weights behind the one interface."""
    return tensor if isinstance(tensor, PackedTensor) else plain(tensor)
