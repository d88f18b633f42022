"""FP8 in blocks: our kernel against float32 products of what torch reads of the values, where the file has them."""

from dataclasses import replace

import pytest
import torch

from sglang_step35.packed import ik_check, ik_kernel, kernel, prepare
from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.ik_library import library
from sglang_step35.packed.ik_steps import Steps
from sglang_step35.packed.ik_weights import reads
from sglang_step35.packed.prepare import prepared
from sglang_step35.packed.row_kernels import EXACT_ROWS
from sglang_step35.packed.stack import StackedTensor
from sglang_step35.vector_code import multiplies_pairs
from tests.packed.test_ik_kernel import BF16, chosen_experts, error

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")
EXACT = 2e-6
ROUNDED = 1.2e-2  # weights and activations in bfloat16, between two products too; 0.0094 seen


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blocks(*shape: int, block: int = 128) -> tuple[BlockTensor, torch.Tensor]:
    """A matrix or stack, and the weights it stands for."""
    *leading, rows, columns = shape
    values = (60 * torch.randn(shape)).clamp(-400, 400).to(torch.float8_e4m3fn)
    scales = torch.rand(*leading, -(-rows // block), -(-columns // block)) / 100
    wide = scales.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :columns]
    return BlockTensor(values, scales, (block, block)), values.float() * wide


def product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """In float32, or of what bfloat16 makes of both where many rows are multiplied by pairs."""
    if len(x) > EXACT_ROWS and multiplies_pairs():
        x, weights = x.bfloat16().float(), weights.bfloat16().float()
    return x @ weights.T


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 63, 64, 72, 130])
@pytest.mark.parametrize("shape", [(128, 256), (100, 384), (7, 128), (640, 1280)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_exact_or_those_of_bfloat16_numbers(rows, shape, threads):
    matrix, meaning = blocks(*shape)
    x, former = torch.randn(rows, shape[1]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert error(ik_kernel.linear(x, [matrix]), product(x, meaning)) < EXACT
    finally:
        torch.set_num_threads(former)


def test_every_value():
    """Subnormal ones, both zeros and the largest."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[values.float().isfinite()].repeat(64)[: 32 * 480].view(480, 32)
    found = ik_kernel.linear(torch.eye(32), [BlockTensor(values, torch.ones(60, 1), (8, 32))])
    assert torch.equal(found, values.float().T)


@pytest.mark.parametrize("start, end", [(0, 320), (160, 480), (32, 64), (96, 512)])
@pytest.mark.parametrize("rows", [5, 12])
def test_parts_of_a_rank_may_begin_inside_a_block(start, end, rows):
    matrix, meaning = blocks(300, 512)
    x = torch.randn(rows, end - start)
    found = ik_kernel.linear(x, [matrix.rows(50, 250).columns(start, end), matrix.rows(3, 9).columns(start, end)])
    assert error(found, product(x, torch.cat((meaning[50:250, start:end], meaning[3:9, start:end])))) < EXACT


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts(tokens, limit):
    (gate, gates), (up, ups), (down, downs) = blocks(6, 160, 256), blocks(6, 160, 256), blocks(6, 256, 160, block=32)
    x, weights = torch.randn(tokens, 256), torch.rand(tokens, 3)
    ids = torch.randint(-1, 6, (tokens, 3))
    ids[0, 0] = 5
    wanted = chosen_experts(x, gates, ups, downs, weights, ids, limit)
    bound = ROUNDED if tokens == 40 and multiplies_pairs() else 2 * EXACT
    assert error(ik_kernel.experts(x, gate, up, down, weights, ids, limit), wanted) < bound


def test_a_graph_reads_another_layer_s_weights_where_these_are():
    """Graphs are made once for their shapes: values, scales and cuts are looked up anew."""
    for _ in range(3):
        matrix, meaning = blocks(256, 512)
        x, cut = torch.randn(2, 256), torch.randint(0, 9, (1,)).item() * 32
        found = ik_kernel.linear(x, [matrix.columns(cut, cut + 256).rows(10, 60)])
        assert error(found, x @ meaning[10:60, cut : cut + 256].T) < EXACT


def test_steps_of_a_graph():
    """As of a whole layer's."""
    (matrix, meaning), x = blocks(64, 256), torch.randn(3, 256)
    steps, out = Steps(library()), torch.empty(3, 64)
    product = steps.product(steps.floats(x, 256, 3), matrix)
    product.contents.data = out.data_ptr()
    graph = steps.build([product], torch.empty(1 << 16, dtype=torch.uint8), 1)
    graph.run()
    assert error(out, x @ meaning.T) < EXACT


@pytest.mark.parametrize("columns, block", [(128 + 16, 128), (256, 48)])
def test_what_the_kernel_does_not_read_runs_in_plain_torch(columns, block):
    matrix, meaning = blocks(64, columns, block=block)
    assert not reads(matrix)
    x = torch.randn(2, columns).bfloat16()
    assert error(kernel.linear(x, [matrix]), x.float() @ meaning.T) < BF16


def test_other_eight_bit_floats_are_not_read():
    matrix, _ = blocks(64, 128)
    assert reads(matrix) and not reads(replace(matrix, values=matrix.values.float().to(torch.float8_e5m2)))


def test_scales_become_float32_and_values_stay_where_they_are():
    matrix, _ = blocks(64, 128)
    given = replace(matrix, scales=matrix.scales.bfloat16())
    assert not reads(given)
    ready = prepared(given)
    assert reads(ready) and ready.values is given.values and torch.equal(ready.scales, given.scales.float())


def test_experts_kept_one_by_one_become_a_stack_while_memory_lasts(monkeypatch):
    single = [blocks(64, 128)[0] for _ in range(3)]
    stack = StackedTensor(dict(enumerate(single)))
    ready = prepared(stack)
    assert reads(ready) and ready.shape == (3, 64, 128)
    assert torch.equal(ready.dequantize(), torch.stack([matrix.dequantize() for matrix in single]))
    monkeypatch.setattr(prepare, "_memory_allows", lambda size: False)
    assert prepared(stack) is stack
