"""The model's tensor functions against their formulas written out."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.moe.topk import TopKOutputFormat
from sglang.srt.layers.quantization.fp8 import Fp8Config

from sglang_step35.config import AttentionSpec, MoESpec, RopeSpec
from sglang_step35.model import moe
from sglang_step35.model.experts import dense_experts, grouped_experts, run_experts
from sglang_step35.model.mlp import SwiGLU, swiglu
from sglang_step35.model.moe import choose_experts
from sglang_step35.model.norm import RMSNorm
from sglang_step35.model.rotary import QKNormRope, RotaryRows
from sglang_step35.packed.methods import PackedConfig


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def moe_spec(**changes) -> MoESpec:
    fields = dict(
        num_experts=6,
        top_k=2,
        expert_size=5,
        shared_size=5,
        scaling_factor=3.0,
        renormalize=True,
        router_bias=True,
        fp32_router=True,
        limit=None,
    )
    return MoESpec(**{**fields, **changes})


# SwiGLU.


def test_swiglu_clamps_after_silu():
    gate, up = torch.tensor([9.0, 9.0, -9.0, 1.0]), torch.tensor([9.0, -9.0, 9.0, 1.0])
    silu = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    expected = torch.tensor([49.0, -49.0, 7 * -9 / (1 + torch.e**9), silu])
    assert torch.allclose(swiglu(gate, up, 7.0), expected, rtol=1e-5)


def test_swiglu_clamp_differs_from_clamping_before_silu():
    gate, up = torch.tensor([5.0]), torch.tensor([1.0])
    assert swiglu(gate, up, 1.0) == 1.0
    assert F.silu(gate.clamp(max=1.0)) * up < 0.74


def test_swiglu_without_limit():
    gate_up = torch.randn(3, 8) * 20
    assert torch.equal(SwiGLU(None)(gate_up), F.silu(gate_up[:, :4]) * gate_up[:, 4:])


# RMSNorm.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_zero_centred(dtype):
    torch.set_default_dtype(dtype)  # as SGLang's loader does
    norm = RMSNorm(16, 1e-5)
    torch.set_default_dtype(torch.float32)
    norm.weight.weight_loader(norm.weight, torch.randn(16))
    x = (torch.randn(3, 16) * 4).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + norm.weight.double())
    tolerance = 1e-6 if dtype is torch.float32 else 2**-8
    assert torch.allclose(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_norm_eps_matters_for_small_inputs():
    norm = RMSNorm(4, 1e-2)
    x = torch.full((1, 4), 1e-3)
    assert torch.allclose(norm(x), x / (1e-6 + 1e-2) ** 0.5)


def test_norm_adds_the_residual():
    norm, x, residual = RMSNorm(8, 1e-5), torch.randn(2, 8), torch.randn(2, 8)
    out, total = norm(x, residual)
    assert torch.equal(total, x + residual) and torch.equal(out, norm(total))


# Router.


def test_bias_chooses_but_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, -3.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 9.0])
    weights, ids = choose_experts(logits, bias, moe_spec())
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    scores = logits.sigmoid()[0]
    total = scores[0] + scores[5]
    assert chosen == pytest.approx({i: float(3 * scores[i] / total) for i in (0, 5)})


def test_weights_sum_to_the_scaling_factor():
    weights, _ = choose_experts(torch.randn(7, 6), torch.randn(6), moe_spec(scaling_factor=2.5))
    assert torch.allclose(weights.sum(-1), torch.full((7,), 2.5))


def test_router_without_bias_or_renormalisation():
    logits = torch.randn(4, 6)
    weights, ids = choose_experts(logits, None, moe_spec(renormalize=False))
    assert torch.equal(ids.sort().values, logits.topk(2).indices.sort().values)
    assert torch.equal(weights, logits.sigmoid().gather(1, ids) * 3)


# What the routed experts may run on.


def runner(name: str, triton: bool = False):
    return SimpleNamespace(value=name, is_triton=lambda: triton)


def top_k(output_format) -> SimpleNamespace:
    return SimpleNamespace(topk_config=SimpleNamespace(output_format=output_format))


def test_runners_that_drop_the_clamp_are_refused():
    standard = top_k(TopKOutputFormat.STANDARD)
    moe._check_runner(moe_spec(limit=7.0), 43, runner("triton", triton=True), standard)
    moe._check_runner(moe_spec(), 3, runner("deep_gemm"), standard)
    with pytest.raises(ValueError, match="layer 43 .* deep_gemm .* --moe-runner-backend triton"):
        moe._check_runner(moe_spec(limit=7.0), 43, runner("deep_gemm"), standard)


def test_runners_that_route_by_themselves_are_refused():
    with pytest.raises(ValueError, match="selection bias"):
        moe._check_runner(moe_spec(), 3, runner("flashinfer_mxfp4"), top_k(TopKOutputFormat.BYPASSED))


@pytest.mark.parametrize(
    "ranks, ignored, whole",
    [(1, [], False), (2, [], False), (4, [], True), (8, [], True), (4, ["model.layers.3.share_expert"], False)],
)
def test_shared_expert_of_an_fp8_checkpoint(monkeypatch, ranks, ignored, whole):
    monkeypatch.setattr(moe, "get_parallel", lambda: SimpleNamespace(tp_size=ranks))
    quant = Fp8Config(True, "dynamic", ignored_layers=ignored, weight_block_size=[128, 128])
    assert moe._cannot_shard(1280, quant, "model.layers.3.share_expert") is whole
    assert not moe._cannot_shard(1280, None, "model.layers.3.share_expert")


@pytest.mark.parametrize("size, ranks, whole", [(1280, 1, False), (1280, 2, True), (1024, 4, False), (1024, 8, True)])
def test_shared_expert_of_packed_rows(monkeypatch, size, ranks, whole):
    """K-quants have blocks of 256 columns."""
    monkeypatch.setattr(moe, "get_parallel", lambda: SimpleNamespace(tp_size=ranks))
    assert moe._cannot_shard(size, PackedConfig(), "model.layers.3.share_expert") is whole


@pytest.mark.parametrize("ranks, whole", [(1, False), (2, False), (4, True), (8, True)])
@pytest.mark.parametrize("name", ["auto-round", "gptq_marlin", "awq_marlin", "compressed_tensors"])
def test_shared_expert_of_a_4_bit_checkpoint(monkeypatch, ranks, whole, name):
    """Marlin takes 128 input columns at once."""
    monkeypatch.setattr(moe, "get_parallel", lambda: SimpleNamespace(tp_size=ranks))
    quant = SimpleNamespace(get_name=lambda: name)
    assert moe._cannot_shard(1280, quant, "model.layers.3.share_expert") is whole


# Experts.


def naive_experts(x, w13, w2, weights, ids, limit):
    out = torch.zeros_like(x)
    for t, (row, chosen) in enumerate(zip(weights, ids, strict=True)):
        for weight, expert in zip(row, chosen, strict=True):
            if expert >= 0:
                gate, up = (w13[expert] @ x[t]).chunk(2)
                out[t] += weight * (w2[expert] @ swiglu(gate, up, limit))
    return out


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("run", [dense_experts, grouped_experts, run_experts])
def test_experts(run, tokens, limit):
    x, w13, w2 = torch.randn(tokens, 8), torch.randn(6, 10, 8), torch.randn(6, 8, 5)
    ids = torch.rand(tokens, 6).topk(2).indices
    weights = torch.rand(tokens, 2)
    expected = naive_experts(x, w13, w2, weights, ids, limit)
    assert torch.allclose(run(x, w13, w2, weights, ids, limit), expected, atol=1e-5)


@pytest.mark.parametrize("run", [dense_experts, grouped_experts])
def test_experts_of_other_ranks_add_nothing(run):
    x, w13, w2 = torch.randn(3, 8), torch.randn(6, 10, 8), torch.randn(6, 8, 5)
    ids = torch.tensor([[0, -1], [-1, -1], [5, 2]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    expected = naive_experts(x, w13, w2, weights, ids, None)
    assert torch.allclose(run(x, w13, w2, weights, ids, None), expected, atol=1e-5)
    assert not run(x, w13, w2, weights, torch.full_like(ids, -1), None).any()


@pytest.mark.parametrize("run", [dense_experts, grouped_experts])
def test_experts_keep_the_dtype(run):
    x, w13, w2 = (torch.randn(shape).bfloat16() for shape in ((3, 8), (6, 10, 8), (6, 8, 5)))
    ids, weights = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2)
    out = run(x, w13, w2, weights, ids, 1.0)
    expected = naive_experts(x.float(), w13.float(), w2.float(), weights, ids, 1.0)
    assert out.dtype is torch.bfloat16
    assert torch.allclose(out.float(), expected, atol=0.05, rtol=0.05)


# Query-key norm and RoPE.

LLAMA3 = dict(
    rope_type="llama3",
    factor=2.0,
    low_freq_factor=1.0,
    high_freq_factor=32.0,
    original_max_position_embeddings=64,
)


def llama3_frequencies(frequencies):
    """The published rule: long waves are stretched, short ones kept, a ramp between."""
    wave = 2 * torch.pi / frequencies
    ramp = (LLAMA3["original_max_position_embeddings"] / wave - 1.0) / (32.0 - 1.0)
    mixed = (1 - ramp) * frequencies / 2 + ramp * frequencies
    low = LLAMA3["original_max_position_embeddings"] / 1.0
    high = LLAMA3["original_max_position_embeddings"] / 32.0
    return torch.where(wave < high, frequencies, torch.where(wave > low, frequencies / 2, mixed))


def rotate(x, positions, theta, rotary_dim, scaled):
    """x [T, h, D]: channel i of the first half of `rotary_dim` turns with channel i of the second."""
    half = rotary_dim // 2
    frequencies = theta ** (-torch.arange(half).double() * 2 / rotary_dim)
    if scaled:
        frequencies = llama3_frequencies(frequencies)
    angle = (positions[:, None].double() * frequencies)[:, None]
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.cat((*turned, rest), dim=-1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_qk_norm_and_rope(factor, scaled):
    heads, kv_heads, dim, theta = 3, 2, 16, 10000.0
    rope = RopeSpec(theta, factor, LLAMA3 if scaled else None, 4096)
    rows = RotaryRows()
    module = QKNormRope(AttentionSpec(heads, kv_heads, dim, None, rope, True), heads, kv_heads, 1e-5, rows)
    for norm in (module.q_norm, module.k_norm):
        norm.weight.weight_loader(norm.weight, torch.randn(dim))
    positions = torch.tensor([0, 1, 7, 100, 2047])
    qkv = torch.randn(5, (heads + 2 * kv_heads) * dim)
    rows.start(positions)
    q, k, v = module(positions, qkv)

    def expected(x, norm):
        x = x.double()
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + norm.weight.double())
        return rotate(normed, positions, theta, int(dim * factor), scaled)

    split = qkv.unflatten(1, (-1, dim))
    assert torch.allclose(q.view(5, -1, dim).double(), expected(split[:, :heads], module.q_norm), atol=2e-3)
    assert torch.allclose(k.view(5, -1, dim).double(), expected(split[:, heads:-2], module.k_norm), atol=2e-3)
    assert torch.equal(v, qkv[:, -2 * dim :])


def test_rows_follow_the_positions():
    rope = RopeSpec(10000.0, 1.0, None, 128)
    rows = RotaryRows()
    module = QKNormRope(AttentionSpec(1, 1, 8, None, rope, True), 1, 1, 1e-5, rows)
    qkv, positions = torch.randn(1, 24), torch.tensor([3])
    rows.start(positions)
    first, *_ = module(positions, qkv)
    positions += 1  # the same tensor, as a captured graph would reuse it
    rows.start(positions)
    assert not torch.allclose(first, module(positions, qkv)[0])
