"""Our own kernel for few rows and bfloat16 weights against plain float32 products, and when it runs."""

import pytest
import torch

from sglang_step35.model.product import as_ggml
from sglang_step35.packed import ik_check, ik_kernel, ik_library, ik_rows
from sglang_step35.packed.ggml import plain
from tests.packed.test_ik_kernel import chosen_experts, error

EXACT = 2e-6  # relative: only the order of the sums differs; bfloat16 activations would cost 2e-3

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Shapes of what our kernel computed. Every matrix is large, and every graph is new."""
    torch.manual_seed(0)
    monkeypatch.setattr(ik_rows, "LARGE", 0)
    library = ik_library.Library(ik_library.library_path())
    monkeypatch.setattr(ik_library, "library", lambda: library)
    found, step = [], ik_rows._step
    seen = lambda own, shape, *rest, **limit: found.append(shape) or step(own, shape, *rest, **limit)
    monkeypatch.setattr(ik_rows, "_step", seen)
    return found


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("rows", range(1, 10))
def test_products(steps, threads, rows):
    """Three matrices side by side: odd, a single row, a view with rows further apart."""
    parts = [weights(37, 96), weights(1, 96), weights(24, 128)[:, :96]]
    x = torch.randn(rows, 96)
    found = ik_kernel.linear(x, [as_ggml(part) for part in parts])
    assert error(found, x @ torch.cat(parts).float().T) < EXACT
    assert steps == ([(37, rows), (1, rows), (24, rows)] if rows <= ik_rows.ROWS else [])


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65])
def test_experts(steps, threads, rows, limit):
    """All rows choose one of the experts, three of five each; -1 is none."""
    gate, up, down = weights(5, 35, 64), weights(5, 35, 64), weights(5, 64, 35)
    x, shares = torch.randn(rows, 64) / 8, torch.rand(rows, 3)
    ids = torch.rand(rows, 4).topk(3).indices
    ids[:, 0] = 4
    ids[rows - 1, 1:] = -1
    found = ik_kernel.experts(x, plain(gate), plain(up), plain(down), shares, ids, limit)
    expected = chosen_experts(x, gate.float(), up.float(), down.float(), shares, ids, limit)
    assert error(found, expected) < (EXACT if rows <= ik_rows.APART else 0.01)  # the library may round activations
    assert steps == ([(35, 3, rows), (64, 3, rows)] if rows <= ik_rows.APART else [])


def test_halves_of_one_stack_are_read_in_place(steps):
    """Gate and up as SGLang stores them."""
    both, down = weights(3, 2 * 40, 64), weights(3, 64, 40)
    gate, up = both.chunk(2, dim=1)
    x, shares, ids = torch.randn(2, 64) / 8, torch.rand(2, 2), torch.tensor([[0, 2], [2, 1]])
    found = ik_kernel.experts(x, as_ggml(gate), as_ggml(up), plain(down), shares, ids, None)
    assert error(found, chosen_experts(x, gate.float(), up.float(), down.float(), shares, ids, None)) < EXACT
    assert len(steps) == 2


def test_what_stays_with_the_library(steps, monkeypatch):
    for rows in (2, 3, 8):  # too wide for that many rows
        ik_kernel.linear(torch.randn(rows, 4160), [plain(weights(4, 4160))])
    x = torch.randn(1, 64)
    ik_kernel.linear(x, [plain(weights(4, 64).half())])
    monkeypatch.setattr(ik_rows, "LARGE", 1 << 17)
    ik_kernel.linear(x, [plain(weights(4, 64))])
    assert steps == []
