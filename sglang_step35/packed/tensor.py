"""A weight as its file stores it: what every kind of packed matrix must answer. No SGLang here."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class PackedTensor(ABC):
    """Weights [..., rows, columns] that stay packed in memory, usually views of files mapped into it.

    Kinds: `ggml.py` (GGUF's blocks), `grouped.py` (codes with a scale for each group of columns), `blocks.py` (FP8
    with a scale for each block of rows and columns), `stack.py` (matrices of any kind on top of each other).
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the weights: [..., rows, columns]."""

    @property
    @abstractmethod
    def stored(self) -> tuple[Tensor, ...]:
        """Every tensor that the weights are read from."""

    @abstractmethod
    def __getitem__(self, index) -> PackedTensor:
        """Index the first dimension as on a tensor: an expert or several of a stack, rows of one matrix."""

    @abstractmethod
    def rows(self, start: int, end: int) -> PackedTensor:
        """The rows start .. end - 1 of every matrix."""

    @abstractmethod
    def columns(self, start: int, end: int) -> PackedTensor:
        """The columns start .. end - 1 of every row. Raises ValueError where that would cut what shares a scale."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weights in float32; a view where the file stores float32."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.stored)

    def equals(self, other: PackedTensor) -> bool:
        """Stored in the same way, bit by bit."""
        return (
            self.kind == other.kind
            and self.shape == other.shape
            and all(_same(mine, theirs) for mine, theirs in zip(self.stored, other.stored, strict=True))
        )

    @property
    def kind(self) -> tuple:
        """What must be the same for the stored tensors to mean the same."""
        return type(self), len(self.stored)


def check_cut(columns: int, start: int, end: int, unit: int, what: str) -> None:
    """Raise ValueError unless start .. end lies between multiples of `unit` and inside the columns."""
    if not 0 <= start < end <= columns:
        raise ValueError(f"columns {start} to {end} do not lie in a matrix of {columns}")
    if start % unit or end % unit:
        raise ValueError(f"columns {start} to {end} of {columns} would cut {what} of {unit} columns")


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit by bit, for types without a comparison (float8) too."""
    if first.dtype is not second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
