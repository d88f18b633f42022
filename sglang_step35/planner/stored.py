"""What a checkpoint on disk holds, from the headers of its files: bytes by part of the model, types, MTP layers.

On the portable platform a weight takes in memory what it takes in its file, or in the blocks that ggml's kernels read
(`packed/prepare.py`), so these figures replace the estimates of `weights.py` there.
"""

import json
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.checkpoint.names import COPIES, VISION_PREFIXES, TensorName, parse_name, text_name
from sglang_step35.checkpoint.quantization import Quantization, QuantizationError
from sglang_step35.checkpoint.safetensors import SafetensorsFiles, read_header
from sglang_step35.config import ModelSpec, parse_config
from sglang_step35.config_step37 import text_fields
from sglang_step35.planner.weights import FP32, Parts

# What config.json calls a quantisation -> what the planner calls its sizes.
_METHODS = {"fp8": "fp8", "w8a8_int8": "int8", "auto-round": "int4", "gptq": "int4", "awq": "int4", "mxfp4": "int4"}
_SHARED = ("weight_scale", "weight_zero_point", "weight_shape", "scales", "qzeros")  # what groups of codes share


@dataclass(frozen=True)
class Stored:
    """A checkpoint. types: (type as the format writes it, bytes), the largest first. mtp: MTP layers with tensors.

    cuda_only: why the portable platform refuses its quantisation; None where it serves it.
    """

    path: str
    format: str  # "GGUF", "safetensors"
    files: int
    quantization: str
    types: tuple[tuple[str, int], ...]
    parts: Parts
    mtp: int
    cuda_only: str | None = None

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(count for _, count in self.types)

    def weights(self, mtp: bool) -> Parts:
        """Bytes of each part, with or without the MTP layers."""
        return self.parts if mtp else replace(self.parts, mtp=0, mtp_heads=0, mtp_embeddings=0)


def read(path: str) -> tuple[ModelSpec, Stored | None]:
    """A config.json, a checkpoint's folder or a GGUF file; no `Stored` where there are no weights.

    Raises ConfigError, DamagedFile, OSError; ValueError for what is no JSON.
    """
    if Path(path).is_file() and Path(path).suffix != ".json":
        return _read_gguf(path)
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object, got {type(config).__name__}")
    spec = parse_config(config)
    return spec, _read_safetensors(file.parent, spec, text_fields(config))


def _read_gguf(path: str) -> tuple[ModelSpec, Stored]:
    from sglang_step35.checkpoint.gguf import GGUFFiles
    from sglang_step35.checkpoint.gguf_config import config_fields
    from sglang_step35.checkpoint.gguf_file import open_gguf
    from sglang_step35.checkpoint.gguf_names import published_name

    spec, files = parse_config(config_fields(path)), GGUFFiles(path)
    entries = [
        (published_name(entry.name) or entry.name, entry.tensor_type.name, int(entry.n_bytes))
        for file in files.paths
        for entry in open_gguf(file).tensors
    ]
    return spec, _stored(path, "GGUF", len(files.paths), "gguf", spec, entries)


def _read_safetensors(folder: Path, spec: ModelSpec, config: Any) -> Stored | None:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return None
    damaged = SafetensorsFiles(str(folder)).damaged()
    if damaged:
        raise DamagedFile("; ".join(damaged))
    entries = [
        (text_name(name), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for path in paths
        for name, entry in read_header(path).items()
        if not name.startswith(VISION_PREFIXES)
    ]
    given = config.get("quantization_config") or config.get("compression_config")
    stored = _stored(str(folder), "safetensors", len(paths), _quantization(given), spec, entries, _growth(given))
    return replace(stored, cuda_only=_refusal(given))


def _refusal(given: Any) -> str | None:
    try:
        if given:
            Quantization.of(given)
    except QuantizationError as error:
        return str(error)
    return None


def _quantization(given: Any) -> str:
    """The planner's name of the sizes of a `quantization_config`."""
    if not given:
        return "bf16"
    if given.get("quant_method") != "compressed-tensors":
        return "int8" if given.get("bits") == 8 else _METHODS.get(given.get("quant_method"), "int4")
    groups = (given.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups]
    eight = any(scheme.get("num_bits") == 8 for scheme in weights)
    return ("fp8" if any(scheme.get("type") == "float" for scheme in weights) else "int8") if eight else "int4"


def _growth(given: Any) -> float | None:
    """Bytes of a block of 32 weights for each byte of its codes; None where weights stay as the file has them."""
    width = {"int4": 4, "int8": 8}.get(_quantization(given))
    if width is None:
        return None
    schemes = [group.get("weights") or {} for group in (given.get("config_groups") or {}).values()]
    symmetric = given.get("sym", not given.get("zero_point", False))
    if not all(scheme.get("symmetric", True) for scheme in schemes) or not symmetric:
        return 20 / 16 if width == 4 else None
    return 18 / 16 if width == 4 else 34 / 32


def _kept(name: str, dtype: str, size: int, growth: float | None) -> int:
    """Bytes that this tensor of a quantised checkpoint stands for in memory."""
    leaf = name.rpartition(".")[2]
    if growth is None or leaf not in ("weight_packed", "qweight", "weight", *_SHARED):
        return size
    if dtype in ("I32", "I8") and leaf not in _SHARED:
        return round(size * growth)
    return 0 if leaf in _SHARED else size


def _stored(
    path: str,
    kind: str,
    files: int,
    quantization: str,
    spec: ModelSpec,
    entries: list[tuple[str, str, int]],
    growth: float | None = None,
) -> Stored:
    """entries: (published name, type, bytes) of each tensor."""
    types: Counter[str] = Counter()
    sums = {field.name: 0 for field in fields(Parts)}
    layers = set()
    for name, dtype, size in entries:
        types[dtype] += size
        tensor = parse_name(name)
        part = _part(tensor, spec)
        if part is None:
            continue
        # This plug-in keeps the router's gate in float32.
        widened = part == "router" and dtype in ("BF16", "F16")
        sums[part] += size * FP32 // 2 if widened else _kept(name, dtype, size, growth)
        if part == "mtp":
            layers.add(tensor.layer)
    ordered = tuple(types.most_common())
    return Stored(path, kind, files, quantization, ordered, Parts(**sums), len(layers))


def _part(tensor: TensorName, spec: ModelSpec) -> str | None:
    """The field of `Parts` that a tensor counts for; None for what is no weight of the model."""
    module = tensor.module
    if tensor.layer is None:
        return {"model.embed_tokens": "embedding", "lm_head": "head", "model.norm": "norms"}.get(module)
    if tensor.layer >= spec.num_layers:
        copy = COPIES.get(f"{module}.weight")
        return f"mtp_{copy}s" if copy else "mtp"
    if module.endswith("norm"):
        return "norms"
    return next((part for prefix, part in _MODULES if module.startswith(prefix)), None)


_MODULES = (
    ("self_attn.", "attention"),
    ("mlp.", "dense"),
    ("share_expert.", "shared"),
    ("moe.gate_proj", "routed"),
    ("moe.up_proj", "routed"),
    ("moe.down_proj", "routed"),
    ("moe", "router"),
)
