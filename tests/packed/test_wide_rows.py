"""Products by torch with unpacked weights, against float32 ones of activations and weights rounded to bfloat16."""

import pytest
import torch

from sglang_step35.packed import amx_rows, ik_check, ik_kernel, kernel, prepare, wide_rows
from sglang_step35.packed.prepare import prepared
from tests.packed.test_amx import error, rounded, weights
from tests.packed.test_unpack import packed

ROUNDED = 3e-3  # the result, to bfloat16

pytestmark = pytest.mark.skipif(not (ik_check.usable() and amx_rows.supported()), reason="without library or AMX")


@pytest.fixture(autouse=True)
def made(monkeypatch, roomy):
    """Rows of the matrices that torch multiplied by."""
    torch.manual_seed(0)
    found, product = [], torch.mm
    seen = lambda x, other, out: found.append(other.shape[1]) or product(x, other, out=out)
    monkeypatch.setattr(wide_rows.torch, "mm", seen)
    return found


@pytest.mark.parametrize("name", prepare.INTERLEAVED)
@pytest.mark.parametrize("rows", [512, 513, 515])
def test_products(made, threads, monkeypatch, name, rows):
    """64 rows of weights at a time: whole blocks, eight rows behind them, sixteen rows, twenty-four."""
    monkeypatch.setattr(wide_rows, "AT_ONCE", 64 * 512)
    sizes = [128, 136, 16, 24]
    parts, meanings = zip(*(weights(name, size, 512, seed=seed) for seed, size in enumerate(sizes)))
    x = torch.randn(rows, 512).bfloat16()
    found = kernel.linear(x, parts)
    assert found.dtype is torch.bfloat16
    for part, meaning in zip(found.float().split(sizes, 1), meanings):
        assert error(part, x.float() @ meaning.T) < ROUNDED
    assert made == [64, 64, 64, 72, 16, 24]


@pytest.mark.parametrize("name", prepare.INTERLEAVED)
def test_weights_are_those_of_the_kernel_for_fewer_rows(name):
    """One weight for each row of activations: nothing is summed."""
    part, x = weights(name, 48, 512)[0], torch.eye(512).bfloat16()
    assert torch.equal(kernel.linear(x, [part]), ik_kernel.linear(x, [part]))


def test_parts_of_several_types(made):
    """In one product where all go by torch, else one after the other: eight rows are too few, Q4_1 is the wheel's."""
    x = torch.randn(512, 256).bfloat16()
    kinds = ("Q4_K", 32), ("BF16", 8), ("Q6_K", 16), ("Q4_K", 8), ("Q4_1", 16)
    pairs = [weights("BF16", 8, 256) if name == "BF16" else packed(name, rows, 256) for name, rows in kinds]
    parts, meanings = [prepared(part) for part, _ in pairs], torch.cat([meaning for _, meaning in pairs])
    for count in (3, 5):
        made.clear()
        found = kernel.linear(x, parts[:count])
        expected = rounded(x.float()) @ meanings[: found.shape[1]].T
        assert error(found.float(), expected) < 2 * ROUNDED
        assert made == [32, 8, 16]


def test_fewer_rows_are_multiplied_elsewhere(made):
    part = weights("Q4_0", 32, 256)[0]
    kernel.linear(torch.randn(511, 256).bfloat16(), [part])
    assert made == []
