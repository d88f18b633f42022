"""GGUF's names for a Step-3.5 checkpoint's tensors: data only.

llama.cpp writes architecture "step35". Tensors keep their values and their order of bytes (q and k are not permuted),
with two exceptions: norms have 1 added, and `rope_freqs` replaces rope_scaling of the config.
"""

import re

ARCHITECTURE = "step35"
ROPE_FREQS = "rope_freqs.weight"

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# Inside `blk.{i}.`, which is `model.layers.{i}.`; MTP layers follow the backbone's.
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_gate.weight": "self_attn.g_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "moe.gate.weight",
    "exp_probs_b.bias": "moe.router_bias",
    "ffn_gate_exps.weight": "moe.gate_proj.weight",
    "ffn_up_exps.weight": "moe.up_proj.weight",
    "ffn_down_exps.weight": "moe.down_proj.weight",
    "ffn_gate_shexp.weight": "share_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "share_expert.up_proj.weight",
    "ffn_down_shexp.weight": "share_expert.down_proj.weight",
    "nextn.enorm.weight": "enorm.weight",
    "nextn.hnorm.weight": "hnorm.weight",
    "nextn.eh_proj.weight": "eh_proj.weight",
    "nextn.embed_tokens.weight": "embed_tokens.weight",
    "nextn.shared_head_norm.weight": "transformer.shared_head.norm.weight",
    "nextn.shared_head_head.weight": "transformer.shared_head.output.weight",
}

_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def published_name(name: str) -> str | None:
    """The published name of a GGUF tensor; None if there is none."""
    match = _LAYER_NAME.fullmatch(name)
    if not match:
        return OUTSIDE.get(name)
    inside = LAYER.get(match[2])
    return inside and f"model.layers.{match[1]}.{inside}"


def is_norm(name: str) -> bool:
    """Whether GGUF stores 1 + weight under this GGUF name."""
    return name.endswith("norm.weight")
