"""Our own kernel for up to 64 rows and bfloat16 weights against plain float32 products, and when it runs."""

import pytest
import torch

from sglang_step35.model.product import as_ggml
from sglang_step35.packed import ik_check, ik_kernel, ik_rows
from sglang_step35.packed.ggml import plain
from tests.packed.test_ik_kernel import chosen_experts, error
from tests.support.graph_steps import recorded

EXACT = 2e-6  # relative: only the order of the sums differs
ROUNDED = 2.5e-3  # of activations, relative: at most 2 ** -9 each, 1.7e-3 on average of squares
EXACT_ROWS = 8  # of one matrix: more are rounded to bfloat16 where the CPU multiplies such numbers

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Shapes of what our kernel computed. Every matrix is large, and every graph is new."""
    torch.manual_seed(0)
    monkeypatch.setattr(ik_rows, "LARGE", 0)
    yield from recorded(monkeypatch, ik_rows, "_by_bfloat16")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def bound(rows: int) -> float:
    return EXACT if rows <= EXACT_ROWS else ROUNDED


@pytest.mark.parametrize("rows", [*range(1, 18), 31, 33, 64])
def test_products(steps, threads, rows):
    """Three matrices side by side: odd, a single row, a view with rows further apart."""
    parts = [weights(37, 96), weights(1, 96), weights(24, 128)[:, :96]]
    x = torch.randn(rows, 96)
    found = ik_kernel.linear(x, [as_ggml(part) for part in parts])
    for own, part in zip(found.split((37, 1, 24), 1), parts):
        assert error(own, x @ part.float().T) < bound(rows)
    assert steps == [(37, rows), (1, rows), (24, rows)]


@pytest.mark.parametrize("columns", [1, 2, 31, 33, 63, 100, 2047, 2081, 4100])
@pytest.mark.parametrize("rows", [1, 4, 6, 11, 64])
def test_columns(steps, rows, columns):
    """Any number; what lies behind a row is not read."""
    around = torch.full((19, columns + 1), float("nan"), dtype=torch.bfloat16)
    weight = around[:, :columns].copy_(weights(19, columns))
    x = torch.randn(rows, columns)
    found = ik_kernel.linear(x, [as_ggml(weight)])
    assert error(found, x @ weight.float().T) < bound(rows)
    assert len(steps) == 1


@pytest.mark.parametrize("rows", [1, 3, 5, 16, 64])
def test_many_rows_of_weights(steps, threads, rows):
    """Several blocks of them, the last one smaller; the weights have rows of zeros, and so has the result."""
    weight = weights(4321, 40)
    weight[::7] = 0
    x = torch.randn(rows, 40)
    found = ik_kernel.linear(x, [plain(weight)])
    assert error(found, x @ weight.float().T) < bound(rows)
    assert not found[:, ::7].any()


@pytest.mark.parametrize("rows", [5, 8, 9, 64])
def test_bfloat16_activations_are_multiplied_exactly(steps, rows):
    """However many; few rows are so even where one of them is of other numbers."""
    weight, x = weights(50, 160), weights(rows, 160).float()
    assert error(ik_kernel.linear(x, [plain(weight)]), x @ weight.float().T) < EXACT
    x[-1] += 1e-3
    assert error(ik_kernel.linear(x, [plain(weight)])[:-1], x[:-1] @ weight.float().T) < EXACT
    assert error(ik_kernel.linear(x, [plain(weight)]), x @ weight.float().T) < bound(rows)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 64, 100])
def test_experts(steps, threads, rows, limit):
    """All rows choose one of the experts, three of five each; -1 is none."""
    gate, up, down = weights(5, 35, 64), weights(5, 35, 64), weights(5, 64, 35)
    x, shares = torch.randn(rows, 64) / 8, torch.rand(rows, 3)
    ids = torch.rand(rows, 4).topk(3).indices
    ids[:, 0] = 4
    ids[rows - 1, 1:] = -1
    found = ik_kernel.experts(x, plain(gate), plain(up), plain(down), shares, ids, limit)
    expected = chosen_experts(x, gate.float(), up.float(), down.float(), shares, ids, limit)
    assert error(found, expected) < 2 * bound(rows)  # a product of products
    assert steps == [(35, 3, rows), (64, 3, rows)]


@pytest.mark.parametrize("scale", [0.01, 1, 30, 1000])
def test_silu(steps, scale):
    """Of gates from tiny ones to those whose exponential has no float32."""
    gate, up = (torch.eye(64).bfloat16().repeat(1, 1, 1) for _ in range(2))
    x = torch.randn(4, 64) * scale
    ids, shares = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    found = ik_kernel.experts(x, plain(gate), plain(up), plain(gate), shares, ids, None)
    expected = torch.nn.functional.silu(x.double()) * x
    # Of an exponential, relative, the rounding of its power counts. Those of less than 2 ** -126 are as good as 0.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 * max(1, scale), atol=1e-30)
    assert len(steps) == 2


def test_halves_of_one_stack_are_read_in_place(steps):
    """Gate and up as SGLang stores them."""
    both, down = weights(3, 2 * 40, 64), weights(3, 64, 40)
    gate, up = both.chunk(2, dim=1)
    x, shares, ids = torch.randn(2, 64) / 8, torch.rand(2, 2), torch.tensor([[0, 2], [2, 1]])
    found = ik_kernel.experts(x, as_ggml(gate), as_ggml(up), plain(down), shares, ids, None)
    assert error(found, chosen_experts(x, gate.float(), up.float(), down.float(), shares, ids, None)) < EXACT
    assert len(steps) == 2


def test_what_stays_with_the_library(steps, monkeypatch):
    ik_kernel.linear(torch.randn(65, 64), [plain(weights(4, 64))])
    x = torch.randn(1, 64)
    ik_kernel.linear(x, [plain(weights(4, 64).half())])
    ids, shares = torch.zeros(65, 1, dtype=torch.int64), torch.ones(65, 1)
    square = plain(weights(1, 64, 64))
    ik_kernel.experts(torch.randn(65, 64), square, square, square, shares, ids, None)
    monkeypatch.setattr(ik_rows, "LARGE", 1 << 17)
    ik_kernel.linear(x, [plain(weights(4, 64))])
    assert steps == []
