"""What a checkpoint format must answer, whatever its files look like. No SGLang and no torch here.

SGLang reads the tensors themselves; the loader (`model/weights.py`) asks these questions about the files behind them.
A new format is one subclass beside `safetensors.py` and one line in `formats.py`.
"""

from abc import ABC, abstractmethod


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
    def damaged(self) -> list[str]:
        """One sentence for each damaged or missing file."""
