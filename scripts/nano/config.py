"""The shape of the nano model and the budget of its training, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

# Ids at the start of the vocabulary. The first two are the real model's; see tokenizer.py for the rest.
BOS, EOS, END_OF_TEXT, IM_START, IM_END = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Shape:
    """The architecture. Letters used below: D hidden, V vocab, H query heads, G KV groups, d head_dim,
    E experts, I width of an expert."""

    vocab: int = 2048
    hidden: int = 160
    layers: int = 8
    mtp_layers: int = 3
    full_layers: tuple[int, ...] = (0, 4)
    head_dim: int = 32
    heads_full: int = 4
    heads_sliding: int = 6
    kv_groups: int = 2
    window: int = 64  # keys per query on sliding layers, the query's own included
    dense_layers: tuple[int, ...] = (0, 1)
    intermediate: int = 320
    experts: int = 8
    top_k: int = 2
    expert_width: int = 32
    shared_width: int = 64
    router_scale: float = 3.0
    # SwiGLU clamps by layer, as in the real checkpoint only on the last layers; absent means none.
    limits_routed: tuple[tuple[int, float], ...] = ((6, 7.0), (7, 7.0))
    limits_shared: tuple[tuple[int, float], ...] = ((7, 16.0),)
    theta_full: float = 5e6
    theta_sliding: float = 1e4
    rotary_full: float = 0.5
    rotary_sliding: float = 1.0
    rope_factor: float = 2.0
    rope_low: float = 1.0
    rope_high: float = 32.0
    rope_original: int = 131072
    max_positions: int = 262144
    eps: float = 1e-5

    @property
    def total_layers(self) -> int:
        return self.layers + self.mtp_layers

    def is_full(self, layer: int) -> bool:
        return layer in self.full_layers

    def is_moe(self, layer: int) -> bool:
        return layer < self.layers and layer not in self.dense_layers


@dataclass(frozen=True)
class Stage:
    """A run of optimiser steps on one kind of batch: `rows` sequences of `length` tokens.

    `kind` names what is learnt: "text" (the backbone, next tokens of the corpus), "joint" (the same, and the MTP
    layers beside it, so that the hidden state learns to hold what they need), "unloop" (the backbone, corpus plus
    unlikelihood of its own repetitions) or "distill" (the MTP layers, the frozen backbone's distribution).
    `lr` multiplies the base rates and changes linearly from its first to its second value."""

    name: str
    kind: str
    steps: int
    rows: int
    length: int
    lr: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """The whole training. Budgets are steps, never wall time, so that a run can be repeated.

    Warm-up, a stable rate, linear decay to 0: a longer run goes on from the end of "stable" with more steps."""

    seed: int = 20260
    stages: tuple[Stage, ...] = (
        Stage("stable", "text", 3000, 4, 512, (1.0, 1.0)),
        Stage("decay", "text", 5000, 4, 512, (1.0, 0.35)),
        Stage("joint", "joint", 1800, 8, 512, (0.35, 0.05)),
        Stage("unloop", "unloop", 900, 8, 512, (0.1, 0.0)),
        Stage("distill", "distill", 12000, 8, 256, (1.0, 0.0)),
    )
    muon_lr: float = 0.012
    adam_lr: float = 0.015
    warmup: int = 50  # steps, at the start of "stable" and of "distill"
    bias_rate: float = 1e-3  # step of the router bias towards equal expert load
    chat_share: float = 0.04
    chat_examples: int = 3000
    own_prompt: int = 48  # tokens of corpus at the start of every text the backbone writes itself
    joint_weight: float = 0.15  # of each MTP layer's loss beside the backbone's, in "joint"
    loop_rows: int = 48  # greedy texts of "unloop", written anew every `loop_refresh` steps
    loop_refresh: int = 25
    loop_share: float = 0.25  # of the rows of a batch
    loop_ngram: int = 8  # a token that completes a repeated n-gram of this size is made less likely
    loop_weight: float = 0.3  # of that unlikelihood beside the loss of the corpus
    own_temperatures: tuple[float, ...] = (0.0, 0.5, 0.8, 1.0)  # texts of "distill", `own_rows` of each
    own_rows: int = 1536
    true_rows: int = 1536  # and this many crops of the corpus
    heldout_percent: int = 5
    prompts: int = 200


QUICK = Plan(
    stages=(
        Stage("stable", "text", 50, 8, 256, (1.0, 1.0)),
        Stage("decay", "text", 30, 8, 256, (1.0, 0.0)),
        Stage("joint", "joint", 3, 8, 128, (0.1, 0.1)),
        Stage("unloop", "unloop", 3, 8, 128, (0.1, 0.0)),
        Stage("distill", "distill", 5, 8, 128, (1.0, 0.0)),
    ),
    loop_rows=16,
    own_rows=16,
    true_rows=16,
    warmup=10,
)


def hf_config(shape: Shape) -> dict:
    """config.json with the field names of the real Step-3.5-Flash checkpoint; per-layer lists have an entry
    for each MTP layer too."""
    n = range(shape.total_layers)
    per_layer = lambda full, sliding: [full if shape.is_full(i) else sliding for i in n]
    moe = [i for i in n if shape.is_moe(i)]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_nextn_predict_layers": shape.mtp_layers,
        "vocab_size": shape.vocab,
        "max_seq_len": shape.max_positions,
        "max_position_embeddings": shape.max_positions,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": shape.eps,
        "zero_centered": True,
        "bos_token_id": BOS,
        "eos_token_id": [EOS, END_OF_TEXT, IM_END],
        "tie_word_embeddings": False,
        "att_impl_type": "GQA",
        "num_attention_heads": shape.heads_full,
        "num_attention_groups": shape.kv_groups,
        "head_dim": shape.head_dim,
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "layer_types": per_layer("full_attention", "sliding_attention"),
        "sliding_window": shape.window,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": shape.heads_sliding,
            "num_attention_groups": shape.kv_groups,
            "head_dim": shape.head_dim,
            "true_head_dim": shape.head_dim,
        },
        "use_rope_layers": [],
        "rope_theta": per_layer(shape.theta_full, shape.theta_sliding),
        "partial_rotary_factors": per_layer(shape.rotary_full, shape.rotary_sliding),
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": shape.rope_factor,
            "low_freq_factor": shape.rope_low,
            "high_freq_factor": shape.rope_high,
            "original_max_position_embeddings": shape.rope_original,
        },
        "yarn_only_types": ["full_attention"],
        "use_moe": True,
        "moe_layers_enum": ",".join(map(str, moe)),
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "moe_num_experts": shape.experts,
        "moe_top_k": shape.top_k,
        "moe_intermediate_size": shape.expert_width,
        "share_expert_dim": shape.shared_width,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": shape.router_scale,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "swiglu_limits": [dict(shape.limits_routed).get(i, 0.0) for i in n],
        "swiglu_limits_shared": [dict(shape.limits_shared).get(i, 0.0) for i in n],
    }
