"""Log-probabilities of a few tokens, layer by layer in float32 on weights that other libraries dequantise.

The layers are the tests' plain torch (`tests/support/plain_mtp.py`); the `gguf` and `compressed_tensors` packages
dequantise one matrix, or one expert, at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from torch import Tensor

from scripts.benchmarks.real_width.checkpoint import GROUP
from tests.support import plain_mtp as plain
from tests.support.gguf_files import gguf_name

ROWS = 8192  # of the head at a time

Read = Callable[[str, int | None], Tensor]  # published name and expert -> float32


@torch.inference_mode()
def logprobs(read: Read, fields: Mapping[str, Any], ids: Sequence[int], first: int) -> Tensor:
    """Rows first .. len(ids) - 1: [rows, V], natural logarithm; row t is for token t + 1."""
    x = read("model.embed_tokens.weight", None)[torch.tensor(ids)]
    for index in range(fields["num_hidden_layers"]):
        x = plain.decoder_layer(x, Layer(read, f"model.layers.{index}."), plain.layer_fields(fields, index))
    x = plain.rms_norm(x[first:], read("model.norm.weight", None), fields.get("rms_norm_eps", 1e-5))
    head = read("lm_head.weight", None)
    return torch.cat([x @ rows.T for rows in head.split(ROWS)], dim=-1).log_softmax(-1)


class Layer(Mapping):
    """The weights of a layer by name, read when they are asked for."""

    def __init__(self, read: Read, prefix: str):
        self._read = read
        self._prefix = prefix

    def __getitem__(self, name: str) -> "Tensor | Experts":
        routed = name.startswith("moe.") and name.endswith("_proj.weight")
        return Experts(self._read, self._prefix + name) if routed else self._read(self._prefix + name, None)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("the names are asked for one by one")

    def __len__(self) -> int:
        raise TypeError("the names are asked for one by one")


class Experts:
    """A stack [E, N, K] of which only single experts are read."""

    def __init__(self, read: Read, name: str):
        self._read = read
        self._name = name

    def __getitem__(self, expert: int) -> Tensor:
        return self._read(self._name, expert)


def gguf_reader(file: Path) -> Read:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def read(name: str, expert: int | None) -> Tensor:
        tensor = tensors[gguf_name(name)]
        data = tensor.data if expert is None else tensor.data[expert]
        values = torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type).copy())
        return values - 1 if name.endswith("norm.weight") else values

    return read


def int4_reader(folder: Path) -> Read:
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
    where = {name: file for file in files for name in list(file.keys())}

    def read(name: str, expert: int | None) -> Tensor:
        if name in where:
            return where[name].get_tensor(name).float()
        module = name.removesuffix(".weight")
        if expert is not None:
            module = module.replace(".moe.", f".moe.experts.{expert}.")
        leaves = ("weight_packed", "weight_scale", "weight_shape")
        packed = {leaf: where[f"{module}.{leaf}"].get_tensor(f"{module}.{leaf}") for leaf in leaves}
        packed["weight_scale"] = packed["weight_scale"].float()  # the library multiplies in the scale's dtype
        return PackedQuantizationCompressor.decompress(packed, scheme)["weight"].float()

    return read
