"""Writes the truncated checkpoint: random weights, streamed, so that the host holds one vocabulary matrix and a few
stretches of noise of 128 MiB.

The residual stream keeps each token's embedding, which the head reads as a vote for the token's successor (echo.py).
A few channels are flags: channel i is set in the embeddings of the tokens after which MTP layer i must be wrong, and
that layer's input projection turns it into the embedding of another token. Letters: V vocabulary, H hidden size.
"""

import json
import math
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_check.echo import Echo
from scripts.gpu_check.layers import FLOAT32, all_tensors
from sglang_step35.assets import NANO
from sglang_step35.config import ModelSpec, parse_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NOISE_ELEMENTS = 1 << 26
RESIDUAL = 0.1  # what a layer adds to the stream, relative to the embedding
TRAP = 4.0  # weight of the wrong token where a flag is set; the right one has 1
BLOCK_ROWS = 8192
ODD = 4097  # no power of two: repeated noise meets no two experts at the same place


class Noise:
    """Normal bfloat16 numbers, drawn once; tensors are stretches of them from different places."""

    def __init__(self, elements: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.values = torch.randn(elements, generator=generator, dtype=torch.bfloat16)
        self.scaled = lru_cache(maxsize=4)(lambda std: self.values * std)

    def stretch(self, name: str, count: int, std: float) -> Iterator[Tensor]:
        """`count` numbers in pieces; the same name gives the same ones."""
        values = self.scaled(std)
        start = random.Random(name).randrange(len(values))
        while count:
            piece = values[start : start + count]
            yield piece
            count, start = count - len(piece), 0


@dataclass(frozen=True)
class Writer:
    """Pieces of each tensor by its checkpoint name."""

    spec: ModelSpec
    echo: Echo
    noise: Noise
    embed: Tensor  # [V, H], flags included

    @classmethod
    def create(cls, spec: ModelSpec, echo: Echo, seed: int = 0) -> "Writer":
        largest = max(math.prod(shape) for shape in all_tensors(spec).values())
        generator = torch.Generator().manual_seed(seed + 1)
        embed = torch.randn(spec.vocab_size, spec.hidden_size, generator=generator, dtype=torch.bfloat16)
        for layer, hits in enumerate(echo.hits):
            embed[:, layer] = (~hits).bfloat16()
        return cls(spec, echo, Noise(min(NOISE_ELEMENTS, largest) + ODD, seed), embed)

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterable[Tensor]:
        """Flat or whole, in order, bfloat16 or float32 as the file wants them."""
        if name == "model.embed_tokens.weight":
            return [self.embed]
        if name == "lm_head.weight" or name.endswith("shared_head.output.weight"):
            return self._head()
        if name.endswith("eh_proj.weight"):
            return [self._input_projection(name)]
        if name.endswith(FLOAT32):
            return (piece.float() for piece in self.noise.stretch(name, math.prod(shape), 0.01))
        if len(shape) == 1:  # norms, zero-centred: a scale of 1
            return [torch.zeros(shape, dtype=torch.bfloat16)]
        return self.noise.stretch(name, math.prod(shape), _gain(name) / math.sqrt(shape[-1]))

    def _head(self) -> Iterator[Tensor]:
        """Row y: the embeddings, without flags, of the tokens that y succeeds; logits of about 3 sqrt(H)."""
        order = self.echo.successor.argsort(stable=True)
        sorted_rows = self.echo.successor[order].contiguous()
        for start in range(0, self.spec.vocab_size, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, self.spec.vocab_size)
            low, high = torch.searchsorted(sorted_rows, torch.tensor([start, end])).tolist()
            rows = torch.zeros(end - start, self.spec.hidden_size)
            rows.index_add_(0, sorted_rows[low:high] - start, self.embed[order[low:high]].float())
            rows[:, : len(self.echo.hits)] = 0
            yield (rows * (3 / math.sqrt(self.spec.hidden_size))).bfloat16()

    def _input_projection(self, name: str) -> Tensor:
        """[H, 2 H]: keeps the embedding and adds a little of the hidden state."""
        hidden, flags = self.spec.hidden_size, len(self.echo.hits)
        layer = int(name.split(".")[2]) - self.spec.num_layers
        result = torch.zeros(hidden, 2 * hidden, dtype=torch.bfloat16)
        result[range(flags, hidden), range(flags, hidden)] = 1
        result[flags:, layer] = TRAP * self.embed[self.echo.trap, flags:]
        noise = torch.cat(list(self.noise.stretch(name, hidden * hidden, RESIDUAL / math.sqrt(hidden))))
        result[:, hidden:] = noise.view(hidden, hidden)
        return result


def _gain(name: str) -> float:
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return RESIDUAL
    return 2.0 if name.endswith(("g_proj.weight", "moe.gate.weight")) else 1.0


def write(directory: Path, fields: dict[str, Any], echo: Echo, seed: int = 0) -> int:
    """config.json, safetensors (a file for each layer), index and tokenizer; returns the bytes of the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = parse_config(fields)
    writer = Writer.create(spec, echo, seed)
    weight_map, total = {}, 0
    for file, shapes in _by_file(all_tensors(spec)).items():
        total += _save(directory / file, shapes, writer)
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for name in TOKENIZER_FILES:
        shutil.copyfile(NANO / name, directory / name)
    (directory / "config.json").write_text(json.dumps(fields, indent=1))  # last: a folder with one is whole
    return total


def _by_file(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        file = f"layer-{int(parts[2]):02d}.safetensors" if parts[1] == "layers" else "vocabulary.safetensors"
        files.setdefault(file, {})[name] = shape
    return files


def _save(path: Path, shapes: dict[str, tuple[int, ...]], writer: Writer) -> int:
    """One safetensors file, as https://github.com/huggingface/safetensors describes it: length, header, data."""
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype, size = ("F32", 4) if name.endswith(FLOAT32) else ("BF16", 2)
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, shape in shapes.items():
            for piece in writer.pieces(name, shape):
                out.write(memoryview(piece.contiguous().flatten().view(torch.uint8).numpy()))
    return end
