"""The transformers config class, alone, under AutoConfig and in SGLang."""

import copy
import json
import pickle
from pathlib import Path

import pytest
from transformers import AutoConfig

from sglang_step35.config import parse_config
from sglang_step35.config_fields import ConfigError
from sglang_step35.hf_config import Step35HFConfig, register_hf_config, register_with_sglang
from tests.support.published_config import ABSENT, PUBLISHED, edited, published


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
