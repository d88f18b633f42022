"""Step-3.7 checkpoints: the text model is transformers' one, the vision encoder is passed over, nothing else is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.mtp import Step3p5MTP
from sglang_step35.model.weights import WeightError
from tests.support import model_host, quantised
from tests.support.checkpoints import make_checkpoint
from tests.support.reference import Reference, load_reference
from tests.support.step37 import STEPFUN, TRANSFORMERS, as_step37, outer_fields

TOLERANCE = 1e-4
LAYOUTS = pytest.mark.parametrize("names", [STEPFUN, TRANSFORMERS], ids=["StepFun's names", "transformers' names"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("step37") / "step35")


@pytest.fixture(scope="module")
def reference(plain):
    return load_reference(plain)


def prompt(length: int) -> list[int]:
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(5)).tolist()


@LAYOUTS
def test_logits_of_backbone_and_mtp_layers(plain, reference, tmp_path, names):
    directory, ids = as_step37(plain, tmp_path / "step37", names), prompt(40)
    model = model_host.load(directory)
    assert (model_host.all_logits(model, ids) - reference.logits(ids)).abs().max() < TOLERANCE
    mtp = model_host.load(directory, draft=True)
    mtp.share_with(model)
    found = model_host.mtp_logits(mtp, reference.hidden_before_norm(ids), ids)
    for logits, expected in zip(found, reference.mtp_logits(ids), strict=True):
        assert (logits - expected).abs().max() < TOLERANCE


def failure(directory, change, draft: bool = False) -> str:
    """What a load says after `change` to the weights."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError) as error:
        model_host.load(directory, draft=draft)
    return str(error.value)


def test_other_tensors_are_refused(plain, tmp_path):
    directory = as_step37(plain, tmp_path / "step37")
    message = failure(directory, lambda w: w.update({"model.audio_model.weight": torch.ones(2)}))
    assert "model.audio_model.weight (in model.safetensors) belongs to nothing in this model" in message


def test_a_tensor_under_both_names_is_refused(plain, tmp_path):
    directory, name = as_step37(plain, tmp_path / "step37"), "layers.4.moe.router_bias"
    message = failure(directory, lambda w: w.update({f"model.{name}": w[f"model.language_model.{name}"].clone()}))
    assert f"model.{name} (in model.safetensors) occurs twice" in message


def test_missing_tensor(plain, tmp_path):
    directory = as_step37(plain, tmp_path / "step37")
    message = failure(directory, lambda w: w.pop("model.language_model.layers.4.moe.router_bias"))
    assert "lacks model.layers.4.moe.router_bias" in message


def test_missing_mtp_layers(plain, tmp_path):
    directory = as_step37(plain, tmp_path / "step37")
    message = failure(
        directory, lambda w: [w.pop(n) for n in list(w) if n.split(".")[3:4] in (["9"], ["10"], ["11"])], draft=True
    )
    assert "has no MTP layers (model.layers.9 and on)" in message


def test_vision_tensors_in_a_step35_checkpoint_are_refused(plain, tmp_path):
    directory = as_step37(plain, tmp_path / "step37", STEPFUN)
    shutil.copy(plain / "config.json", directory)
    message = failure(directory, lambda w: None)
    assert "vision_model.weight (in model.safetensors) belongs to nothing in this model" in message


def test_quantised_experts(plain, tmp_path):
    """In 4 bits, `quantization_config` on the outer level: the logits of the dequantised weights."""
    source = shutil.copytree(plain, tmp_path / "step35")
    weights = quantised.write(source, quantised.compressed(4, 32))
    fields = json.loads((source / "config.json").read_text())
    directory, ids = as_step37(source, tmp_path / "step37"), prompt(40)
    outer = outer_fields(fields, quantization_config=fields.pop("quantization_config"))
    (directory / "config.json").write_text(json.dumps(outer))
    expected = Reference(fields, weights).logits(ids)
    assert (model_host.all_logits(model_host.load(directory), ids) - expected).abs().max() < TOLERANCE


def test_unquantised_layers_are_named_as_in_the_checkpoint():
    """Where SGLang's own kernels serve FP8: `ignored_layers` with the prefix end as our layers are called."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    config = Fp8Config(True, ignored_layers=["model.language_model.layers.0.self_attn.o_proj"])
    assert Step3p5ForCausalLM.hf_to_sglang_mapper is Step3p5MTP.hf_to_sglang_mapper
    config.apply_weight_name_mapper(Step3p5ForCausalLM.hf_to_sglang_mapper)
    assert config.ignored_layers == ["model.layers.0.self_attn.o_proj"]
