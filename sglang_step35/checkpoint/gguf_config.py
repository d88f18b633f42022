"""A config.json in the published field layout from a GGUF file's metadata.

What llama.cpp does not write down is the same in every Step-3.5 checkpoint: half of a full layer's channels are
rotated, the router scores in float32 with a selection bias, every head has its gate, norms are zero-centred.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_step35.checkpoint.base import DamagedFile
from sglang_step35.checkpoint.gguf import GGUFFiles
from sglang_step35.checkpoint.gguf_file import GGUFFile
from sglang_step35.checkpoint.gguf_names import ARCHITECTURE, ROPE_FREQS
from sglang_step35.checkpoint.gguf_rope import UnknownScaling, rope_scaling
from sglang_step35.config import FULL, SLIDING
from sglang_step35.names import BACKBONE, MODEL_TYPE

SIGMOID = 2  # `expert_gating_func`
FULL_ROTATED = 0.5  # share of head_dim
END_OF_TURN = "<|im_end|>"  # ends an answer too, and has no key of its own

# config.json -> metadata under `step35.`
_SCALARS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "max_seq_len": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "moe_num_experts": "expert_count",
    "moe_top_k": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "share_expert_dim": "expert_shared_feed_forward_length",
    "moe_router_scaling_factor": "expert_weights_scale",
}
_FIXED = {
    "architectures": [BACKBONE],
    "model_type": MODEL_TYPE,
    "torch_dtype": "bfloat16",
    "zero_centered": True,
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "att_impl_type": "GQA",
    "sink": False,
    "use_rope_layers": [],
    "use_moe": True,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
}


def config_fields(path: str | Path) -> dict[str, Any]:
    """The fields of config.json. Raises DamagedFile naming the file and the key."""
    files = GGUFFiles(path)
    file = files.metadata()
    meta = _Metadata(file)
    layers, nextn = meta.need("block_count"), meta.get("nextn_predict_layers", 0)
    backbone = layers - nextn
    types = [SLIDING if sliding else FULL for sliding in meta.per_layer("attention.sliding_window_pattern", layers)]
    fields = {name: meta.need(key) for name, key in _SCALARS.items()}
    return {
        **_FIXED,
        **fields,
        **_heads(meta, types),
        **_rope(files, meta, types, fields["head_dim"]),
        **_experts(meta, layers, backbone),
        **token_fields(file),
        "num_hidden_layers": backbone,
        "num_nextn_predict_layers": nextn,
        "layer_types": types,
        "vocab_size": _vocabulary(files, file),
        "tie_word_embeddings": files.dtype("lm_head.weight") is None,
    }


class _Metadata:
    """Keys under `step35.`, with errors that name them."""

    def __init__(self, file: GGUFFile):
        self.file = file

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(f"{ARCHITECTURE}.{key}", default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise self.fail(key, "is missing")
        return value

    def per_layer(self, key: str, count: int, default: Any = None) -> list:
        """A list with an entry a layer; one value stands for all."""
        value = self.need(key) if default is None else self.get(key, default)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count:
            raise self.fail(key, f"has {len(values)} entries for {count} layers")
        return values

    def fail(self, key: str, why: str) -> DamagedFile:
        return DamagedFile(
            f"{self.file.path}: the metadata {ARCHITECTURE}.{key} {why}; convert the checkpoint with a newer "
            f"llama.cpp, or put the published config.json beside the file"
        )


def _heads(meta: _Metadata, types: Sequence[str]) -> dict[str, Any]:
    """Query and key/value heads of either layer type."""
    head_dim = meta.need("attention.key_length")
    if meta.get("attention.value_length", head_dim) != head_dim:
        raise meta.fail("attention.value_length", f"is not key_length, {head_dim}")
    shapes: dict[str, tuple[int, int]] = {}
    heads, groups = (meta.per_layer(f"attention.{key}", len(types)) for key in ("head_count", "head_count_kv"))
    for kind, shape in zip(types, zip(heads, groups, strict=True), strict=True):
        if shapes.setdefault(kind, shape) != shape:
            raise meta.fail("attention.head_count", f"differs between layers of type {kind}")
    if FULL not in shapes:
        raise meta.fail("attention.sliding_window_pattern", "has no full-attention layer")
    sliding = shapes.get(SLIDING, shapes[FULL])
    return {
        "num_attention_heads": shapes[FULL][0],
        "num_attention_groups": shapes[FULL][1],
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": sliding[0],
            "num_attention_groups": sliding[1],
            "head_dim": head_dim,
            "true_head_dim": head_dim,
        },
    }


def _rope(files: GGUFFiles, meta: _Metadata, types: Sequence[str], head_dim: int) -> dict[str, Any]:
    """Bases, rotated shares, and the scaling that `rope_freqs.weight` has baked in."""
    full, sliding = meta.need("rope.freq_base"), meta.get("rope.freq_base_swa", meta.need("rope.freq_base"))
    divisors = files.raw(ROPE_FREQS)
    scaling = None
    if divisors is not None:
        try:
            scaling = rope_scaling(divisors.dequantize().tolist(), full, head_dim, int(head_dim * FULL_ROTATED))
        except UnknownScaling as error:
            raise DamagedFile(
                f"{files}: the tensor {ROPE_FREQS} cannot be read: {error}; put the published config.json beside it"
            ) from error
    return {
        "rope_theta": [full if kind == FULL else sliding for kind in types],
        "partial_rotary_factors": [FULL_ROTATED if kind == FULL else 1.0 for kind in types],
        "rope_scaling": scaling,
        "yarn_only_types": [FULL] if scaling else [],
    }


def _experts(meta: _Metadata, layers: int, backbone: int) -> dict[str, Any]:
    """Which layers have experts, how they are chosen, and where SwiGLU is clamped."""
    if meta.get("expert_gating_func", SIGMOID) != SIGMOID:
        raise meta.fail("expert_gating_func", f"is {meta.get('expert_gating_func')}, not {SIGMOID} (sigmoid)")
    return {
        "moe_layers_enum": ",".join(str(i) for i in range(meta.need("leading_dense_block_count"), backbone)),
        "norm_expert_weight": meta.get("expert_weights_norm", True),
        "swiglu_limits": meta.per_layer("swiglu_clamp_exp", layers, 0.0),
        "swiglu_limits_shared": meta.per_layer("swiglu_clamp_shexp", layers, 0.0),
    }


def token_fields(file: GGUFFile) -> dict[str, Any]:
    """Begin and end of a text. The published end tokens are the end of a text, the padding and the end of a turn."""
    tokens = file.get("tokenizer.ggml.tokens", [])
    ends = [file.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "padding")]
    if END_OF_TURN in tokens:
        ends.append(tokens.index(END_OF_TURN))
    return {
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({end for end in ends if end is not None}),
    }


def _vocabulary(files: GGUFFiles, file: GGUFFile) -> int:
    """No key says it: the tokens are counted, or the rows of the embedding."""
    tokens = file.get("tokenizer.ggml.tokens")
    if tokens:
        return len(tokens)
    table = files.raw("token_embd.weight")
    if table is None:
        raise DamagedFile(f"{files} has neither tokens nor the tensor token_embd.weight: download or copy it again")
    return table.shape[0]
