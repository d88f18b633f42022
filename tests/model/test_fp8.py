"""Loading a checkpoint with FP8 blocks. Its arithmetic needs a GPU; here only what lands in which parameter."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config

from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.mtp import Step3p5MTP
from sglang_step35.model.weights import WeightError
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint

BLOCK = 16
QUANTISED = (".moe.gate_proj.", ".moe.up_proj.", ".moe.down_proj.", ".share_expert.", ".mlp.")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Experts, shared expert and dense layers of the backbone in FP8, everything else in BF16."""
    directory = make_checkpoint(tmp_path_factory.mktemp("fp8"), CheckpointShape(dtype="bfloat16"))
    weights = load_file(directory / "model.safetensors")
    for name in list(weights):
        if int(name.split(".")[2]) < 9 if "layers" in name else False:
            if any(part in name for part in QUANTISED):
                weight = weights[name].float()
                rows, columns = weight.shape[-2] // BLOCK, weight.shape[-1] // BLOCK
                scale = torch.rand(*weight.shape[:-2], rows, columns) + 0.5
                full = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
                weights[name] = (weight / full).to(torch.float8_e4m3fn)
                weights[f"{name}_scale_inv"] = scale
    save_file(weights, directory / "model.safetensors")
    if model_host.publish_role() is None:
        model_host.start_runtime(directory)
    return directory


def build(cls, directory):
    skipped = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(9) for part in "qkvo"]
    quant = Fp8Config(True, "dynamic", ignored_layers=[*skipped, "lm_head"], weight_block_size=[BLOCK, BLOCK])
    torch.set_default_dtype(torch.bfloat16)
    try:
        return cls(ModelConfig(str(directory), dtype="bfloat16").hf_config, quant_config=quant)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_and_scales(directory):
    model, weights = build(Step3p5ForCausalLM, directory), load_file(directory / "model.safetensors")
    model.load_weights(weights.items())
    experts = model.model.layers[4].mlp.experts
    for suffix in ("weight", "weight_scale_inv"):
        gate, up, down = (weights[f"model.layers.4.moe.{part}_proj.{suffix}"] for part in ("gate", "up", "down"))
        assert torch.equal(getattr(experts, f"w13_{suffix}").float(), torch.cat((gate, up), 1).float())
        assert torch.equal(getattr(experts, f"w2_{suffix}").float(), down.float())
        shared = model.model.layers[4].mlp.share_expert.down_proj
        expected = weights[f"model.layers.4.share_expert.down_proj.{suffix}"]
        assert torch.equal(getattr(shared, suffix).float(), expected.float())


@pytest.mark.parametrize("name", ["moe.up_proj.weight_scale_inv", "share_expert.up_proj.weight_scale_inv"])
def test_missing_scale(directory, name):
    model, weights = build(Step3p5ForCausalLM, directory), load_file(directory / "model.safetensors")
    del weights[f"model.layers.4.{name}"]
    with pytest.raises(WeightError, match=name):
        model.load_weights(weights.items())


def test_wrong_shape_of_a_scale(directory):
    model, weights = build(Step3p5ForCausalLM, directory), load_file(directory / "model.safetensors")
    name = "model.layers.4.moe.up_proj.weight_scale_inv"
    weights[name] = weights[name][:, :1]
    with pytest.raises(WeightError, match=r"asks for \(8, 2, 4\)"):
        model.load_weights(weights.items())


def test_mtp_layers_left_in_bfloat16(directory):
    model, weights = build(Step3p5MTP, directory), load_file(directory / "model.safetensors")
    assert model.quant_config is None
    model.load_weights(weights.items())


def test_quantised_mtp_layers(directory, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text())))
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.9.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    model = build(Step3p5MTP, tmp_path)
    assert model.layers[0].block.mlp.down_proj.weight.dtype is torch.float8_e4m3fn
