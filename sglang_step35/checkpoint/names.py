"""Checkpoint names, the parameters they go to, and the shapes config.json asks for: data only.

Letters: H hidden size, V vocabulary, E experts.
"""

import re
from dataclasses import dataclass

from sglang_step35.config import LayerSpec, ModelSpec


@dataclass(frozen=True)
class Rename:
    """A checkpoint module and the parameter it fills.

    source: module name inside a layer. target: what stands before the tensor's last name
    ("weight", "weight_scale_inv", ...) in our parameter, inside a layer.
    shard: the part of a fused parameter, as SGLang's weight loaders call it.
    """

    source: str
    target: str
    shard: str | int | None = None

    @property
    def routed(self) -> bool:
        """Whether the tensor is one of the routed experts, stacked or single."""
        return self.shard in ("w1", "w2", "w3")


def _swiglu(source: str, target: str) -> tuple[Rename, ...]:
    return (
        Rename(f"{source}.gate_proj", f"{target}.gate_up_proj.", 0),
        Rename(f"{source}.up_proj", f"{target}.gate_up_proj.", 1),
        Rename(f"{source}.down_proj", f"{target}.down_proj."),
    )


LAYER: tuple[Rename, ...] = (
    Rename("input_layernorm", "input_layernorm."),
    Rename("post_attention_layernorm", "post_attention_layernorm."),
    Rename("self_attn.q_proj", "self_attn.qkv_proj.", "q"),
    Rename("self_attn.k_proj", "self_attn.qkv_proj.", "k"),
    Rename("self_attn.v_proj", "self_attn.qkv_proj.", "v"),
    Rename("self_attn.o_proj", "self_attn.o_proj."),
    Rename("self_attn.g_proj", "self_attn.g_proj."),
    Rename("self_attn.q_norm", "self_attn.qk_norm_rope.q_norm."),
    Rename("self_attn.k_norm", "self_attn.qk_norm_rope.k_norm."),
    *_swiglu("mlp", "mlp"),
    *_swiglu("share_expert", "mlp.share_expert"),
    Rename("moe.gate", "mlp.router.gate."),
    Rename("moe", "mlp.router."),  # moe.router_bias
    Rename("moe.gate_proj", "mlp.experts.w13_", "w1"),
    Rename("moe.up_proj", "mlp.experts.w13_", "w3"),
    Rename("moe.down_proj", "mlp.experts.w2_", "w2"),
)

MTP_LAYER: tuple[Rename, ...] = (
    Rename("enorm", "enorm."),
    Rename("hnorm", "hnorm."),
    Rename("eh_proj", "eh_proj."),
    Rename("shared_head.norm", "shared_head_norm."),
    *(Rename(entry.source, f"block.{entry.target}", entry.shard) for entry in LAYER),
)

# An MTP layer's own copies of the backbone's embedding and head.
COPIES = {"embed_tokens.weight": "embedding", "shared_head.output.weight": "head"}

# Outside the layers.
MODEL: tuple[Rename, ...] = (
    Rename("model.embed_tokens", "model.embed_tokens."),
    Rename("model.norm", "model.norm."),
    Rename("lm_head", "lm_head."),
)

# Last names that differ between checkpoint and parameter.
LEAVES = {"router_bias": "bias"}

# Parameters of layers whose weights stay packed, as SGLang's GGUF layers name them; the checkpoint says "weight".
PACKED, PACKED_TYPE = "qweight", "qweight_type"

# Parameters that SGLang derives after loading.
DERIVED = ("blockscale_swizzled", "g_idx_sort_indices")

# Parameters that SGLang registers whether or not a checkpoint has them: the order of the columns under act-order.
OPTIONAL = ("g_idx", "weight_g_idx")

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(?:transformer\.)?(.+)")
_JOINED_LEAF = re.compile(r"(.+\w)(_blocks|_scales)")  # MXFP4 of the Open Compute Project
_EXPERT_NAME = re.compile(r"moe\.experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TensorName:
    """A checkpoint tensor's name, taken apart.

    layer: N of `model.layers.N.`, None outside. module, leaf: the rest, cut at its last dot.
    expert: for checkpoints that keep each routed expert by itself, else None.
    """

    layer: int | None
    module: str
    leaf: str
    expert: int | None = None


def part_name(module: str, leaf: str) -> str:
    """MXFP4's `gate_proj_blocks` has an underscore where others have a dot."""
    return f"{module}{leaf}" if leaf.startswith("_") else f"{module}.{leaf}"


def parse_name(name: str) -> TensorName:
    """`model.layers.{N}.[transformer.]{module}.{leaf}`, or `{module}.{leaf}` outside the layers."""
    layer, expert = None, None
    if match := _LAYER_NAME.fullmatch(name):
        layer, name = int(match[1]), match[2]
        if match := _EXPERT_NAME.fullmatch(name):
            expert, name = int(match[1]), f"moe.{match[2]}"
    if match := _JOINED_LEAF.fullmatch(name):
        return TensorName(layer, match[1], match[2], expert)
    module, _, leaf = name.rpartition(".")
    return TensorName(layer, module, leaf, expert)


def weight_shapes(spec: ModelSpec, layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's unquantised tensors; routed experts stacked [E, out, in]."""
    hidden, attention = spec.hidden_size, layer.attention
    heads, dim = attention.num_heads, attention.head_dim
    keys = attention.num_kv_heads * dim
    shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * dim, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, heads * dim),
        "self_attn.g_proj.weight": (heads, hidden),
        "self_attn.q_norm.weight": (dim,),
        "self_attn.k_norm.weight": (dim,),
        **dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (hidden,)),
        "eh_proj.weight": (hidden, 2 * hidden),
        **dict.fromkeys(COPIES, (spec.vocab_size, hidden)),
    }
    if layer.moe is None:
        return shapes | _swiglu_shapes("mlp", layer.dense_size or 0, hidden)
    experts = layer.moe.num_experts
    routed = _swiglu_shapes("moe", layer.moe.expert_size, hidden)
    return (
        shapes
        | {"moe.gate.weight": (experts, hidden), "moe.router_bias": (experts,)}
        | {name: (experts, *shape) for name, shape in routed.items()}
        | _swiglu_shapes("share_expert", layer.moe.shared_size, hidden)
    )


def model_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes outside the layers."""
    table = (spec.vocab_size, spec.hidden_size)
    return {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (spec.hidden_size,),
        "lm_head.weight": table,
    }


def _swiglu_shapes(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
