"""Weights in 2 bits: what they mean by a loop over the bytes, how near they are, and products by our kernels."""

import numpy as np
import pytest
import torch

from sglang_step35.packed import amx_rows, ik_check, ik_kernel, int8_rows, prepare, two_bits
from sglang_step35.packed.ggml import plain
from tests.packed.test_ik_kernel import ROUNDED, error
from tests.packed.test_int8_rows import EXACT, rounded
from tests.packed.test_unpack import packed

runs = pytest.mark.skipif(
    not (ik_check.usable() and int8_rows.supported()), reason="without the library or the CPU's instructions"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def meaning(data: torch.Tensor, columns: int) -> torch.Tensor:
    """By the description in `two_bits.py`, weight by weight."""
    rows = len(data)
    blocks = data.numpy().reshape(rows // 8, columns // 32, 80)
    out = np.zeros((rows, columns), np.float32)
    for r in range(rows):
        for c in range(columns):
            block = blocks[r // 8, c // 32]
            half_step = block[:16].view(np.float16)[r % 8]
            inside = c % 32
            byte = block[16 + inside // 16 * 32 + r % 8 * 4 + inside % 4]
            code = int(byte) >> 2 * (inside % 16 // 4) & 3
            out[r, c] = (2 * code - 3) * np.float32(half_step)
    return torch.from_numpy(out)


def test_each_weight_becomes_the_nearest_of_four():
    weights = torch.randn(24, 96) * torch.logspace(-3, 3, 24)[:, None]
    weights[3, 32:64] = 0
    found = meaning(two_bits.encode(weights), 96).view(24, 3, 32)
    steps = weights.view(24, 3, 32).square().mean(-1, keepdim=True).sqrt() * 0.9957
    four = steps[..., None] * torch.tensor([-1.5, -0.5, 0.5, 1.5])
    nearest = (weights.view(24, 3, 32, 1) - four).abs().min(-1).values
    assert torch.allclose((weights.view(24, 3, 32) - found).abs(), nearest, rtol=2e-3, atol=2e-3 * float(steps.max()))
    assert float(found[3, 1].abs().max()) < 1e-3


def test_a_step_that_suits_normal_weights():
    """No other leaves less of their variance, 0.1188 (Max 1960); steps of 32 weights follow these a little."""
    weights = torch.randn(512, 1024)
    lost = (weights - meaning(two_bits.encode(weights), 1024)).square().mean()
    assert 0.110 < lost < 0.119


@runs
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 17, 70])
def test_products(roomy, rows):
    """As the kernels round activations: to 8 bits, or to bfloat16 by AMX."""
    screen = prepare.screened(plain(torch.randn(40, 512).bfloat16()))
    x, weights = torch.randn(rows, 512), meaning(screen.data, 512)
    found = ik_kernel.linear(x, [screen])
    assert error(found, x @ weights.T) < ROUNDED
    if not amx_rows.supported() or rows < 24:
        assert error(found, rounded(x) @ weights.T) < EXACT


@runs
@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", *prepare.INTERLEAVED])
def test_groups_of_rows(roomy, kind, rows):
    """The same numbers as whole products give, in any order."""
    ordinary = getattr(torch, kind, None)
    part = plain(torch.randn(64, 512, dtype=ordinary)) if ordinary else prepare.prepared(packed(kind, 64, 512)[0])
    x, groups = torch.randn(rows, 512).bfloat16().float(), torch.rand(rows, 8).argsort(-1)[:, :5]
    found = ik_kernel.of_groups(x, part, groups, 8)
    whole = ik_kernel.linear(x, [part]).view(rows, 8, 8)
    assert error(found, whole.gather(1, groups[..., None].expand(-1, -1, 8))) < ROUNDED


@runs
def test_a_screen_has_every_row(monkeypatch):
    """Also where it is written in several turns."""
    monkeypatch.setattr(prepare, "BLOCK_WEIGHTS", 1000)
    weights = torch.randn(40, 96)
    assert torch.equal(prepare.screened(plain(weights)).data, two_bits.encode(weights))


@pytest.mark.parametrize(
    ("shape", "spared", "screens"),
    [
        ((64, 320), 64 * 320 * 6 // 8, True),
        ((64, 320), 64 * 320 * 6 // 8 + 1, False),
        ((12, 32), 0, False),
        ((16, 48), 0, False),
    ],
)
def test_what_has_a_screen(shape, spared, screens, roomy):
    """Whole blocks, of which 8 bits less 2 are spared."""
    here = ik_check.usable() and int8_rows.supported()
    assert prepare.can_screen(plain(torch.zeros(shape)), spared) is (screens and here)
    assert not prepare.can_screen(prepare.GGMLTensor(prepare.SCREEN, torch.zeros(8, 10, dtype=torch.uint8)), 1)
