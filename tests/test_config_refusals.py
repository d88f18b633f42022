"""What config.json may not say, and what the error names."""

from typing import Any

import pytest

from sglang_step35.config import parse_config
from sglang_step35.config_fields import FIXED_FIELDS, ConfigError
from tests.support.published_config import ABSENT, edited, published, with_entry

CASES: dict[str, tuple[dict[str, Any], str, str]] = {  # changes, the field named, what else the message must hold
    "short layer_types": ({"layer_types": published()["layer_types"][:45]}, "layer_types", "has 45 entries.*48"),
    "short rope_theta": ({"rope_theta": [1e4] * 47}, "rope_theta", "has 47 entries.*48"),
    "short rotary": ({"partial_rotary_factors": [1.0]}, "partial_rotary_factors", "has 1 entries.*48"),
    "short limits": ({"swiglu_limits": [0.0] * 45}, "swiglu_limits", "has 45 entries.*lower num_nextn"),
    "short shared limits": ({"swiglu_limits_shared": []}, "swiglu_limits_shared", "has 0 entries.*48"),
    "more layers than lists": ({"num_hidden_layers": 46}, "layer_types", "has 48 entries.*49"),
    "layer_types no list": ({"layer_types": "full_attention"}, "layer_types", "one entry per layer.*str"),
    "limits no list": ({"swiglu_limits": 7.0}, "swiglu_limits", "one entry per layer.*float"),
    "unknown layer type": (with_entry("layer_types", 5, "linear"), "layer_types", "'linear' at entry 5: expected"),
    "layer type no text": (with_entry("layer_types", 47, None), "layer_types", "None at entry 47"),
    "theta zero": (with_entry("rope_theta", 2, 0), "rope_theta", "above 0 at entry 2, got 0"),
    "theta negative scalar": ({"rope_theta": -1.0}, "rope_theta", "above 0"),
    "theta text": ({"rope_theta": "1e4"}, "rope_theta", "no finite number"),
    "theta missing": ({"rope_theta": ABSENT}, "rope_theta", "missing.*published"),
    "theta infinite": ({"rope_theta": float("inf")}, "rope_theta", "no finite number"),
    "theta null entry": (with_entry("rope_theta", 0, None), "rope_theta", "entry 0.*None"),
    "rotary above 1": (with_entry("partial_rotary_factors", 1, 1.5), "partial_rotary_factors", r"\(0, 1\] at entry 1"),
    "rotary zero": (with_entry("partial_rotary_factors", 1, 0.0), "partial_rotary_factors", r"\(0, 1\]"),
    "rotary odd": (with_entry("partial_rotary_factors", 4, 0.4), "partial_rotary_factors", "entry 4 rotates 51 of 128"),
    "rotary empty": (with_entry("partial_rotary_factors", 4, 0.001), "partial_rotary_factors", "rotates 0 of 128"),
    "limit negative": (with_entry("swiglu_limits", 43, -7), "swiglu_limits", "0 or more at entry 43, got -7"),
    "limit text": (with_entry("swiglu_limits", 43, "7"), "swiglu_limits", "entry 43, got '7'"),
    "shared limit negative": (with_entry("swiglu_limits_shared", 0, -1.0), "swiglu_limits_shared", "entry 0"),
    "shared limit true": (with_entry("swiglu_limits_shared", 0, True), "swiglu_limits_shared", "got True"),
    "yarn": ({"rope_scaling__rope_type": "yarn"}, "rope_scaling", "'yarn' is not implemented.*llama3"),
    "scaling without a type": ({"rope_scaling__rope_type": ABSENT}, "rope_scaling", "type None"),
    "scaling no object": ({"rope_scaling": "llama3"}, "rope_scaling", "expected an object.*factor"),
    "scaling unknown key": ({"rope_scaling__low_freq": 1.0}, "rope_scaling.low_freq", "did you mean low_freq_factor"),
    "scaling without factor": ({"rope_scaling__factor": ABSENT}, "rope_scaling.factor", "missing"),
    "scaling factor zero": ({"rope_scaling__factor": 0.0}, "rope_scaling.factor", "above 0"),
    "scaling factors crossed": ({"rope_scaling__low_freq_factor": 32.0}, "rope_scaling.low_freq_factor", "less than"),
    "scaling original float": (
        {"rope_scaling__original_max_position_embeddings": 8.5},
        "rope_scaling.original_max_position_embeddings",
        "whole number",
    ),
    "yarn_only_types missing": ({"yarn_only_types": ABSENT}, "yarn_only_types", "missing"),
    "yarn_only_types text": ({"yarn_only_types": "full_attention"}, "yarn_only_types", "expected a list"),
    "yarn_only_types unknown": ({"yarn_only_types": ["full"]}, "yarn_only_types", "expected a list"),
    "layers without RoPE": ({"use_rope_layers": [True, False]}, "use_rope_layers", "without RoPE"),
    "use_rope_layers no list": ({"use_rope_layers": True}, "use_rope_layers", "expected \\[\\]"),
    "heads not divisible": ({"num_attention_heads": 60}, "num_attention_heads", "60.*num_attention_groups, 8"),
    "other setting missing": ({"attention_other_setting": ABSENT}, "attention_other_setting", "sliding layers"),
    "other setting no object": ({"attention_other_setting": 96}, "attention_other_setting", "expected an object"),
    "other heads missing": (
        {"attention_other_setting__num_attention_heads": ABSENT},
        "attention_other_setting.num_attention_heads",
        "missing",
    ),
    "other groups missing": (
        {"attention_other_setting__num_attention_groups": ABSENT},
        "attention_other_setting.num_attention_groups",
        "missing",
    ),
    "other head_dim missing": (
        {"attention_other_setting__head_dim": ABSENT},
        "attention_other_setting.head_dim",
        "missing",
    ),
    "other heads not divisible": (
        {"attention_other_setting__num_attention_heads": 100},
        "attention_other_setting.num_attention_heads",
        "num_attention_groups, 8",
    ),
    "other padded heads": (
        {"attention_other_setting__true_head_dim": 96},
        "attention_other_setting.true_head_dim",
        "must equal head_dim",
    ),
    "other type": (
        {"attention_other_setting__attention_type": "full_attention"},
        "attention_other_setting.attention_type",
        "only 'sliding_attention'",
    ),
    "other unknown key": (
        {"attention_other_setting__num_heads": 96},
        "attention_other_setting.num_heads",
        "unknown: did you mean",
    ),
    "window zero": ({"sliding_window": 0}, "sliding_window", "at least 1"),
    "window negative": ({"sliding_window": -1}, "sliding_window", "-1.*at least 1"),
    "window missing": ({"sliding_window": None}, "sliding_window", "missing"),
    "top-k above experts": ({"moe_top_k": 289}, "moe_top_k", "289.*288 experts"),
    "moe_layers_enum text": ({"moe_layers_enum": "3-44"}, "moe_layers_enum", "3-44.*comma-separated"),
    "moe_layers_enum number": ({"moe_layers_enum": 3}, "moe_layers_enum", "comma-separated"),
    "moe_layers_enum floats": ({"moe_layers_enum": [3.5]}, "moe_layers_enum", "comma-separated"),
    "moe_layers_enum MTP layer": ({"moe_layers_enum": "3,45"}, "moe_layers_enum", "layer 45 is not.*0 to 44"),
    "moe_layers_enum negative": ({"moe_layers_enum": [-1]}, "moe_layers_enum", "layer -1"),
    "moe_layers_enum missing": ({"moe_layers_enum": ABSENT}, "moe_layers_enum", "missing"),
    "router softmax": ({"moe_router_activation": "softmax"}, "moe_router_activation", "softmax.*only 'sigmoid'"),
    "router missing": ({"moe_router_activation": ABSENT}, "moe_router_activation", "missing"),
    "scaling factor negative": ({"moe_router_scaling_factor": -3.0}, "moe_router_scaling_factor", "above 0"),
    "too many MTP layers": ({"num_nextn_predict_layers": 4}, "num_nextn_predict_layers", "4.*0 to 3"),
    "negative MTP layers": ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "at least 0"),
    "eps zero": ({"rms_norm_eps": 0}, "rms_norm_eps", "above 0"),
    "eos text": ({"eos_token_id": ["</s>"]}, "eos_token_id", "list of token ids"),
    "eos negative": ({"eos_token_id": -1}, "eos_token_id", "0 or more"),
    "bos true": ({"bos_token_id": True}, "bos_token_id", "whole number, got bool"),
    "pad negative": ({"pad_token_id": -1}, "pad_token_id", "at least 0"),
    "unknown key": ({"sliding_windw": 512}, "sliding_windw", "unknown: did you mean sliding_window"),
    "foreign key": ({"kv_lora_rank": 512}, "kv_lora_rank", "512: remove it; only grouped-query"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal(case):
    changes, field, rest = CASES[case]
    with pytest.raises(ConfigError, match=f"^config field {field.replace('.', '[.]')} .*{rest}"):
        parse_config(edited(**changes))


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "num_attention_heads",
    "num_attention_groups",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "moe_num_experts",
    "moe_top_k",
    "moe_intermediate_size",
    "share_expert_dim",
    "attention_other_setting__num_attention_heads",
    "attention_other_setting__num_attention_groups",
    "attention_other_setting__head_dim",
)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "value, expected",
    [
        (0, "at least 1"),
        (-8, "at least 1"),
        (True, "got bool"),
        ("8", "got str"),
        (8.0, "got float"),
        (ABSENT, "missing"),
    ],
)
def test_sizes_are_positive_whole_numbers(name, value, expected):
    with pytest.raises(ConfigError, match=f"^config field {name.replace('__', '[.]')} is .*{expected}"):
        parse_config(edited(**{name: value}))


FLAGS = ("use_head_wise_attn_gate", "use_moe", "norm_expert_weight", "use_moe_router_bias", "need_fp32_gate")


@pytest.mark.parametrize("name", (*FLAGS, "tie_word_embeddings"))
@pytest.mark.parametrize("value", [1, "true", []])
def test_flags_are_true_or_false(name, value):
    with pytest.raises(ConfigError, match=f"^config field {name} is .*expected true or false"):
        parse_config(edited(**{name: value}))


@pytest.mark.parametrize("name", FIXED_FIELDS)
def test_fixed_fields_refuse_other_values(name):
    supported, why = FIXED_FIELDS[name]
    for other in (not supported, "other", 1 if supported is True else 0):
        with pytest.raises(ConfigError) as refusal:
            parse_config(edited(**{name: other}))
        assert f"config field {name} is {other!r}" in str(refusal.value) and why in str(refusal.value)
    assert parse_config(edited(**{name: supported})) == parse_config(published())
