"""Our own kernels for interleaved weights: against float32 products of activations rounded as they round them, and when
they run."""

import pytest
import torch

from sglang_step35.model.mlp import swiglu
from sglang_step35.packed import ik_check, ik_kernel, ik_library, int8_rows, prepare
from sglang_step35.packed.ggml import plain
from sglang_step35.packed.ik_steps import Steps
from sglang_step35.packed.prepare import prepared
from tests.packed.test_ik_kernel import ROUNDED, chosen_experts, error
from tests.packed.test_unpack import packed
from tests.support.graph_steps import recorded

EXACT = 3e-6  # relative: only the order of the sums differs
COLUMNS = 32  # that share a scale

pytestmark = pytest.mark.skipif(
    not (ik_check.usable() and int8_rows.supported()), reason="without the library or the CPU's instructions"
)


@pytest.fixture(autouse=True)
def steps(monkeypatch, roomy):
    """Shapes of what our kernels computed. Every graph is new."""
    torch.manual_seed(0)
    yield from recorded(monkeypatch, int8_rows, "step")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To 8 bits and a scale for every 32 columns."""
    blocks = x.unflatten(-1, (-1, COLUMNS))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    return (codes * (largest / 127)).flatten(-2)


@pytest.mark.parametrize("name", prepare.INTERLEAVED)
@pytest.mark.parametrize("rows", [1, *range(2, 18), 33, 64, 65, 130])
def test_products(steps, threads, name, rows):
    """Matrices side by side: an odd number of eights of rows, one eight, and rows that do not divide by eight."""
    parts, meanings = zip(*(packed(name, count, 512, seed=count) for count in (40, 8, 12, 64)))
    x = torch.randn(rows, 512)
    x[0, :COLUMNS] = 0
    found = ik_kernel.linear(x, [prepared(part) for part in parts]).split([40, 8, 12, 64], 1)
    for number, (part, meaning) in enumerate(zip(found, meanings)):
        assert error(part, x @ meaning.T) < ROUNDED
        if number != 2:
            assert error(part, rounded(x) @ meaning.T) < EXACT
    assert steps == [(40, rows), (8, rows), (64, rows)]


@pytest.mark.parametrize("name", prepare.INTERLEAVED)
def test_a_row_is_the_same_among_others(name):
    """And by however many threads."""
    weight, x = prepared(packed(name, 40, 256)[0]), torch.randn(70, 256)
    whole, before = ik_kernel.linear(x, [weight]), torch.get_num_threads()
    torch.set_num_threads(2)
    for rows in range(1, 10):
        assert torch.equal(ik_kernel.linear(x[-rows:], [weight]), whole[-rows:])
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", prepare.INTERLEAVED)
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("rows", [2, 6, 64, 130])
def test_experts(steps, threads, name, rows, limit):
    """All rows choose one of the experts, three of five each; -1 is none."""
    stacks = [packed(name, 5, *shape, seed=seed) for seed, shape in enumerate(((256, 512), (256, 512), (512, 256)))]
    gate, up, down = (prepared(stack) for stack, _ in stacks)
    x, shares = torch.randn(rows, 512) / 8, torch.rand(rows, 3)
    ids = torch.rand(rows, 4).topk(3).indices
    ids[:, 0] = 4
    ids[rows - 1, 1:] = -1
    found = ik_kernel.experts(x, gate, up, down, shares, ids, limit)
    assert error(found, chosen_experts(x, *(meaning for _, meaning in stacks), shares, ids, limit)) < 3 * ROUNDED
    assert steps == [(256, 3, rows), (512, 3, rows)]


def test_the_gates_of_experts_are_exact(steps):
    """From tiny to large ones; the last product is with a unit matrix."""
    (gate, g), (up, u) = (packed("Q8_0", 2, 32, 64, seed=seed) for seed in (0, 1))
    down = torch.eye(64, 32).expand(2, 64, 32)
    x, ids = torch.randn(9, 64) * torch.logspace(-3, 1, 9)[:, None], torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1]]).T
    found = ik_kernel.experts(x, prepared(gate), prepared(up), plain(down), torch.ones(9, 1), ids, 100.0)
    expected = chosen_experts(rounded(x), g, u, down, torch.ones(9, 1), ids, 100.0)
    for row, wanted in zip(found, expected):
        assert error(row, wanted) < EXACT
    assert len(steps) == 1


@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_gated_network_in_a_graph_of_many_steps(steps, limit):
    weights, (g, u, d) = zip(*(packed("Q4_0", 64, 64, seed=seed) for seed in range(3)))
    gate, up, down = map(prepared, weights)  # they must outlive the graph
    x, out, between = torch.randn(5, 64), torch.empty(5, 64), torch.empty(1 << 14, dtype=torch.uint8)
    library = ik_library.library()
    library._make_room()
    graph = Steps(library)
    inner = graph.swiglu(graph.floats(x, 64, 5), gate, up, limit)
    found = graph.product(inner, down)
    found.contents.data = out.data_ptr()
    graph.build([found], between, 1).run()
    hidden = swiglu(rounded(x) @ g.T, rounded(x) @ u.T, limit)
    assert error(out, hidden @ d.T) < ROUNDED
    start = inner.contents.data - between.data_ptr()
    assert error(between[start : start + 5 * 64 * 4].view(torch.float32).view(5, 64), hidden) < EXACT
    assert steps == [(64, 5), (64, 5)]


def test_what_is_no_number_stays_none(steps):
    weight, x = prepared(packed("Q4_0", 16, 64)[0]), torch.randn(4, 64)
    x[1, 40], x[2, 3] = float("nan"), float("inf")
    found = ik_kernel.linear(x, [weight]).isfinite()
    assert found[[0, 3]].all() and not found[[1, 2]].any()
    assert torch.equal(ik_kernel.linear(torch.zeros(3, 64), [weight]), torch.zeros(3, 16))
    assert len(steps) == 2


def test_products_of_a_graph_share_their_records(monkeypatch):
    kinds = [prepared(packed(name, 16, 256)[0]) for name in ("Q4_0", "Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")]
    made, callback = [], ik_library.Library.callback
    seen = lambda *operands, kind=ik_library.F32, **limit: made.append(kind) or callback(*operands, kind=kind, **limit)
    monkeypatch.setattr(ik_library.Library, "callback", seen)
    ik_kernel.linear(torch.randn(2, 256), kinds)
    assert made.count(ik_library.I8) == 4 and made.count(ik_library.F32) == 6
    ik_kernel.linear(torch.randn(3, 256), kinds[:1])
    assert made.count(ik_library.I8) == 5


def test_what_stays_with_the_library(steps, monkeypatch):
    x = torch.randn(4, 256)
    ik_kernel.linear(x, [packed(name, 16, 256)[0] for name in (*prepare.INTERLEAVED, "BF16", "MXFP4")])
    ik_kernel.linear(x, [prepared(packed("Q4_K", 12, 256)[0])])
    monkeypatch.setattr(int8_rows, "supported", lambda: False)
    ik_kernel.linear(x, [prepared(packed("Q4_0", 16, 256)[0])])
    assert steps == []
