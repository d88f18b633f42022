"""Keys of a config.json that this plug-in does not read: which are harmless, and which would change the answers.

A stamp of a fine-tuning tool is served, with one warning. Three kinds of key stay errors, because serving them would
give garbage without a word: the settings of another architecture (`FOREIGN_FIELDS`), a second name of a field that says
something else than the field (`OTHER_NAMES`), and what is spelt almost like a field that enters the arithmetic. The
names were collected from transformers' Step-3.7 configuration, SGLang's configs of the Step family and the attributes
its `ModelConfig` acts on. No SGLang and no torch here.
"""

import difflib
import functools
import logging
from typing import Any

from sglang_step35.config_fields import FIXED_FIELDS, KNOWN_FIELDS, READ_FIELDS, ConfigError, Fields

logger = logging.getLogger(__name__)


def _settings(names: str, supported: Any, why: str) -> dict[str, tuple[Any, str]]:
    return dict.fromkeys(names.split(), (supported, why))


# (the value that changes nothing, why another one is refused), as in FIXED_FIELDS. In files only: transformers and
# SGLang write some of these names onto live config objects.
FOREIGN_FIELDS: dict[str, tuple[Any, str]] = {
    # A file saved through transformers' own class; without `rope_scaling` it would be served unscaled.
    **_settings(
        "rope_parameters per_layer_config mlp_layer_types mtp_layer_types mtp_mlp_layer_types "
        "num_sliding_attention_heads",
        None,
        "this is transformers' rewriting of the file; restore the published config.json",
    ),
    # SGLang reads the language model's fields from inside the first four.
    **_settings(
        "text_config language_config llm_config thinker_config vision_config audio_config",
        None,
        "multimodal checkpoints are another architecture",
    ),
    **_settings(
        "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim share_q_dim",
        None,
        "only grouped-query attention is implemented",
    ),
    **_settings(
        "sparse_attention_config index_topk index_n_heads index_head_dim index_block_size index_topk_blocks "
        "dual_chunk_attention_config attention_chunk_size no_rope_layers hybrid_layer_pattern is_hybrid_swa clip_qkv "
        "attn_logit_softcapping final_logit_softcapping",
        None,
        "this attention is not implemented",
    ),
    **_settings(
        "moe_layer_freq first_k_dense_replace decoder_sparse_step", None, "moe_layers_enum names the expert layers"
    ),
    **_settings("swiglu_alpha hc_mult num_loops loop_num", None, "this architecture is not implemented"),
    **_settings("n_group topk_group", 1, "group-limited routing is not implemented"),
    **_settings("n_shared_experts num_shared_experts", 1, "each MoE layer has one shared expert"),
    **_settings(
        "scale_emb embedding_multiplier residual_multiplier logits_scaling logit_scale",
        1.0,
        "nothing is scaled outside the layers",
    ),
    "use_bidirectional_attention": (False, "attention is causal"),
    "use_sliding_window": (True, "layer_types says where the window applies"),
    "hidden_activation": ("silu", "the feed-forward layers are SwiGLU with silu"),
}

# What the same quantity is called in transformers, SGLang and other mixtures of experts -> the field read here.
OTHER_NAMES = {
    "num_key_value_heads": "num_attention_groups",
    "query_pre_attn_scalar": "head_dim",
    "v_head_dim": "head_dim",
    "layer_norm_eps": "rms_norm_eps",
    "n_routed_experts": "moe_num_experts",
    "num_experts": "moe_num_experts",
    "num_local_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "share_expert_dims": "share_expert_dim",
    "shared_expert_intermediate_size": "share_expert_dim",
    "routed_scaling_factor": "moe_router_scaling_factor",
    "norm_topk_prob": "norm_expert_weight",
    "scoring_func": "moe_router_activation",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# Every name with a meaning; what is outside is a stamp or a misspelling.
MEANINGFUL = KNOWN_FIELDS | FOREIGN_FIELDS.keys() | OTHER_NAMES.keys()

# Misspelling one of these would silently drop a clamp, a scaling or a bias. Token ids enter no arithmetic, and their
# names resemble harmless ones (`unk_token_id`).
_NUMERIC = (READ_FIELDS | FIXED_FIELDS.keys()) - {"bos_token_id", "eos_token_id", "pad_token_id"}
# A plural, a typo or a lost prefix scores higher (tie_embeddings 0.85), another word lower (text_vocab_size 0.80,
# original_max_position_embeddings 0.84).
_MISSPELT = 0.84


def check_unknown(config: Fields) -> None:
    """Warn once of the keys nothing reads.

    Raises ConfigError for a setting of another architecture, for a second name that contradicts its field, and for a
    near-miss of a field that enters the arithmetic.
    """
    config.require_fixed(FOREIGN_FIELDS)
    for name, field in OTHER_NAMES.items():
        value = config.raw(name, None)
        if value is not None and value != config.raw(field, None):
            raise config.fail(name, f"{field} is {config.raw(field, None)!r}, and only that field is read; correct it")
    unknown = config.unknown(MEANINGFUL)
    for name in unknown:
        near = difflib.get_close_matches(name, _NUMERIC, n=1, cutoff=_MISSPELT)
        if near:
            raise ConfigError(f"config field {name} is unknown: did you mean {near[0]}? If not, remove it")
    if unknown:
        _warn(tuple(sorted(unknown)))


@functools.cache  # once per process and set of keys: SGLang reads a file several times
def _warn(names: tuple[str, ...]) -> None:
    shown = ", ".join(_hint(name) for name in names)
    logger.warning("config.json has fields that sglang-step35 does not know and ignores: %s", shown)


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, KNOWN_FIELDS, n=1, cutoff=_MISSPELT)
    return f"{name} (did you mean {near[0]}?)" if near else name
