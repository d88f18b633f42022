"""The GGUF format, one file or a split one: llama.cpp's names and conventions undone, weights left packed."""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf import ReaderTensor
from torch import Tensor

from sglang_step35.checkpoint.base import DamagedFile, TensorFiles
from sglang_step35.checkpoint.gguf_file import GGUFFile, open_gguf
from sglang_step35.checkpoint.gguf_names import ARCHITECTURE, ROPE_FREQS, is_norm, published_name
from sglang_step35.packed.ggml import TYPES, GGMLTensor

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def is_gguf(source: str | None) -> bool:
    """Whether a model path names a GGUF file, by its ending or its first bytes."""
    path = Path(source or "")
    if not source or path.is_dir():
        return False
    if path.suffix == ".gguf":
        return True
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


class GGUFFiles(TensorFiles):
    """A GGUF checkpoint.

    source: the file, or the first of `NAME-00001-of-0000N.gguf`; the others lie beside it. Nothing is read before it
    is asked for.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self.paths = _shard_paths(self.source)

    def __str__(self) -> str:
        return f"the checkpoint {self.source}"

    def describe(self, name: str) -> str:
        """The published name, and the GGUF tensors and files that hold it."""
        found = [f"{own} in {file.path.name}" for own, file, _ in self._named.get(name, ())]
        return f"{name} ({' and '.join(found)})" if found else name

    def dtype(self, name: str) -> str | None:
        """The GGML type ("Q4_K", "BF16")."""
        entries = self._named.get(name)
        return entries[0][2].tensor_type.name if entries else None

    def files(self) -> list[Path]:
        """All parts of a split file."""
        return self.paths

    def damaged(self) -> list[str]:
        """One sentence for each damaged or missing file."""
        found = []
        for path in self.paths:
            try:
                open_gguf(path)
            except DamagedFile as error:
                found.append(str(error))
        return found

    def metadata(self) -> GGUFFile:
        """The file that holds the metadata. Raises DamagedFile for another architecture and for a later shard."""
        shard = _SHARD.fullmatch(self.source.name)
        if shard and int(shard[2]) != 1:
            raise DamagedFile(
                f"{self.source} is part {int(shard[2])} of a split file: give part 1, {self.paths[0].name}"
            )
        first = open_gguf(self.paths[0])
        architecture = first.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise DamagedFile(
                f"{self.paths[0]} holds the architecture {architecture!r}, not {ARCHITECTURE!r}: it is another model"
            )
        return first

    def tensors(self) -> Iterator[tuple[str, Tensor | GGMLTensor]]:
        """Published name -> packed rows of the file; norms as float32, 1 subtracted again."""
        for file, entry in self._entries():
            if entry.name != ROPE_FREQS:
                yield published_name(entry.name) or entry.name, self._read(file, entry)

    def raw(self, name: str) -> GGMLTensor | None:
        """A tensor by its GGUF name, as it stands."""
        for file, entry in self._entries():
            if entry.name == name:
                return _packed(file, entry)
        return None

    def _read(self, file: GGUFFile, entry) -> Tensor | GGMLTensor:
        tensor = _packed(file, entry)
        return tensor.dequantize() - 1 if is_norm(entry.name) else tensor

    def _entries(self) -> Iterator[tuple[GGUFFile, ReaderTensor]]:
        """Every tensor of every shard. Raises DamagedFile for a missing one."""
        first = self.metadata()
        files = [open_gguf(path) for path in self.paths]
        listed, count = first.get("split.count"), sum(len(file.tensors) for file in files)
        if listed is not None and int(listed) not in (0, len(files)):
            raise DamagedFile(f"{first.path} is one of {listed} parts: name them {_example(first.path, int(listed))}")
        total = first.get("split.tensors.count")
        if total is not None and int(total) != count:
            raise DamagedFile(f"{self} has {count} tensors, its header asks for {total}: its parts do not fit together")
        for file in files:
            yield from ((file, entry) for entry in file.tensors)

    @cached_property
    def _named(self) -> dict[str, list[tuple[str, GGUFFile, ReaderTensor]]]:
        """Published name -> [(GGUF name, file, tensor)], of the files that can be read."""
        named: dict[str, list] = {}
        for path in self.paths:
            try:
                file = open_gguf(path)
            except DamagedFile:
                continue
            for entry in file.tensors:
                named.setdefault(published_name(entry.name) or entry.name, []).append((entry.name, file, entry))
        return named


def _packed(file: GGUFFile, entry) -> GGMLTensor:
    """The tensor [.., columns] as it stands: GGUF lists its dimensions in reverse."""
    kind = TYPES.get(entry.tensor_type.name)
    if kind is None:
        raise DamagedFile(
            f"{file.path}: the tensor {entry.name} has the type {entry.tensor_type.name}, which is not implemented; "
            f"quantise the model to one of {', '.join(TYPES)}"
        )
    *leading, columns = (int(size) for size in reversed(entry.shape))
    data = np.ascontiguousarray(entry.data).view(np.uint8).reshape(*leading, columns // kind.block * kind.size)
    return GGMLTensor(kind, torch.from_numpy(data))


def _shard_paths(source: Path) -> list[Path]:
    """All files of the checkpoint, in order."""
    match = _SHARD.fullmatch(source.name)
    if not match:
        return [source]
    return [source.with_name(f"{match[1]}-{i + 1:05d}-of-{match[3]}.gguf") for i in range(int(match[3]))]


def _example(path: Path, count: int) -> str:
    return f"{path.stem}-00001-of-{count:05d}.gguf and so on, side by side"
