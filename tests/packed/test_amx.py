"""Products by AMX against float32 ones of activations and weights rounded to bfloat16, and when they run."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from sglang_step35.model import experts
from sglang_step35.model.mlp import swiglu
from sglang_step35.packed import amx_rows, ik_check, ik_kernel, prepare
from sglang_step35.packed.blocks import BlockTensor
from sglang_step35.packed.ggml import plain
from sglang_step35.packed.prepare import prepared
from tests.packed.test_unpack import packed
from tests.support.graph_steps import recorded

EXACT = 3e-6  # relative: only the order of the sums differs
ROUNDED = 5e-3  # between the two products of experts results are rounded once more
KINDS = (*prepare.INTERLEAVED, "BF16", "FP8")
NEEDS_AMX = pytest.mark.skipif(not (ik_check.usable() and amx_rows.supported()), reason="without library or AMX")


@pytest.fixture
def steps(monkeypatch, roomy):
    """Shapes of what AMX computed, be it few rows. Every graph is new."""
    torch.manual_seed(0)
    monkeypatch.setattr(amx_rows, "FEWEST", dict.fromkeys(amx_rows.FEWEST, 1))
    yield from recorded(monkeypatch, amx_rows, "step")


def weights(name: str, *shape: int, seed: int = 0) -> tuple:
    """A matrix or stack as kernels read it, and its weights rounded to bfloat16."""
    chance = torch.Generator().manual_seed(seed)
    if name == "BF16":
        values = torch.randn(shape, generator=chance).bfloat16()
        return plain(values), values.float()
    if name == "FP8":
        *leading, rows, columns = shape
        values = (60 * torch.randn(shape, generator=chance)).clamp(-400, 400).to(torch.float8_e4m3fn)
        scales = torch.rand(*leading, -(-rows // 32), -(-columns // 96), generator=chance) / 100
        wide = scales.repeat_interleave(32, -2)[..., :rows, :].repeat_interleave(96, -1)[..., :columns]
        return BlockTensor(values, scales, (32, 96)), (values.float() * wide).bfloat16().float()
    matrix, meaning = packed(name, *shape, seed=seed)
    words = meaning.view(torch.int32) + 0x8000  # of two equally near numbers the larger one
    return prepared(matrix), (words >> 16 << 16).view(torch.float32)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def chosen(x, gate, up, down, shares, ids, limit) -> torch.Tensor:
    """In float32, expert by expert."""
    out = torch.zeros(len(x), down.shape[1])
    for e in range(len(gate)):
        share = (shares * (ids == e)).sum(1, keepdim=True)
        out += share * (rounded(swiglu(x @ gate[e].T, x @ up[e].T, limit)) @ down[e].T)
    return out


@NEEDS_AMX
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 32, 33, 64, 100])
def test_products(steps, threads, name, rows):
    """Matrices side by side: an odd number of eights of rows, one eight, and even ones."""
    counts = [40, 8, 64, 96]
    parts, meanings = zip(*(weights(name, count, 512, seed=count) for count in counts))
    x = torch.randn(rows, 512)
    found = ik_kernel.linear(x, parts).split(counts, 1)
    for part, meaning in zip(found, meanings, strict=True):
        assert error(part, rounded(x) @ meaning.T) < EXACT
    assert steps == [(count, rows) for count in counts]


@NEEDS_AMX
@pytest.mark.parametrize("columns", [32, 96, 4096])
@pytest.mark.parametrize("name", ["Q8_0", "BF16"])
def test_more_rows_than_stay_near(steps, columns, name):
    matrix, meaning = weights(name, 24, columns)
    x = torch.randn(700, columns)
    assert error(ik_kernel.linear(x, [matrix]), rounded(x) @ meaning.T) < EXACT
    assert steps == [(24, 700)]


@NEEDS_AMX
@pytest.mark.parametrize("name", ["FP8", "BF16"])
def test_a_share_of_a_matrix(steps, name):
    """Rows and columns of a larger one, whose scales begin before them."""
    matrix, meaning = weights(name, 96, 384)
    share, x = matrix.rows(16, 72).columns(32, 224), torch.randn(20, 192)
    assert error(ik_kernel.linear(x, [share]), rounded(x) @ meaning[16:72, 32:224].T) < EXACT
    assert steps == [(56, 20)]


@NEEDS_AMX
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("rows", [2, 33, 130])
def test_experts(steps, threads, name, rows, limit):
    """All rows choose one of the experts, three of five each; -1 is none."""
    shapes = (256, 512), (256, 512), (512, 256)
    (gate, g), (up, u), (down, d) = (weights(name, 5, *shape, seed=seed) for seed, shape in enumerate(shapes))
    x, shares = torch.randn(rows, 512) / 8, torch.rand(rows, 3)
    ids = torch.rand(rows, 4).topk(3).indices
    ids[:, 0] = 4
    ids[rows - 1, 1:] = -1
    found = ik_kernel.experts(x, gate, up, down, shares, ids, limit)
    assert error(found, chosen(rounded(x), g, u, d, shares, ids, limit)) < ROUNDED
    assert steps == [(256, 3, rows), (512, 3, rows)]


@NEEDS_AMX
@pytest.mark.parametrize("limit", [None, 0.7])
def test_gates_are_exact(steps, limit):
    """From tiny to large ones; the last product is with a unit matrix, by the library."""
    (gate, g), (up, u) = (weights("Q8_0", 2, 40, 64, seed=seed) for seed in (0, 1))
    down = torch.eye(64, 40).expand(2, 64, 40)
    x, ids = torch.randn(9, 64) * torch.logspace(-3, 1, 9)[:, None], torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1]]).T
    found = ik_kernel.experts(x, gate, up, plain(down), torch.ones(9, 1), ids, limit)
    for row, e, own in zip(found, ids[:, 0], rounded(x), strict=True):
        assert error(row[:40], swiglu(g[e] @ own, u[e] @ own, limit)) < EXACT
    assert steps == [(40, 1, 9)]


@NEEDS_AMX
@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_number_stays_none(steps, name):
    """In its own row."""
    matrix, x = weights(name, 16, 256)[0], torch.randn(20, 256)
    x[1, 40], x[18, 3] = float("nan"), float("inf")
    found = ik_kernel.linear(x, [matrix]).isfinite().all(1)
    assert found.nonzero().flatten().tolist() == [row for row in range(20) if row not in (1, 18)]
    assert torch.equal(ik_kernel.linear(torch.zeros(3, 256), [matrix]), torch.zeros(3, 16))
    assert len(steps) == 2


@NEEDS_AMX
def test_unquantised_experts_go_to_it_however_many_rows_they_have(steps, monkeypatch):
    monkeypatch.setattr(experts, "LARGE", 1)
    w13, w2 = torch.randn(2, 64, 32).bfloat16(), torch.randn(2, 32, 32).bfloat16()
    x, ids = torch.randn(200, 32).bfloat16() / 6, torch.arange(200)[:, None] % 2
    found = experts.run_experts(x, w13, w2, torch.ones(200, 1), ids, None).float()
    gate, up = w13.float().chunk(2, dim=1)
    assert error(found, chosen(x.float(), gate, up, w2.float(), torch.ones(200, 1), ids, None)) < 2 * ROUNDED
    assert len(steps) == 2


@NEEDS_AMX
def test_what_others_multiply(steps, monkeypatch):
    """Few rows, other types, rows that do not divide by eight, columns by 32, all where the unit may not be used."""
    x = torch.randn(4, 256)
    ik_kernel.linear(x, [weights("Q4_0", 12, 256)[0], packed("Q4_0", 16, 256)[0], weights("BF16", 20, 256)[0]])
    ik_kernel.linear(torch.randn(4, 40), [weights("BF16", 16, 40)[0]])
    monkeypatch.setattr(amx_rows, "FEWEST", dict.fromkeys(amx_rows.FEWEST, 5))
    ik_kernel.linear(x, [weights("Q4_0", 16, 256)[0]])
    monkeypatch.setattr(amx_rows, "supported", lambda: False)
    ik_kernel.linear(torch.randn(9, 256), [weights("Q4_0", 16, 256)[0]])
    assert steps == []


def test_a_cpu_without_the_unit_or_a_system_that_refuses_it(monkeypatch):
    from sglang_step35.packed import amx_tiles

    asked = []
    has = lambda *names: lambda: dict.fromkeys(names, True)
    refusing = SimpleNamespace(syscall=lambda *numbers: asked.append(numbers) or -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: refusing)
    everything = "amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512bf16"
    for names, answers in ((everything[1:], 0), (everything[:-1], 0), (everything, 1)):
        monkeypatch.setattr(amx_tiles.binding, "get_host_cpu_features", has(*names))
        assert not amx_tiles.supported()
        assert len(asked) == answers
