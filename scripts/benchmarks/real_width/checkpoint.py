"""Random weights, written as they are made: GGUF, bfloat16 and 4-bit compressed-tensors. `slice_fields`: a few layers
of the published widths.

Letters: E experts, N output rows, K input columns. All formats hold the same weights.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sglang_step35.assets import PUBLISHED_CONFIG
from tests.support import quantised
from tests.support.gguf_files import ALWAYS_F32, add_value, gguf_name, metadata_of, packed_bytes, rope_freqs

LISTS = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")
SHARD = 1 << 30  # bytes of a safetensors file, about
GROUP = 128


@dataclass(frozen=True)
class Matrix:
    """A tensor by its published name. shape: [N, K], [E, N, K] of routed experts, or [N]. mean and gain: of a normal
    distribution, of standard deviation gain / sqrt(K). made: its values, where they are not random.
    """

    name: str
    shape: tuple[int, ...]
    gain: float = 1.0
    mean: float = 0.0
    made: np.ndarray | None = field(default=None, repr=False, compare=False)

    def part(self, index: int = 0) -> np.ndarray:
        """The whole of it, or one expert, in float32; the same in every format."""
        if self.made is not None:
            return self.made
        shape = self.shape[-2:]
        chance = np.random.default_rng([zlib.crc32(self.name.encode()), index])
        values = chance.standard_normal(shape, dtype=np.float32)
        values *= self.gain / np.sqrt(shape[-1]) if len(shape) == 2 else self.gain
        return values + np.float32(self.mean) if self.mean else values

    @property
    def parts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1


def slice_fields(layers: int, vocabulary: int) -> dict[str, Any]:
    """The published config.json cut to a dense full layer and `layers` - 1 sliding ones with experts, without MTP."""
    fields = json.loads(PUBLISHED_CONFIG.read_text())
    cut = {name: fields[name][:layers] for name in LISTS}
    cut["swiglu_limits"][-1], cut["swiglu_limits_shared"][-1] = 7, 16  # what the last published layer has
    sparse = ",".join(str(layer) for layer in range(1, layers))
    few = {"num_hidden_layers": layers, "num_nextn_predict_layers": 0, "vocab_size": vocabulary, "eos_token_id": 1}
    return fields | cut | few | {"moe_layers_enum": sparse}


def matrices(fields: dict[str, Any]) -> Iterator[Matrix]:
    """Every tensor, a layer at a time."""
    hidden, vocabulary = fields["hidden_size"], fields["vocab_size"]
    yield Matrix("model.embed_tokens.weight", (vocabulary, hidden), gain=hidden**0.5)
    yield Matrix("model.norm.weight", (hidden,), gain=0.1)
    yield Matrix("lm_head.weight", (vocabulary, hidden), gain=3.0)
    for index in range(fields["num_hidden_layers"] + fields["num_nextn_predict_layers"]):
        prefix = f"model.layers.{index}."
        yield from (Matrix(prefix + name, *rest) for name, *rest in _layer(fields, index))


def _layer(fields: dict[str, Any], index: int) -> Iterator[tuple]:
    hidden, dim = fields["hidden_size"], fields["head_dim"]
    sliding = fields["layer_types"][index] == "sliding_attention"
    heads = (fields["attention_other_setting"] if sliding else fields)["num_attention_heads"]
    keys = fields["num_attention_groups"] * dim
    if index >= fields["num_hidden_layers"]:
        yield "eh_proj.weight", (hidden, 2 * hidden)
        yield from ((f"{name}.weight", (hidden,), 0.1) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield from ((f"{name}_layernorm.weight", (hidden,), 0.1) for name in ("input", "post_attention"))
    yield from ((f"self_attn.{name}_norm.weight", (dim,), 0.1, 0.8) for name in "qk")
    yield "self_attn.q_proj.weight", (heads * dim, hidden)
    yield from ((f"self_attn.{name}_proj.weight", (keys, hidden)) for name in "kv")
    yield "self_attn.o_proj.weight", (hidden, heads * dim)
    yield "self_attn.g_proj.weight", (heads, hidden), 2.0
    if str(index) not in fields["moe_layers_enum"].split(","):
        yield from _swiglu("mlp", fields["intermediate_size"], hidden)
        return
    experts = fields["moe_num_experts"]
    yield "moe.gate.weight", (experts, hidden), 2.0
    yield "moe.router_bias", (experts,), 0.1
    yield from _swiglu("moe", fields["moe_intermediate_size"], hidden, experts)
    yield from _swiglu("share_expert", fields["share_expert_dim"], hidden)


def _swiglu(module: str, width: int, hidden: int, *experts: int) -> Iterator[tuple]:
    yield from ((f"{module}.{name}_proj.weight", (*experts, width, hidden)) for name in ("gate", "up"))
    yield f"{module}.down_proj.weight", (*experts, hidden, width)


def write_gguf(file: Path, fields: dict[str, Any], kind: GGMLQuantizationType, entries: list[Matrix]) -> None:
    """llama.cpp's layout, one tensor in memory at a time; matrices in `kind`, vectors and routers in float32."""
    writer = GGUFWriter(file, "step35")
    for key, value in (metadata_of(fields, mtp=True) | tokenizer(fields["vocab_size"])).items():
        add_value(writer, key, value)
    divisors = rope_freqs(fields)
    writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
    for matrix in entries:
        shape = _byte_shape(matrix, kind)
        dtype = np.dtype(np.float32 if shape is None else np.uint8)
        shape = shape or matrix.shape
        raw = kind if dtype == np.uint8 else None
        writer.add_tensor_info(gguf_name(matrix.name), shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(divisors)
    for matrix in entries:
        writer.write_tensor_data(_gguf_data(matrix, kind))
    writer.close()


def _byte_shape(matrix: Matrix, kind: GGMLQuantizationType) -> tuple[int, ...] | None:
    """None: float32."""
    return None if matrix.name.endswith(ALWAYS_F32) else gguf.quant_shape_to_byte_shape(matrix.shape, kind)


def _gguf_data(matrix: Matrix, kind: GGMLQuantizationType) -> np.ndarray:
    shape = _byte_shape(matrix, kind)
    if shape is None:
        return matrix.part() + np.float32(matrix.name.endswith("norm.weight"))
    data = np.empty((matrix.parts, *shape[-2:]), dtype=np.uint8)
    for index in range(matrix.parts):
        data[index] = packed_bytes(matrix.part(index), kind, index)
    return data.reshape(shape)


def tokenizer(size: int) -> dict[str, Any]:
    """A byte-level BPE without merges: llama.cpp refuses a file without a tokenizer."""
    letters = list(bytes_to_unicode().values())
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [letters[i] if i < len(letters) else f"<{i}>" for i in range(size)],
        "token_type": [int(gguf.TokenType.NORMAL)] * size,
        "merges": [f"{letters[0]} {letters[1]}"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def write_bf16(folder: Path, fields: dict[str, Any], entries: list[Matrix]) -> None:
    """Safetensors as published: experts in stacks, everything in bfloat16 but the routers' bias."""
    (folder / "config.json").write_text(json.dumps(fields))
    _write_shards(folder, ((matrix.name, _bf16(matrix)) for matrix in entries))


def _bf16(matrix: Matrix) -> torch.Tensor:
    parts = [torch.from_numpy(matrix.part(index)) for index in range(matrix.parts)]
    dtype = torch.float32 if matrix.name.endswith("router_bias") else torch.bfloat16
    return torch.stack(parts).view(matrix.shape).to(dtype)


def write_fp8(folder: Path, fields: dict[str, Any], entries: list[Matrix]) -> None:
    """The same with routed experts in E4M3, in blocks of 64 x 64: those of 128 would cut these widths."""
    scheme = quantised.fp8((64, 64))
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": scheme.config}))
    _write_shards(folder, (tensor for matrix in entries for tensor in _fp8(matrix, scheme.pack)))


def _fp8(matrix: Matrix, pack: Callable) -> Iterator[tuple[str, torch.Tensor]]:
    module = matrix.name.removesuffix(".weight")
    if matrix.parts == 1:
        yield matrix.name, _bf16(matrix)
        return
    experts = [pack(expert)[0] for expert in _bf16(matrix)]
    for leaf in experts[0]:
        yield f"{module}.{leaf}", torch.stack([expert[leaf] for expert in experts])


def write_int4(folder: Path, fields: dict[str, Any]) -> None:
    """pack-quantized W4A16, groups of 128, each expert by itself; embedding, head, gates and routers in bfloat16."""
    scheme = quantised.compressed(4, GROUP)
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": scheme.config}))
    _write_shards(folder, _int4_tensors(fields, scheme.pack))


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    shard: dict[str, torch.Tensor] = {}
    listed: dict[str, str] = {}
    for name, tensor in tensors:
        if sum(held.nbytes for held in shard.values()) > SHARD:
            listed |= _save(folder, shard, len(set(listed.values())))
            shard = {}
        shard[name] = tensor.contiguous()
    listed |= _save(folder, shard, len(set(listed.values())))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def _int4_tensors(fields: dict[str, Any], pack: Callable) -> Iterator[tuple[str, torch.Tensor]]:
    for matrix in matrices(fields):
        module, _, leaf = matrix.name.rpartition(".")
        plain = ("embed_tokens", "lm_head", "norm", "g_proj", "moe.gate")
        if leaf != "weight" or module.endswith(plain):
            dtype = torch.float32 if leaf == "router_bias" else torch.bfloat16
            yield matrix.name, torch.from_numpy(matrix.part()).to(dtype)
            continue
        layer, _, part = module.partition(".moe.")
        for index in range(matrix.parts):
            own = f"{layer}.moe.experts.{index}.{part}" if matrix.parts > 1 else module
            tensors, _ = pack(torch.from_numpy(matrix.part(index)))
            yield from ((f"{own}.{leaf}", tensor) for leaf, tensor in tensors.items())


def _save(folder: Path, shard: dict[str, torch.Tensor], number: int) -> dict[str, str]:
    """Write a shard; returns which file holds its tensors."""
    file = f"model-{number + 1:05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(shard, file)
