"""The whole published model in 4 bits, without memory: built from the configs that quantisers write, and filled.

All layers have their published widths and clamps. All 288 experts of a layer are built; two are filled, since a
checkpoint holds each by itself.
"""

import pytest
import torch
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization import QUANTIZATION_METHODS, marlin_utils, moe_wna16
from sglang.srt.runtime_context import get_flags, get_parallel

from scripts.gpu_check.layers import all_tensors
from sglang_step35.config import parse_config
from sglang_step35.hf_config import Step35HFConfig
from sglang_step35.model.causal_lm import Step3p5ForCausalLM
from sglang_step35.model.vocab import PACKED_MODULES
from tests.support import int4, model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.published_config import edited, published

BACKBONE = published()["num_hidden_layers"]
NAMES = list(int4.formats(32))
GROUPS = [32, 128]


@pytest.fixture(scope="module", autouse=True)
def runtime(tmp_path_factory):
    model_host.ensure_runtime(make_checkpoint(tmp_path_factory.mktemp("tiny"), CheckpointShape()))


class WithoutMemory:
    """The ranks' group on the meta device, where SGLang's loader of 4-bit experts moves what it repacks."""

    device = torch.device("meta")

    def __init__(self, group):
        self.group = group

    def __getattr__(self, name):
        return getattr(self.group, name)


@pytest.fixture(autouse=True)
def no_memory(runtime):
    parallel = get_parallel()
    with parallel.override(tp_group=WithoutMemory(parallel.tp_group)):
        yield


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    for module in (torch.cuda, marlin_utils, moe_wna16):
        monkeypatch.setattr(module, "get_device_capability", lambda *_: (9, 0))


def build(cls, form: int4.Format, fields: dict, runner: str = "triton"):
    """runner: `--moe-runner-backend`, the preset's or "auto", SGLang's default."""
    flags = get_flags().moe
    before, flags.runner_backend = flags.runner_backend, MoeRunnerBackend(runner)
    quant = QUANTIZATION_METHODS[form.quantisation].from_config(
        form.config | dict(packed_modules_mapping=PACKED_MODULES)
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return cls(Step35HFConfig(**fields), quant_config=quant)
    finally:
        torch.set_default_dtype(torch.float32)
        flags.runner_backend = before


def checkpoint(form: int4.Format, group: int, fields: dict) -> dict[str, torch.Tensor]:
    """Every tensor of the published checkpoint in this format, on the meta device; MTP layers as they are."""
    found = {}
    for name, shape in all_tensors(parse_config(fields)).items():
        module, _, leaf = name.rpartition(".")
        packs = int4.QUANTISED.fullmatch(module)
        if not packs or int(name.split(".")[2]) >= BACKBONE:
            dtype = torch.float32 if leaf == "router_bias" else torch.bfloat16
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
            continue
        modules = [module]
        if len(shape) == 3:
            layer, part = module.split(".moe.")
            modules = [f"{layer}.moe.experts.{e}.{part}" for e in range(shape[0])]
        tensors = int4.described(*shape[-2:], form, group)
        found |= {f"{one}.{leaf}": tensor for one in modules for leaf, tensor in tensors.items()}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_shapes_without_values_are_the_packers(name):
    for group in GROUPS:
        form = int4.formats(group)[name]
        packed, _ = int4.pack_matrix(torch.randn(64, 256), form, group)
        described = int4.described(64, 256, form, group)
        assert {leaf: (t.shape, t.dtype) for leaf, t in packed.items()} == {
            leaf: (t.shape, t.dtype) for leaf, t in described.items()
        }


@pytest.mark.parametrize("runner", ["auto", "triton"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_model_is_built_on_kernels_that_clamp(name, group, runner):
    form = int4.published_configs(group, BACKBONE)[name]
    if runner == "auto" and name == "compressed-tensors":
        with pytest.raises(ValueError, match="--moe-runner-backend triton"):
            build(Step3p5ForCausalLM, form, published(), runner)
        return
    layers = build(Step3p5ForCausalLM, form, published(), runner).model.layers
    assert len(layers) == BACKBONE == 45
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        assert attention.g_proj.weight.dtype is torch.bfloat16
        assert {p.dtype for n, p in attention.qkv_proj.named_parameters()} & {torch.int32}
        if index < 3:
            continue
        experts = layer.mlp.experts
        assert experts.runner_backend.is_triton() and experts.num_experts == 288
        limit = {43: 7.0, 44: 7.0}.get(index)
        assert experts.moe_runner_config.gemm1_clamp_limit == limit
        assert layer.mlp.router.gate.weight.dtype is torch.float32


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", NAMES)
def test_the_loader_takes_every_tensor(name, group):
    """Of all layers; what belongs to the MTP layers is passed over."""
    form, fields = int4.published_configs(group, BACKBONE)[name], edited(moe_num_experts=2, moe_top_k=2)
    weights = checkpoint(form, group, fields)
    build(Step3p5ForCausalLM, form, fields).load_weights(weights.items())
