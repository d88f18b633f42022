"""GGUF files of test checkpoints: llama.cpp's conventions written down once more, without the package under test.

The product documents llama.cpp's own converter; this one exists because that needs another transformers.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file

F32 = GGMLQuantizationType.F32
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.g_proj.weight": "attn_gate.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "moe.gate.weight": "ffn_gate_inp.weight",
    "moe.router_bias": "exp_probs_b.bias",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "embed_tokens.weight": "nextn.embed_tokens.weight",
    "shared_head.norm.weight": "nextn.shared_head_norm.weight",
    "shared_head.output.weight": "nextn.shared_head_head.weight",
    **{f"self_attn.{part}_proj.weight": f"attn_{part}.weight" for part in "qkv"},
    **{
        f"{module}.{part}_proj.weight": f"ffn_{part}{suffix}.weight"
        for module, suffix in (("mlp", ""), ("moe", "_exps"), ("share_expert", "_shexp"))
        for part in ("gate", "up", "down")
    },
}
# Never quantised by llama.cpp.
ALWAYS_F32 = ("norm.weight", "moe.gate.weight", "router_bias")

Quantise = Callable[[str], GGMLQuantizationType]


def gguf_name(name: str) -> str:
    """The GGUF name of a published tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, inside = name.split(".", 3)
    return f"blk.{layer}.{INSIDE[inside.removeprefix('transformer.')]}"


def packed_bytes(weight: np.ndarray, kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """[.., columns] float32 -> [.., bytes of a row]. K-quants: valid random blocks of about the weight's spread, since
    `gguf.quants` cannot quantise to them."""
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(weight, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    chance = np.random.default_rng(seed)
    blocks = (*weight.shape[:-1], weight.shape[-1] // block)
    raw = chance.integers(0, 256, (*blocks, size), dtype=np.uint8)
    # Mean squares of the integers below: 6-bit scale times 4- or 5-bit value; int8 scale times 6-bit value.
    spread = {"Q4_K": 36.6 * 8.8, "Q5_K": 36.6 * 18, "Q6_K": 74 * 18.5}[kind.name]
    scale = (weight.std() / spread * chance.uniform(0.5, 1.5, blocks)).astype(np.float16)

    def put(at: int, values: np.ndarray) -> None:
        raw[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)

    if kind.name == "Q6_K":
        put(208, scale)
    else:
        put(0, scale)
        put(2, scale.astype(np.float32) * (7.5 if kind.name == "Q4_K" else 15.5))  # centres the values
    return raw.reshape(*weight.shape[:-1], -1)


def write_gguf(
    directory: Path,
    file: Path,
    quantise: Quantise = lambda name: GGMLQuantizationType.Q8_0,
    mtp: bool = True,
    edit: Callable[[dict[str, Any], dict[str, tuple]], None] = lambda metadata, tensors: None,
    shards: int = 1,
    tokenizer: bool = True,
) -> dict[str, Any]:
    """Convert a checkpoint directory; returns the weights as `gguf.quants.dequantize` gives them, by published name.

    edit: may change the metadata {key: value} and the tensors {GGUF name: (bytes [.., n], type)} before they are
    written. shards: files NAME-0000i-of-0000N.gguf beside `file`.
    """
    fields = json.loads((directory / "config.json").read_text())
    weights = {}
    for part in sorted(directory.glob("*.safetensors")):
        weights |= {name: tensor.float().numpy() for name, tensor in load_file(part).items()}
    tensors, dequantised = {"rope_freqs.weight": (rope_freqs(fields), F32)}, {}
    for seed, (name, weight) in enumerate(weights.items()):
        layer = int(name.split(".")[2]) if "layers" in name else 0
        if not mtp and layer >= fields["num_hidden_layers"]:
            continue
        kind = F32 if name.endswith(ALWAYS_F32) else quantise(name)
        stored = packed_bytes(weight + 1 if name.endswith("norm.weight") else weight, kind, seed)
        tensors[gguf_name(name)] = stored, kind
        values = gguf.quants.dequantize(stored, kind)
        dequantised[name] = values - 1 if name.endswith("norm.weight") else values
    metadata = metadata_of(fields, mtp)
    if tokenizer:
        metadata |= tokenizer_metadata(directory, fields)
    edit(metadata, tensors)
    write_file(file, metadata, tensors, shards)
    return dequantised


def rope_freqs(fields: Mapping[str, Any], over_all: bool = False) -> np.ndarray:
    """[head_dim / 2] divisors of the full layers' frequencies; `over_all` as converters of before MTP wrote them."""
    scaling, dim = fields["rope_scaling"], fields["head_dim"]
    full = fields["layer_types"].index("full_attention")
    rotated = dim if over_all else int(dim * fields["partial_rotary_factors"][full])
    divisors = np.ones(dim // 2, dtype=np.float32)
    for pair in range(rotated // 2):
        wave = 2 * math.pi * fields["rope_theta"][full] ** (2 * pair / rotated)
        original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wave > original / low:
            divisors[pair] = factor
        elif wave >= original / high:
            smooth = (original / wave - low) / (high - low)
            divisors[pair] = 1 / ((1 - smooth) / factor + smooth)
    return divisors


def metadata_of(fields: Mapping[str, Any], mtp: bool) -> dict[str, Any]:
    """llama.cpp's keys, without tokenizer."""
    backbone, nextn = fields["num_hidden_layers"], fields["num_nextn_predict_layers"]
    count = backbone + nextn if mtp else backbone
    types, other = fields["layer_types"][:count], fields["attention_other_setting"]
    sliding = [kind == "sliding_attention" for kind in types]

    def heads(name: str) -> list[int]:
        return [other[name] if slides else fields[name] for slides in sliding]

    keys = {
        "block_count": count,
        "context_length": fields["max_position_embeddings"],
        "embedding_length": fields["hidden_size"],
        "feed_forward_length": fields["intermediate_size"],
        "attention.head_count": heads("num_attention_heads"),
        "attention.head_count_kv": heads("num_attention_groups"),
        "attention.key_length": fields["head_dim"],
        "attention.value_length": fields["head_dim"],
        "attention.sliding_window": fields["sliding_window"],
        "attention.sliding_window_pattern": sliding,
        "attention.layer_norm_rms_epsilon": fields.get("rms_norm_eps", 1e-5),
        "rope.freq_base": fields["rope_theta"][sliding.index(False)],
        "rope.freq_base_swa": fields["rope_theta"][sliding.index(True)],
        "expert_count": fields["moe_num_experts"],
        "expert_used_count": fields["moe_top_k"],
        "expert_feed_forward_length": fields["moe_intermediate_size"],
        "expert_shared_feed_forward_length": fields["share_expert_dim"],
        "expert_weights_scale": fields["moe_router_scaling_factor"],
        "expert_weights_norm": fields["norm_expert_weight"],
        "expert_gating_func": 2,
        "leading_dense_block_count": int(fields["moe_layers_enum"].split(",")[0]),
        "swiglu_clamp_exp": [float(limit) for limit in fields["swiglu_limits"][:count]],
        "swiglu_clamp_shexp": [float(limit) for limit in fields["swiglu_limits_shared"][:count]],
    }
    if mtp and nextn:
        keys["nextn_predict_layers"] = nextn
    return {f"step35.{key}": value for key, value in keys.items()}


def tokenizer_metadata(directory: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's keys of a byte-level BPE tokenizer; empty where the checkpoint has none."""
    if not (directory / "tokenizer.json").is_file():
        return {}
    source = json.loads((directory / "tokenizer.json").read_text())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    tokens = [f"[PAD{i}]" for i in range(fields["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in source["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in source["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    template = directory / "chat_template.jinja"
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [int(kind) for kind in types],
        "merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in source["model"]["merges"]],
        "bos_token_id": tokens.index(_token(settings["bos_token"])),
        "eos_token_id": tokens.index(_token(settings["eos_token"])),
        "add_bos_token": False,
    }
    if settings.get("pad_token"):
        keys["padding_token_id"] = tokens.index(_token(settings["pad_token"]))
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return metadata | ({"tokenizer.chat_template": template.read_text()} if template.is_file() else {})


def _token(entry: str | Mapping[str, Any]) -> str:
    return entry if isinstance(entry, str) else entry["content"]


def write_file(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple], shards: int = 1) -> None:
    size = max((array.nbytes for array, _ in tensors.values()), default=0) + 1
    total = sum(array.nbytes for array, _ in tensors.values())
    options = {"split_max_size": max(size, total // shards + 1)} if shards > 1 else {}
    architecture = metadata.get("general.architecture", "step35")
    writer = GGUFWriter(file, architecture, **options)
    for key, value in metadata.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=None if kind is F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
