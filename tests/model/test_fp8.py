"""Loading a checkpoint with FP8 blocks. Its arithmetic needs a GPU; here only what lands in which parameter."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.runtime_context import get_parallel

from sglang_step35.hf_config import Step35HFConfig
from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.mtp import Step3p5MTP
from sglang_step35.model.weights import WeightError
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.published_config import published

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


def on_ranks(ranks: int, experts: int, directory, cls=Step3p5ForCausalLM):
    """One of `ranks` parts of the published model, every layer in blocks of 128, without memory."""
    model_host.ensure_runtime(directory)
    quant = Fp8Config(True, "dynamic", ignored_layers=["lm_head"], weight_block_size=[128, 128])
    widths = dict(tp=ranks, attn_tp=ranks, moe_ep=experts, moe_tp=ranks // experts)
    parallel = {}
    for name, size in widths.items():
        group = SimpleNamespace(rank_in_group=1 % size, world_size=size, cpu_group=None)
        parallel |= {f"{name}_size": size, f"{name}_rank": 1 % size, f"{name}_group": group}
    config = Step35HFConfig(**published())
    with get_parallel().override(**parallel), torch.device("meta"):
        return cls(config, quant_config=quant)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_layer_of_the_published_model_over_ranks(ranks, directory):
    """Experts by number; the shared expert's 1280 columns stay whole where they do not split into blocks."""
    model = on_ranks(ranks, ranks, directory)
    assert len(model.model.layers) == 45
    shared = 1280 if ranks > 2 else 640
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        assert attention.o_proj.weight.shape == (4096, attention.num_heads * 128)
        assert attention.qkv_proj.weight_scale_inv.shape[0] * 128 == attention.qkv_proj.weight.shape[0]
        assert attention.g_proj.weight.shape == (attention.num_heads, 4096)
        if index < 3:
            assert layer.mlp.down_proj.weight_scale_inv.shape == (32, 11264 // ranks // 128)
        else:
            assert layer.mlp.experts.w13_weight.shape == (288 // ranks, 2560, 4096)
            assert layer.mlp.experts.w2_weight_scale_inv.shape == (288 // ranks, 32, 10)
            assert layer.mlp.share_expert.down_proj.weight.shape == (4096, shared)
            assert layer.mlp.share_expert.down_proj.weight_scale_inv.shape == (32, shared // 128)
    mtp = on_ranks(ranks, ranks, directory, Step3p5MTP)
    assert [layer.block.mlp.down_proj.weight.shape for layer in mtp.layers] == [(4096, 11264 // ranks)] * 3


@pytest.mark.parametrize("ranks", [4, 8])
def test_experts_cut_inside_a_block_are_refused(ranks, directory):
    message = f"layer 3: {ranks} tensor-parallel ranks hold {1280 // ranks} columns of each expert .*--ep-size"
    with pytest.raises(ValueError, match=message):
        on_ranks(ranks, 1, directory)
