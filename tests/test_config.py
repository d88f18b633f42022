"""config.json to ModelSpec: the published file and variants of it."""

import copy
import dataclasses
import pickle
from collections.abc import Mapping

import pytest
from transformers import PretrainedConfig

from sglang_step35.config import MAX_MTP_LAYERS, AttentionSpec, RopeSpec, parse_config
from sglang_step35.config_fields import KNOWN_FIELDS, READ_FIELDS, FrozenFields
from tests.support.published_config import ABSENT, PER_LAYER, edited, published, with_entry


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
    assert seen >= READ_FIELDS


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
