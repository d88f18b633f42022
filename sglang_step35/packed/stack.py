"""Matrices on top of each other, each where and how its file has it: experts that a checkpoint keeps one by one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_step35.packed.tensor import PackedTensor


@dataclass(frozen=True, eq=False)
class StackedTensor(PackedTensor):
    """[E, rows, columns] of E matrices by number, which may be of different kinds; only single ones are read."""

    matrices: dict[int, PackedTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.matrices), *next(iter(self.matrices.values())).shape)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(tensor for _, matrix in sorted(self.matrices.items()) for tensor in matrix.stored)

    def __getitem__(self, index: int | slice) -> PackedTensor:
        if isinstance(index, int):
            return self.matrices[index]
        return StackedTensor({i: self.matrices[e] for i, e in enumerate(range(len(self.matrices))[index])})

    def rows(self, start: int, end: int) -> "StackedTensor":
        return StackedTensor({number: matrix.rows(start, end) for number, matrix in self.matrices.items()})

    def columns(self, start: int, end: int) -> "StackedTensor":
        return StackedTensor({number: matrix.columns(start, end) for number, matrix in self.matrices.items()})

    def dequantize(self) -> Tensor:
        return torch.stack([matrix.dequantize() for _, matrix in sorted(self.matrices.items())])

    @property
    def kind(self) -> tuple:
        return (*super().kind, *(matrix.kind for _, matrix in sorted(self.matrices.items())))
