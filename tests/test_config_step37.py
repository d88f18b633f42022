"""Step-3.7's config.json: its text model's fields, alone, under AutoConfig and in SGLang."""

import json

import pytest

from sglang_step35.config import parse_config
from sglang_step35.config_fields import ConfigError
from sglang_step35.hf_config import Step35HFConfig, Step37HFConfig, register_with_sglang
from tests.support.published_config import published
from tests.support.step37 import outer_fields


def test_the_text_model_is_step35():
    assert parse_config(outer_fields(published())) == parse_config(published())


def test_the_outer_level_speaks_where_the_text_model_is_silent():
    text = published()
    text.pop("eos_token_id"), text.pop("torch_dtype", None)
    quantisation = {"quant_method": "fp8"}
    whole = {"eos_token_id": [7], "bos_token_id": 5, "torch_dtype": "float16", "quantization_config": quantisation}
    config = Step37HFConfig(**outer_fields(text, **whole))
    assert config.eos_token_id == [7] and config.bos_token_id == published()["bos_token_id"]
    assert str(config.dtype) == "torch.float16" and config.quantization_config == quantisation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Step3p7VideoModel"]}, "architectures is .*Step3p7VideoModel.*Step3p7ForConditional"),
        ({"text_config": [1]}, "text_config is a list: expected an object"),
        ({"text_config": {"hidden_size": 64}}, "num_hidden_layers is missing"),
        ({"text_config": published() | {"swiglu_limit": [7]}}, "swiglu_limit is unknown: did you mean swiglu_limits"),
        ({"text_config": published() | {"text_config": {"hidden_size": 1}}}, "multimodal checkpoints are another"),
        ({"model_type": "step3_vl"}, "text_config is .*multimodal checkpoints are another architecture"),
    ],
)
def test_other_files_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(outer_fields(published()) | change)


def test_sglang_sees_a_text_model(tmp_path):
    from sglang.srt.configs.model_config import ModelConfig

    register_with_sglang()
    (tmp_path / "config.json").write_text(json.dumps(outer_fields(published())))
    target, draft = (ModelConfig(str(tmp_path), is_draft_model=which) for which in (False, True))
    assert not target.is_multimodal and target.hf_config.architectures == ["Step3p5ForCausalLM"]
    assert draft.hf_config.architectures == ["Step3p5MTP"]
    assert isinstance(target.hf_config, Step35HFConfig) and target.hf_text_config is target.hf_config
    assert target.hf_config.spec() == parse_config(published())
    assert target.context_len == 262144


def test_saves_and_loads(tmp_path):
    from transformers import AutoConfig

    register_with_sglang()
    Step37HFConfig(**outer_fields(published())).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is Step37HFConfig and again.spec() == parse_config(published())
