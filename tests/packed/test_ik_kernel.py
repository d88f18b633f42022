"""ggml's kernels against plain products of what the `gguf` package dequantises.

Bounds are relative errors of a whole result: 8-bit activations cost 0.4 to 0.9 % a product, float types only the order
of the sum. Row counts on both sides of where the library changes its way (32).
"""

from types import SimpleNamespace

import pytest
import torch

from sglang_step35.model.mlp import swiglu
from sglang_step35.packed import amx_rows, ik_check, ik_kernel, ik_library, kernel
from sglang_step35.packed.ggml import TYPES, GGMLTensor
from sglang_step35.packed.ik_steps import Steps
from tests.packed.test_unpack import packed

EXACT = {"F32": 1e-6, "F16": 1e-6, "BF16": 1e-6}
ROUNDED = 1.2e-2
BF16 = 2.0**-8  # of a result in bfloat16

needs_library = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")
pytestmark = needs_library


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    """And no AMX, which `test_amx.py` tests."""
    torch.manual_seed(0)
    monkeypatch.setattr(amx_rows, "supported", lambda: False)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def chosen_experts(x, gate, up, down, weights, ids, limit) -> torch.Tensor:
    """In float32, with a copy of every token's experts."""
    of_each = lambda weight: weight[ids.clamp(min=0)]  # [T, k, rows, columns]
    hidden = swiglu(torch.einsum("th,tkih->tki", x, of_each(gate)), torch.einsum("th,tkih->tki", x, of_each(up)), limit)
    return torch.einsum("tki,tkhi,tk->th", hidden, of_each(down), weights * (ids >= 0))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("columns", [32, 96, 160, 256, 1280])
def test_products(name, columns):
    if columns % TYPES[name].block:
        pytest.skip("not a whole number of blocks")
    tensor, expected = packed(name, 48, columns)
    if not ik_kernel.reads(tensor):
        assert name == "Q4_1" and columns % 128
        return
    for rows in (1, 4, 40):
        x = torch.randn(rows, columns)
        assert error(ik_kernel.linear(x, [tensor]), x @ expected.T) < EXACT.get(name, ROUNDED)


@pytest.mark.parametrize("rows", [1, 9, 64])
@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_K"])
def test_the_library_writes_no_memory_but_its_own(monkeypatch, rows, name):
    """Gate and up by the library, whose plan for them lacks room, and nothing behind them that asks for more."""
    library, asked = ik_library.library(), []

    def address(size: int) -> int:
        asked.append((size, torch.full((size + (1 << 20),), 171, dtype=torch.uint8)))
        return asked[-1][1].data_ptr()

    monkeypatch.setattr(library, "work", SimpleNamespace(address=address))
    library._make_room()
    (gate, _), (up, _) = (packed(name, 8, 32, 256, seed=seed) for seed in (0, 1))
    steps, ids = Steps(library), torch.rand(rows, 8).topk(2).indices.int()
    ids[:, 0] = 3  # one expert has a row of every token
    x, numbers = steps.floats(torch.randn(rows, 256), 256, 1, rows), library.tensor(ik_library.I32, 2, rows)
    numbers.contents.data = ids.data_ptr()
    between = torch.empty(1 << 20, dtype=torch.uint8)
    steps.build([steps.experts(x, numbers, gate, up, None)], between, 2).run()
    ((size, memory),) = asked
    assert (memory[size:] == 171).all()


def test_no_rows():
    tensor, _ = packed("Q8_0", 43, 64)
    assert ik_kernel.linear(torch.randn(0, 64).bfloat16(), [tensor]).shape == (0, 43)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3), (100,)])
@pytest.mark.parametrize("name", TYPES)
def test_rows_of_a_table(name, shape):
    """To the bit, of a table that is a rank's share, too."""
    tensor, expected = packed(name, 43, 256)
    ids = torch.randint(0, 37, shape)
    assert torch.equal(ik_kernel.gather(ids, tensor), expected[ids])
    assert torch.equal(ik_kernel.gather(ids, tensor.rows(5, 42)), expected[5:42][ids])


@pytest.mark.parametrize("native", [True, False])
def test_parts_of_different_types_side_by_side(monkeypatch, native):
    """A CPU with bfloat16 instructions leaves such a part to torch from the 65th row on."""
    monkeypatch.setattr(kernel, "multiplies_bfloat16", lambda: native)
    parts = [packed("Q4_K", 6, 256, seed=1), packed("BF16", 3, 256, seed=3), packed("Q6_K", 2, 256, seed=2)]
    expected = torch.cat([weight for _, weight in parts])
    for rows in (1, 40, 80):
        x = torch.randn(rows, 256).bfloat16()
        out = kernel.linear(x, [tensor for tensor, _ in parts])
        assert out.dtype is torch.bfloat16
        for found, wanted in zip(out.split((6, 3, 2), 1), (x.float() @ expected.T).split((6, 3, 2), 1), strict=True):
            assert error(found, wanted) < ROUNDED + BF16


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_0", "Q6_K"])
def test_a_rank_s_share_is_read_in_place(name):
    """Rows and columns of a larger matrix, and of a stack: the strides are the file's."""
    tensor, expected = packed(name, 64, 1024)
    share = tensor.rows(16, 48).columns(256, 768)
    assert share.data.untyped_storage().data_ptr() == tensor.data.untyped_storage().data_ptr()
    x = torch.randn(4, 512)
    assert error(ik_kernel.linear(x, [share]), x @ expected[16:48, 256:768].T) < ROUNDED
    stacks = [packed(name, 4, 512, 512, seed=seed) for seed in (1, 2, 3)]
    gate, up = (stack.rows(256, 512)[2:] for stack, _ in stacks[:2])
    down = stacks[2][0].columns(256, 512)[2:]
    meaning = [stacks[0][1][2:, 256:], stacks[1][1][2:, 256:], stacks[2][1][2:, :, 256:]]
    weights, ids = torch.rand(3, 2), torch.tensor([[0, 1], [1, -1], [-1, 0]])
    x = torch.randn(3, 512) / 16
    found = ik_kernel.experts(x, gate, up, down, weights, ids, 0.7)
    assert error(found, chosen_experts(x, *meaning, weights, ids, 0.7)) < 3 * ROUNDED


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("limit", [None, 0.7])
def test_experts(name, limit, monkeypatch):
    """Ids of -1, experts that nobody chose, a row count beyond what one call takes."""
    monkeypatch.setattr(ik_kernel, "EXPERT_TOKENS", 40)
    size, hidden = (256, 512) if TYPES[name].block == 256 or name == "Q4_1" else (96, 160)
    shapes = (size, hidden), (size, hidden), (hidden, size)
    (gate, g), (up, u), (down, d) = (packed(name, 5, *shape, seed=seed) for seed, shape in enumerate(shapes))
    for rows in (1, 4, 90):
        x, weights = torch.randn(rows, hidden) / 8, torch.rand(rows, 3)
        ids = torch.rand(rows, 4).topk(3).indices
        ids[rows // 2, 1], ids[rows - 1] = -1, torch.tensor([-1, 3, -1])
        found = ik_kernel.experts(x, gate, up, down, weights, ids, limit)
        assert error(found, chosen_experts(x, g, u, d, weights, ids, limit)) < 3 * ROUNDED


def test_nothing_chosen():
    gate, up, down = (packed("Q8_0", 2, 32, 32)[0] for _ in range(3))
    ids = torch.full((3, 2), -1)
    out = ik_kernel.experts(torch.randn(3, 32), gate, up, down, torch.rand(3, 2), ids, None)
    assert torch.equal(out, torch.zeros(3, 32))


def test_gate_and_down_of_different_types():
    """As llama.cpp mixes them."""
    names = ("Q4_K", "Q4_K", "Q6_K")
    (gate, g), (up, u), (down, d) = (packed(name, 3, 256, 256, seed=seed) for seed, name in enumerate(names))
    x, weights, ids = torch.randn(4, 256) / 8, torch.rand(4, 2), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    found = ik_kernel.experts(x, gate, up, down, weights, ids, None)
    assert error(found, chosen_experts(x, g, u, d, weights, ids, None)) < 3 * ROUNDED
    assert not ik_kernel.reads_experts(gate, down, down)


def test_repeats_are_bit_equal():
    tensor, _ = packed("Q4_K", 64, 512)
    x = torch.randn(4, 512)
    assert torch.equal(ik_kernel.linear(x, [tensor]), ik_kernel.linear(x, [tensor]))


def test_a_full_arena_is_emptied(monkeypatch):
    monkeypatch.setattr(ik_library, "ARENA_BYTES", 100_000)
    library = ik_library.Library(ik_library.library_path())
    monkeypatch.setattr(ik_library, "library", lambda: library)
    tensor, expected = packed("Q8_0", 16, 64)
    for rows in (*range(1, 60), 1):
        x = torch.randn(rows, 64)
        assert error(ik_kernel.linear(x, [tensor]), x @ expected.T) < ROUNDED
    assert 1 < len(library._graphs) < 59


def test_float32_activations_stay_exact(monkeypatch):
    monkeypatch.setattr(ik_kernel, "linear", None)
    tensor, expected = packed("Q8_0", 16, 64)
    x = torch.randn(4, 64)
    assert error(kernel.linear(x, [tensor]), x @ expected.T) < 1e-6


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(kernel, "usable", lambda: False)
    monkeypatch.setattr(ik_kernel, "linear", None)
    tensor, expected = packed("Q8_0", 16, 64)
    x = torch.randn(4, 64).bfloat16()
    assert error(kernel.linear(x, [tensor]), x.float() @ expected.T) < BF16


def test_what_the_library_cannot_read_runs_in_plain_torch():
    """Bytes of a row that do not follow each other."""
    tensor, expected = packed("BF16", 64, 32)
    apart = GGMLTensor(tensor.type, torch.stack((tensor.data, tensor.data), -1)[..., 0])
    assert not ik_kernel.reads(apart) and ik_kernel.reads(tensor)
    x = torch.randn(4, 32).bfloat16()
    wanted = x.float() @ expected.T
    assert error(kernel.linear(x, [tensor, apart]), torch.cat((wanted, wanted), 1)) < BF16
