"""Keys of config.json that nothing reads: stamps are served with one warning, what would change the answers is not."""

import json

import pytest

from sglang_step35 import config_unknown
from sglang_step35.config import parse_config
from sglang_step35.config_fields import KNOWN_FIELDS, ConfigError
from sglang_step35.config_unknown import FOREIGN_FIELDS, OTHER_NAMES
from sglang_step35.hf_config import Step35HFConfig, register_hf_config
from tests.support.published_config import ABSENT, edited, published

STAMPS = {
    "unsloth_version": "2026.1",
    "unsloth_fixed": True,
    "sft": {"stage": 2, "lora": [8, 16]},
    "note": None,
}


@pytest.fixture
def warnings(monkeypatch):
    """The warnings given, as in a fresh process."""
    messages: list[str] = []
    config_unknown._warn.cache_clear()
    monkeypatch.setattr(config_unknown.logger, "warning", lambda text, *values: messages.append(text % values))
    return messages


def test_stamps_are_served_with_one_warning(warnings):
    assert parse_config(edited(**STAMPS)) == parse_config(published())
    (message,) = warnings
    assert message.endswith("does not know and ignores: note, sft, unsloth_fixed, unsloth_version")


def test_the_warning_comes_once_for_each_set_of_keys(warnings):
    for changes in (STAMPS, dict(reversed(STAMPS.items())), {"note": 1}, {"note": 2}, STAMPS):
        parse_config(edited(**changes))
    assert len(warnings) == 2 and warnings[1].endswith("ignores: note")


def test_nothing_is_said_about_the_published_file(warnings):
    parse_config(published())
    assert warnings == []


@pytest.mark.parametrize(
    "name, meant",
    [
        ("eos_tokn_id", "eos_token_id"),
        ("max_seq_length", "max_seq_len"),
        ("quantisation_config", "quantization_config"),
    ],
)
def test_the_warning_says_what_may_be_meant(warnings, name, meant):
    parse_config(edited(**{name: 3}))
    assert warnings[0].endswith(f"{name} (did you mean {meant}?)")


@pytest.mark.parametrize(
    "name",
    """unk_token_id mask_token_id eos_token model_name peft_config training_args sft_stage train_batch_size
    pretraining_tp router_aux_loss_coef output_router_logits original_max_position_embeddings padded_vocab_size
    text_vocab_size vocab_file need_fp32_lm_head classifier_dropout moe_token_dispatcher_type
    hidden_dropout_prob""".split(),
)
def test_names_that_only_resemble_a_field_are_served(warnings, name):
    assert parse_config(edited(**{name: 1})) == parse_config(published())
    assert len(warnings) == 1 and name in warnings[0]


@pytest.mark.parametrize(
    "name, meant",
    [
        ("swiglu_limit", "swiglu_limits"),
        ("swiglu_limits_share", "swiglu_limits_shared"),
        ("partial_rotary_factor", "partial_rotary_factors"),
        ("rope_scalings", "rope_scaling"),
        ("zero_centred", "zero_centered"),
        ("use_router_bias", "use_moe_router_bias"),
        ("router_scaling_factor", "moe_router_scaling_factor"),
        ("tie_embeddings", "tie_word_embeddings"),
        ("rms_norm_epsilon", "rms_norm_eps"),
        ("sinks", "sink"),
    ],
)
@pytest.mark.parametrize("present", [True, False])
def test_misspelt_arithmetic_is_refused(warnings, name, meant, present):
    """Also where the right name is there: whoever wrote the other one meant something by it."""
    changes = {name: 1} | ({} if present or meant not in published() else {meant: ABSENT})
    with pytest.raises(ConfigError, match=f"^config field {name} is unknown: did you mean {meant}[?]"):
        parse_config(edited(**changes))


def test_a_required_field_under_another_spelling_is_missing(warnings):
    with pytest.raises(ConfigError, match="^config field sliding_window is missing"):
        parse_config(edited(sliding_window=ABSENT, window_length=512))


@pytest.mark.parametrize("name", FOREIGN_FIELDS)
def test_settings_of_other_architectures(warnings, name):
    neutral, why = FOREIGN_FIELDS[name]
    for value in (neutral, None):
        assert parse_config(edited(**{name: value})) == parse_config(published())
    assert warnings == []
    for value in ({"factor": 2.0}, 7, not neutral):
        with pytest.raises(ConfigError) as refusal:
            parse_config(edited(**{name: value}))
        assert f"config field {name} is {value!r}" in str(refusal.value) and why in str(refusal.value)


def test_a_file_saved_by_transformers_own_class_is_not_served_without_its_scaling(warnings):
    parameters = {"full_attention": {"rope_type": "llama3", "factor": 2.0}}
    with pytest.raises(ConfigError, match="rope_parameters.*restore the published config.json"):
        parse_config(edited(rope_scaling=ABSENT, rope_parameters=parameters))


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_second_names_must_agree(warnings, name):
    field = OTHER_NAMES[name]
    value = edited(rms_norm_eps=1e-5)[field]
    fields = edited(rms_norm_eps=1e-5)
    assert parse_config(fields | {name: value}) == parse_config(published())
    assert parse_config(fields | {name: None}) == parse_config(published())
    assert warnings == []
    other = "softmax" if value == "sigmoid" else (not value if value is True else value * 2)
    with pytest.raises(ConfigError, match=f"^config field {name} is {other!r}: {field} is {value!r}.*correct it"):
        parse_config(fields | {name: other})


def test_a_second_name_does_not_stand_for_an_absent_field(warnings):
    with pytest.raises(ConfigError, match="^config field norm_topk_prob is False: norm_expert_weight is None"):
        parse_config(edited(norm_expert_weight=ABSENT, norm_topk_prob=False))


def test_the_tables_are_disjoint():
    assert not FOREIGN_FIELDS.keys() & OTHER_NAMES.keys()
    assert not (FOREIGN_FIELDS.keys() | OTHER_NAMES.keys()) & KNOWN_FIELDS
    assert set(OTHER_NAMES.values()) <= KNOWN_FIELDS


@pytest.mark.parametrize("table", ["rope_scaling", "attention_other_setting"])
def test_tables_inside_the_file_take_no_stamps(table):
    with pytest.raises(ConfigError, match=f"^config field {table}[.]stamp is unknown: remove it"):
        parse_config(edited(**{f"{table}__stamp": 1}))


# --- The transformers config class ----------------------------------------------------------------------------------


def test_stamps_survive_as_attributes_and_in_saved_files(warnings, tmp_path):
    from transformers import AutoConfig

    register_hf_config()
    config = Step35HFConfig(**edited(**STAMPS))
    assert {name: getattr(config, name) for name in STAMPS} == STAMPS
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.items() >= STAMPS.items()
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.spec() == parse_config(published()) and again.to_dict().items() >= STAMPS.items()
    assert len(warnings) == 1


@pytest.mark.parametrize("name", ["spec", "swa_head_dim", "to_dict"])
def test_a_stamp_may_not_hide_the_config_class(warnings, name):
    with pytest.raises(ConfigError, match=f"^config field {name} is unknown, and the config class uses the name"):
        Step35HFConfig(**edited(**{name: 128}))


def test_transformers_own_marks_are_passed_on(warnings):
    marks = {"_attn_implementation_autoset": True, "_attn_implementation": "eager", "_name_or_path": "x"}
    assert Step35HFConfig(**edited(**marks)).spec() == parse_config(published()) and warnings == []


def test_null_settings_do_not_reach_sglang(warnings):
    """It looks for a language model inside whatever `text_config` holds."""
    config = Step35HFConfig(**edited(text_config=None, vision_config=None, n_group=1))
    assert not hasattr(config, "text_config") and not hasattr(config, "vision_config") and config.n_group == 1
