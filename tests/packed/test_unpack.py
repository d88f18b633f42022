"""Each type against the `gguf` package's own dequantiser, and the kernel against a plain product."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from sglang_step35.model.mlp import swiglu
from sglang_step35.packed import kernel, plain
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.parameter import PackedParameter
from tests.support.gguf_files import packed_bytes


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def packed(name: str, *shape: int, seed: int = 0) -> tuple[GGMLTensor, torch.Tensor]:
    """Random weights and what `gguf.quants` makes of their bytes."""
    kind = GGMLQuantizationType[name]
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    stored = np.ascontiguousarray(packed_bytes(weight, kind, seed))
    data = torch.from_numpy(stored.view(np.uint8).reshape(*shape[:-1], -1))
    return GGMLTensor(TYPES[name], data), torch.from_numpy(gguf.quants.dequantize(stored, kind).copy())


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_ggmls(name):
    kind = GGMLQuantizationType[name]
    assert (int(kind), gguf.GGML_QUANT_SIZES[kind]) == (TYPES[name].number, (TYPES[name].block, TYPES[name].size))


@pytest.mark.parametrize("name", TYPES)
def test_every_bit_counts(name):
    tensor, expected = packed(name, 3, 7, 512)
    assert tensor.shape == (3, 7, 512)
    assert torch.equal(tensor.dequantize(), expected)
    assert torch.equal(tensor[1].dequantize(), expected[1])
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_products(name, rows, monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_WEIGHTS", 1024)  # four rows at a time, the last block shorter
    tensor, expected = packed(name, 11, 256)
    x = torch.randn(rows, 256)
    assert torch.allclose(kernel.linear(x, [tensor]), x @ expected.T, rtol=1e-4, atol=1e-4)


def test_parts_of_different_types():
    parts = [packed("Q4_K", 6, 256, seed=1), packed("Q6_K", 2, 256, seed=2), packed("BF16", 3, 256, seed=3)]
    x = torch.randn(4, 256).bfloat16()
    out = plain.linear(x, [tensor for tensor, _ in parts])
    expected = x.float() @ torch.cat([weight for _, weight in parts]).T
    assert out.dtype is torch.bfloat16 and torch.allclose(out.float(), expected, rtol=1e-2, atol=0.2)


def test_rows_of_a_table():
    tensor, expected = packed("Q4_0", 40, 64)
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(kernel.gather(ids, tensor), expected[ids])


@pytest.mark.parametrize("limit", [None, 0.7])
def test_experts(limit):
    (gate, g), (up, u), (down, d) = (packed("Q8_0", 5, *shape) for shape in ((32, 64), (32, 64), (64, 32)))
    x, weights = torch.randn(7, 64), torch.rand(7, 2)
    ids = torch.rand(7, 5).topk(2).indices
    ids[2] = torch.tensor([-1, 4])
    expected = torch.zeros_like(x)
    for t in range(7):
        for weight, e in zip(weights[t], ids[t].tolist(), strict=True):
            if e >= 0:
                expected[t] += weight * (d[e] @ swiglu(g[e] @ x[t], u[e] @ x[t], limit))
    assert torch.allclose(kernel.experts(x, gate, up, down, weights, ids, limit), expected, rtol=1e-4, atol=1e-3)


def test_a_parameter_orders_its_parts_and_keeps_its_share():
    """Two of three columns, and experts 1 and 2 of four, given as a stack or one by one."""
    cut = lambda part, tensor: tensor.columns(0, 2)
    parameter = PackedParameter.of("w1", "w3", cut=cut, experts=range(1, 3))
    first, second = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    for expert, matrix in enumerate(second):
        parameter.fill("w3", matrix, expert)
    parameter.fill("w1", first)
    for part, whole in zip(parameter.rows(), (first, second), strict=True):
        assert torch.equal(part.dequantize(), whole[1:3, :, :2])
    assert parameter.numel() == 0
