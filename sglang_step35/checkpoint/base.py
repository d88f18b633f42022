"""What a checkpoint format must answer, whatever its files look like. No SGLang here.

The loader (`model/weights.py`) asks a `CheckpointFiles` about the files behind the tensors it takes. SGLang reads
safetensors itself; a format it cannot read is a `TensorFiles`, which also yields the tensors. Either way the loader
sees the published names, and checks that each tensor comes once and in its shape.
A new format is one subclass beside `safetensors.py` and `gguf.py`, and one line in `formats.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sglang_step35.packed.tensor import PackedTensor


class DamagedFile(ValueError):
    """A checkpoint file whose header or length is wrong; the message says how."""


class CheckpointFiles(ABC):
    """The files of one checkpoint. Names are those of the published safetensors files."""

    @abstractmethod
    def __str__(self) -> str:
        """The checkpoint in a message, e.g. "the checkpoint /models/step"."""

    @abstractmethod
    def describe(self, name: str) -> str:
        """`name` and in which file it lies or should lie."""

    @abstractmethod
    def dtype(self, name: str) -> str | None:
        """How the tensor is stored ("BF16", "F8_E4M3"); None if it is not there."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that hold weights, sorted; none for an unknown source."""

    @abstractmethod
    def damaged(self) -> list[str]:
        """One sentence for each damaged or missing file."""


class TensorFiles(CheckpointFiles):
    """Files of a format that SGLang does not read."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor | PackedTensor]]:
        """Every tensor under its published name and in its published meaning, mapped into memory.

        What belongs to no published name comes under its own, for the loader to refuse. Raises DamagedFile.
        """
