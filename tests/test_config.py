"""config.py and hf_config.py: the published file, every refusal's message, and the transformers/SGLang side."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from sglang_step35.config import MAX_MTP_LAYERS, AttentionSpec, RopeSpec, parse_config
from sglang_step35.config_fields import FIXED_FIELDS, KNOWN_FIELDS, READ_FIELDS, ConfigError, FrozenFields
from sglang_step35.hf_config import Step35HFConfig, register_hf_config, register_with_sglang

PUBLISHED = Path(__file__).parent.parent / "configs" / "step-3.5-flash.config.json"
ABSENT = object()
PER_LAYER = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")


def published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


def edited(**changes: Any) -> dict[str, Any]:
    """The published fields with some replaced, or left out where ABSENT; `a__b` is field b of the object a."""
    fields = published()
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        target, key = (fields[outer], inner) if inner else (fields, outer)
        if value is ABSENT:
            del target[key]
        else:
            target[key] = value
    return fields


def with_entry(name: str, index: int, value: Any) -> dict[str, Any]:
    """The change that replaces one entry of a per-layer list."""
    entries = published()[name]
    entries[index] = value
    return {name: entries}


# --- The published file ---------------------------------------------------------------------------------------------


def test_published_sizes():
    spec = parse_config(published())
    assert (spec.vocab_size, spec.hidden_size, spec.max_position) == (128896, 4096, 262144)
    assert spec.rms_norm_eps == 1e-5  # not in the file
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (0, (1, 2, 128007), None)
    assert spec.tie_word_embeddings is False
    assert (spec.num_layers, len(spec.mtp_layers), spec.window) == (45, 3, 512)
    assert [layer.index for layer in (*spec.layers, *spec.mtp_layers)] == list(range(48))


def test_published_attention():
    spec = parse_config(published())
    assert spec.full_layer_ids == tuple(range(0, 45, 4))
    assert set(spec.sliding_layer_ids) == set(range(45)) - set(spec.full_layer_ids)
    scaling = {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
        "original_max_position_embeddings": 131072,
    }
    full = AttentionSpec(64, 8, 128, None, RopeSpec(5e6, 0.5, FrozenFields(scaling), 262144), True)
    sliding = AttentionSpec(96, 8, 128, 512, RopeSpec(1e4, 1.0, None, 262144), True)
    assert {spec.layers[i].attention for i in spec.full_layer_ids} == {full}
    assert {spec.layers[i].attention for i in spec.sliding_layer_ids} == {sliding}
    assert {layer.attention for layer in spec.mtp_layers} == {sliding}


def test_published_window_counts_the_own_key():
    spec = parse_config(published())
    assert spec.layers[1].attention.earlier_keys == 511
    assert spec.layers[0].attention.earlier_keys == -1
    assert (spec.layers[0].attention.rotary_dim, spec.layers[1].attention.rotary_dim) == (64, 128)


def test_published_feed_forward():
    spec = parse_config(published())
    assert [layer.index for layer in spec.layers if layer.moe] == list(range(3, 45))
    assert {layer.dense_size for layer in spec.layers[:3]} == {11264}
    assert {layer.dense_size for layer in spec.layers[3:]} == {None}
    assert {(layer.moe, layer.dense_size) for layer in spec.mtp_layers} == {(None, 11264)}
    moe = spec.layers[3].moe
    assert (moe.num_experts, moe.top_k, moe.expert_size, moe.shared_size) == (288, 8, 1280, 1280)
    assert (moe.scaling_factor, moe.renormalize, moe.router_bias, moe.fp32_router) == (3.0, True, True, True)
    assert {layer.index: layer.moe.limit for layer in spec.layers[3:] if layer.moe.limit} == {43: 7.0, 44: 7.0}
    layers = (*spec.layers, *spec.mtp_layers)
    assert {layer.index: layer.limit_shared for layer in layers if layer.limit_shared is not None} == {44: 16.0}


def test_parsing_leaves_the_input_alone():
    fields = published()
    parse_config(fields)
    assert fields == published()


def test_every_listed_field_is_read():
    """A name in READ_FIELDS that nothing reads would be accepted and ignored."""

    class Recorder(dict):
        def get(self, key, default=None):
            seen.add(key)
            return super().get(key, default)

    seen: set[str] = set()
    parse_config(Recorder(published()))
    assert READ_FIELDS <= seen


# --- Accepted variants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nextn", range(MAX_MTP_LAYERS + 1))
def test_lowered_mtp_count_keeps_the_uncut_lists(nextn):
    spec = parse_config(edited(num_nextn_predict_layers=nextn))
    assert [layer.index for layer in spec.mtp_layers] == list(range(45, 45 + nextn))
    assert spec.layers == parse_config(published()).layers


def test_lists_of_exactly_the_backbone_without_mtp():
    cut = {name: published()[name][:45] for name in PER_LAYER}
    assert parse_config(edited(num_nextn_predict_layers=0, **cut)) == parse_config(edited(num_nextn_predict_layers=0))
    assert not parse_config(edited(num_nextn_predict_layers=ABSENT, **cut)).mtp_layers


def test_each_layer_has_its_own_list_entries():
    changes = with_entry("rope_theta", 46, 77.0) | with_entry("swiglu_limits_shared", 47, 5)
    changes |= with_entry("partial_rotary_factors", 45, 0.25) | with_entry("layer_types", 46, "full_attention")
    first, second, third = parse_config(edited(**changes)).mtp_layers
    assert (second.attention.rope.theta, third.limit_shared) == (77.0, 5.0)
    assert (first.attention.rope.partial_factor, first.attention.rope.theta) == (0.25, 1e4)
    assert (second.attention.window, second.attention.num_heads) == (None, 64)
    assert second.attention.rope.scaling is not None  # llama3 goes by layer type, also behind the backbone


def test_scalars_stand_for_all_layers():
    spec = parse_config(edited(rope_theta=5e5, partial_rotary_factors=0.5))
    assert {layer.attention.rope.theta for layer in (*spec.layers, *spec.mtp_layers)} == {5e5}
    assert {layer.attention.rotary_dim for layer in spec.layers} == {64}
    assert {x.attention.rotary_dim for x in parse_config(edited(partial_rotary_factors=ABSENT)).layers} == {128}


@pytest.mark.parametrize("limits", [ABSENT, None, [0.0] * 48, [None] * 48, [0] * 48])
def test_no_clamps(limits):
    spec = parse_config(edited(swiglu_limits=limits, swiglu_limits_shared=limits))
    assert {layer.limit_shared for layer in (*spec.layers, *spec.mtp_layers)} == {None}
    assert {layer.moe.limit for layer in spec.layers if layer.moe} == {None}


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama3_under_either_key(key):
    scaling = published()["rope_scaling"]
    scaling[key] = scaling.pop("rope_type")
    assert parse_config(edited(rope_scaling=scaling)) == parse_config(published())


def test_yarn_only_types_decides_where_scaling_applies():
    spec = parse_config(edited(yarn_only_types=["sliding_attention"]))
    assert spec.layers[0].attention.rope.scaling is None
    assert spec.layers[1].attention.rope.scaling["factor"] == 2.0
    unscaled = parse_config(edited(rope_scaling=None, yarn_only_types=ABSENT))
    assert {layer.attention.rope.scaling for layer in unscaled.layers} == {None}


@pytest.mark.parametrize("enum", ["3, 4,5,", [3, 4, 5], (5, 4, 3, 3)])
def test_moe_layers_enum_forms(enum):
    spec = parse_config(edited(moe_layers_enum=enum))
    assert [layer.index for layer in spec.layers if layer.moe] == [3, 4, 5]


@pytest.mark.parametrize("changes", [{"use_moe": False}, {"moe_layers_enum": ""}])
def test_dense_model_needs_no_expert_fields(changes):
    experts = {name: ABSENT for name in published() if name.startswith("moe_") and name != "moe_layers_enum"}
    spec = parse_config(edited(**experts, **changes))
    assert {layer.dense_size for layer in spec.layers} == {11264}


def test_without_sliding_layers_their_fields_may_be_absent():
    types = ["full_attention"] * 48
    spec = parse_config(edited(layer_types=types, sliding_window=ABSENT, attention_other_setting=ABSENT))
    assert (spec.window, spec.sliding_layer_ids) == (None, ())


def test_fields_of_any_transformers_config_are_accepted():
    generic = {"quantization_config": {"quant_method": "fp8"}, "pad_token_id": 3, "_name_or_path": "x"}
    assert parse_config(edited(**generic)).pad_token_id == 3
    assert set(PretrainedConfig().to_dict()) <= KNOWN_FIELDS | {"_name_or_path"}


def test_single_end_token():
    assert parse_config(edited(eos_token_id=7)).eos_token_ids == (7,)
    assert parse_config(edited(eos_token_id=ABSENT)).eos_token_ids == ()


# --- Refusals: (changes, the field named, what else the message must hold) ------------------------------------------

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
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
    "foreign key": ({"kv_lora_rank": 512}, "kv_lora_rank", "unknown: remove it"),
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


# --- Frozen values --------------------------------------------------------------------------------------------------


def test_specs_are_frozen_hashable_and_picklable():
    spec = parse_config(published())
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(spec) == hash(parse_config(published()))
    for part, name in ((spec, "layers"), (spec.layers[0], "moe"), (spec.layers[0].attention.rope, "theta")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


def test_frozen_fields_is_a_read_only_mapping():
    fields = FrozenFields({"b": 1, "a": 2})
    assert isinstance(fields, Mapping) and dict(fields) == {"a": 2, "b": 1} == fields
    assert hash(fields) == hash(FrozenFields({"a": 2, "b": 1})) and len(fields) == 2
    assert fields.get("c") is None and "c" not in fields
    with pytest.raises(AttributeError):
        fields.a = 3
    with pytest.raises(TypeError):
        fields["a"] = 3


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path) -> Path:
    """A checkpoint directory with the published config.json only."""
    (tmp_path / "config.json").write_text(PUBLISHED.read_text())
    return tmp_path


@pytest.fixture
def stock_auto_config(monkeypatch):
    """AutoConfig as transformers ships it, whatever other tests registered."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    return AutoConfig


@pytest.fixture
def auto_config(stock_auto_config):
    """AutoConfig with our class."""
    register_hf_config()
    register_hf_config()
    return stock_auto_config


def test_hf_config_keeps_every_field():
    config, fields = Step35HFConfig(**published()), published()
    fields.pop("torch_dtype")  # transformers' generic field: becomes `dtype`
    assert {name: getattr(config, name) for name in fields} == fields
    assert str(config.dtype) == "torch.bfloat16"
    assert config.to_dict().items() >= fields.items()
    assert len(config.layer_types) == len(config.rope_theta) == 48


def test_hf_config_answers_what_sglang_asks():
    config = Step35HFConfig(**published())
    assert hasattr(config, "num_attention_heads") and config.num_attention_heads == 64
    assert config.num_key_value_heads == 8
    assert (config.swa_num_key_value_heads, config.swa_head_dim) == (8, 128)
    assert config.num_attention_heads_per_layer[:5] == [64, 96, 96, 96, 64]
    assert config.pad_token_id is None and config.get_text_config() is config
    assert not hasattr(config, "no_such_field") and getattr(config, "no_such_field", 5) == 5


def test_hf_config_without_sliding_layers():
    config = Step35HFConfig(**edited(layer_types=["full_attention"] * 48, attention_other_setting=ABSENT))
    assert (config.swa_num_key_value_heads, config.swa_head_dim) == (8, 128)
    assert not hasattr(config, "attention_other_setting")


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_hf_config_copies(duplicate):
    config = Step35HFConfig(**published())
    twin = duplicate(config)
    assert twin == config and twin is not config and twin.spec() == parse_config(published())


def test_hf_config_saves_and_loads(auto_config, directory, tmp_path):
    config = auto_config.from_pretrained(directory)
    config.save_pretrained(tmp_path / "again")
    again = auto_config.from_pretrained(tmp_path / "again")
    assert type(again) is Step35HFConfig and again.spec() == parse_config(published())
    assert again.rope_scaling == published()["rope_scaling"]


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_auto_config_needs_no_remote_code(auto_config, directory, trust_remote_code):
    # The file's auto_map names a module that is not there: it must not be looked for.
    config = auto_config.from_pretrained(directory, trust_remote_code=trust_remote_code)
    assert type(config) is Step35HFConfig


def test_transformers_own_class_is_why_we_register(directory, stock_auto_config):
    """When this fails, transformers reads the published file and our registration may go."""
    config = stock_auto_config.from_pretrained(directory)
    assert type(config).__name__ == "Step3p7TextConfig" and len(config.layer_types) == 45
    with pytest.raises(Exception, match="num_attention_heads"):
        hasattr(config, "num_attention_heads")


def test_loading_a_bad_file_names_the_field(auto_config, directory):
    (directory / "config.json").write_text(json.dumps(edited(sliding_windw=8)))
    with pytest.raises(ConfigError, match="sliding_windw is unknown"):
        auto_config.from_pretrained(directory)


def test_overrides_after_loading_reach_the_spec():
    config = Step35HFConfig(**published())
    config.update({"num_nextn_predict_layers": 1, "sliding_window": 64})
    assert (len(config.spec().mtp_layers), config.spec().window) == (1, 64)
    config.sliding_window = 0
    with pytest.raises(ConfigError, match="sliding_window is 0"):
        config.spec()


def test_a_bad_override_is_not_saved(tmp_path):
    config = Step35HFConfig(**published())
    config.moe_top_k = 0
    with pytest.raises(ConfigError, match="moe_top_k"):
        config.save_pretrained(tmp_path)


def test_fields_that_sglang_writes_onto_a_config_are_ignored():
    config = Step35HFConfig(**published())
    config.context_len, config.v_head_dim = 4096, 128
    assert parse_config(config) == parse_config(published())


def test_empty_hf_config_can_be_made_and_shown():
    assert "step3p5" in repr(Step35HFConfig())
    assert not hasattr(Step35HFConfig(), "swa_head_dim")


# --- SGLang (slow to import, so last and in one go) -----------------------------------------------------------------


def test_sglang_loads_the_published_file(directory, stock_auto_config, monkeypatch):
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.utils.hf_transformers import common

    monkeypatch.setitem(common._CONFIG_REGISTRY, "step3p5", None)  # put back afterwards
    register_with_sglang()
    register_with_sglang()
    target = ModelConfig(str(directory))
    draft = ModelConfig(str(directory), is_draft_model=True)
    fewer = ModelConfig(str(directory), model_override_args='{"num_nextn_predict_layers": 1}')
    remote = ModelConfig(str(directory), trust_remote_code=True)
    assert type(target.hf_config) is type(draft.hf_config) is type(remote.hf_config) is Step35HFConfig
    assert target.hf_config.spec() == draft.hf_config.spec() == parse_config(published())
    assert len(fewer.hf_config.spec().mtp_layers) == 1
    assert target.context_len == 262144  # the llama3 factor is in it already
    assert target.hf_eos_token_id == {1, 2, 128007}
    assert target.full_attention_layer_ids == list(range(0, 45, 4)) and len(target.swa_attention_layer_ids) == 33
    assert (target.get_num_kv_heads(4), target.get_swa_num_kv_heads(4)) == (2, 2)
    assert target.get_max_num_attention_heads() == 96  # stock's class says 64, the head count of full layers
    assert draft.hf_config.architectures == ["Step3p5MTP"] and target.hf_config.architectures == ["Step3p5ForCausalLM"]
