"""4-bit checkpoints of every published packing: which SGLang method runs the experts, and what lands where.

SGLang believes in a Hopper GPU here, as its choice of kernels depends on one; the kernels' arithmetic needs a real one.
"""

import pytest
import torch
from safetensors.torch import load_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import get_quantization_config, marlin_utils, moe_wna16
from sglang.srt.runtime_context import get_flags

from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.mtp import Step3p5MTP
from sglang_step35.model.vocab import PACKED_MODULES
from sglang_step35.model.weights import WeightError
from tests.support import int4, model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint

# Marlin's linear kernels want 128 columns; layers 3 .. 5 have experts, 4 and 5 clamp them.
SHAPE = CheckpointShape(
    num_layers=6, hidden_size=128, heads=4, sliding_heads=8, head_dim=32, dense_size=128, experts=4, top_k=2,
    expert_size=128, shared_size=128, dtype="bfloat16",
)  # fmt: skip
NAMES = ["compressed-tensors"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("int4"), SHAPE)
    if model_host.publish_role() is None:
        model_host.start_runtime(directory)
    return directory


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    for module in (torch.cuda, marlin_utils, moe_wna16):
        monkeypatch.setattr(module, "get_device_capability", lambda *_: (9, 0))


def build(cls, directory, config: dict, quantisation: str, runner: str = "triton"):
    flags = get_flags().moe
    before, flags.runner_backend = flags.runner_backend, MoeRunnerBackend(runner)
    torch.set_default_dtype(torch.bfloat16)
    try:
        quant = get_quantization_config(quantisation).from_config(config | dict(packed_modules_mapping=PACKED_MODULES))
        return cls(ModelConfig(str(directory), dtype="bfloat16").hf_config, quant_config=quant)
    finally:
        torch.set_default_dtype(torch.float32)
        flags.runner_backend = before


def checkpoint(directory, form: int4.Format, group: int):
    weights = load_file(directory / "model.safetensors")
    return int4.quantise(weights, form, group, SHAPE.num_layers)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("name", NAMES)
def test_experts_run_on_the_kernels_that_clamp_and_mean_the_checkpoint(directory, name, group):
    form = int4.formats(group)[name]
    weights, meaning = checkpoint(directory, form, group)
    model = build(Step3p5ForCausalLM, directory, form.config, form.quantisation)
    model.load_weights(weights.items())
    for index in (3, 4, 5):
        experts = model.model.layers[index].mlp.experts
        assert experts.runner_backend.is_triton()
        assert experts.moe_runner_config.gemm1_clamp_limit == (None if index == 3 else 0.7)
        if experts.scheme is not None:
            experts.scheme.process_weights_after_loading(experts)
        found = int4.experts_meaning(experts)
        for e in range(SHAPE.experts):
            gate, up, down = (meaning[f"model.layers.{index}.moe.experts.{e}.{p}_proj"] for p in ("gate", "up", "down"))
            assert torch.equal(found["w13"][e], torch.cat((gate, up)))
            assert torch.equal(found["w2"][e], down)


@pytest.mark.parametrize("name", NAMES)
def test_fused_layers_hold_their_parts_side_by_side(directory, name):
    form = int4.formats(32)[name]
    weights, _ = checkpoint(directory, form, 32)
    model = build(Step3p5ForCausalLM, directory, form.config, form.quantisation)
    model.load_weights(weights.items())
    leaf, rows = ("weight_packed", 0) if form.packing == "compressed" else ("qweight", 1)
    prefix = "model.layers.4.self_attn."
    parts = [weights[f"{prefix}{part}_proj.{leaf}"] for part in "qkv"]
    assert torch.equal(getattr(model.model.layers[4].self_attn.qkv_proj, leaf), torch.cat(parts, rows))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(directory, name):
    form = int4.formats(32)[name]
    weights, _ = checkpoint(directory, form, 32)
    scale = "weight_scale" if form.packing == "compressed" else "scales"
    del weights[f"model.layers.4.moe.experts.2.up_proj.{scale}"]
    model = build(Step3p5ForCausalLM, directory, form.config, form.quantisation)
    with pytest.raises(WeightError, match=rf"model\.layers\.4\.moe\.up_proj\.{scale} of experts 2"):
        model.load_weights(weights.items())


def test_mtp_layers_left_in_bfloat16(directory):
    form = int4.formats(128)["AutoRound"]
    weights, _ = checkpoint(directory, form, 128)
    model = build(Step3p5MTP, directory, form.config, form.quantisation)
    assert model.quant_config is None
    model.load_weights(weights.items())
