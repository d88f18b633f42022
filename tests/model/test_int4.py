"""4-bit checkpoints of every published packing: which SGLang method runs the experts, and what lands where.

SGLang believes in a Hopper GPU here, as its choice of kernels depends on one; the kernels' arithmetic needs a real one.
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import QUANTIZATION_METHODS, marlin_utils, moe_wna16
from sglang.srt.runtime_context import get_flags

from sglang_step35.model import moe
from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.mtp import Step3p5MTP
from sglang_step35.model.vocab import PACKED_MODULES
from sglang_step35.model.weights import WeightError
from tests.support import int4, model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint

# Marlin's linear kernels want 128 columns; layers 3 .. 5 have experts, 4 and 5 clamp them.
SHAPE = CheckpointShape(
    num_layers=6, hidden_size=128, heads=8, sliding_heads=16, head_dim=16, dense_size=128, experts=8, top_k=2,
    expert_size=128, shared_size=128, dtype="bfloat16",
)  # fmt: skip
NAMES = list(int4.formats(32))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("int4"), SHAPE)
    model_host.ensure_runtime(directory)
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
        quant = QUANTIZATION_METHODS[quantisation].from_config(config | dict(packed_modules_mapping=PACKED_MODULES))
        return cls(ModelConfig(str(directory), dtype="bfloat16").hf_config, quant_config=quant)
    finally:
        torch.set_default_dtype(torch.float32)
        flags.runner_backend = before


def checkpoint(directory, form: int4.Format, group: int, also: bool = False):
    weights = load_file(directory / "model.safetensors")
    return int4.quantise(weights, form, group, SHAPE.num_layers, also)


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "compressed-tensors"])
def test_no_flag_is_needed_where_sglang_would_pick_marlin(directory, name):
    form = int4.formats(128)[name]
    model = build(Step3p5ForCausalLM, directory, form.config, form.quantisation, runner="auto")
    assert model.model.layers[4].mlp.experts.runner_backend.is_triton()


@pytest.mark.parametrize("name", NAMES)
def test_packed_gates_and_routers_are_unpacked(directory, name):
    """No kernel takes the published head gates, of 64 or 96 rows, and we keep the router in float32."""
    form = int4.formats(32)[name]
    weights, meaning = checkpoint(directory, form, 32, also=True)
    model = build(Step3p5ForCausalLM, directory, form.config, form.quantisation)
    model.load_weights(weights.items())
    layer = model.model.layers[4]
    assert torch.equal(layer.self_attn.g_proj.weight, meaning["model.layers.4.self_attn.g_proj"].bfloat16())
    assert torch.equal(layer.mlp.router.gate.weight, meaning["model.layers.4.moe.gate"])
    scale = "weight_scale" if form.packing == "compressed" else "scales"
    del weights[f"model.layers.4.self_attn.g_proj.{scale}"]
    with pytest.raises(WeightError, match=rf"g_proj\.\w+ without its {scale}"):
        build(Step3p5ForCausalLM, directory, form.config, form.quantisation).load_weights(weights.items())


def test_layers_left_unquantised_stay_so(directory):
    form = int4.formats(128)["AutoRound"]
    config = form.config | dict(extra_config={"model.layers.3.moe.experts.0.up_proj": dict(bits=16)})
    model = build(Step3p5ForCausalLM, directory, config, form.quantisation)
    assert model.model.layers[3].mlp.experts.w13_weight.dtype is torch.bfloat16
    assert model.model.layers[4].mlp.experts.w13_qweight.dtype is torch.uint8
    form = int4.formats(128)["AWQ"]
    config = form.config | dict(modules_to_not_convert=["layers.3."])
    model = build(Step3p5ForCausalLM, directory, config, form.quantisation)
    assert model.model.layers[3].mlp.experts.w13_weight.dtype is torch.bfloat16


def test_parts_of_a_fused_layer_are_found_by_their_own_names(directory):
    """AutoRound's mixed checkpoints leave single matrices in 16 bits."""
    form = int4.formats(128)["AutoRound"]
    kept = {f"model.layers.4.self_attn.{part}_proj": dict(bits=16) for part in "qkv"}
    model = build(Step3p5ForCausalLM, directory, form.config | dict(extra_config=kept), form.quantisation)
    assert model.model.layers[4].self_attn.qkv_proj.weight.dtype is torch.bfloat16
    assert model.model.layers[5].self_attn.qkv_proj.qweight.dtype is torch.int32


def test_ranks_that_cut_a_group_are_refused():
    experts = SimpleNamespace(
        scheme=SimpleNamespace(group_size=128), intermediate_size_per_partition=1280 // 4, moe_tp_size=4
    )
    with pytest.raises(ValueError, match="layer 3: 4 tensor-parallel ranks hold 320 columns .*--ep-size"):
        moe._check_groups(3, experts)
    experts.intermediate_size_per_partition = 1280
    moe._check_groups(3, experts)


@pytest.mark.parametrize("change", [dict(desc_act=True), dict(group_size=-1)])
def test_packings_that_only_marlin_reads_are_refused(directory, change):
    form = int4.formats(128)["GPTQ"]
    with pytest.raises(ValueError, match=r"layers\.3\.moe\.experts is quantised with act-order"):
        build(Step3p5ForCausalLM, directory, form.config | change | dict(static_groups=False), form.quantisation)


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
