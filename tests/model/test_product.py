"""Unquantised products and experts by ggml's kernels: the numbers, and which weights they take."""

import pytest
import torch

from sglang_step35.model import experts, product
from sglang_step35.packed import amx_rows, ik_check, ik_kernel, ik_rows, kernel
from tests.packed.test_ik_kernel import BF16, chosen_experts, error

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Row counts that went to ggml, without AMX. Every matrix from 4096 weights on is large."""
    torch.manual_seed(0)
    monkeypatch.setattr(amx_rows, "supported", lambda: False)
    for module in (product, experts):
        monkeypatch.setattr(module, "LARGE", 4096)
    found = []
    for name in ("linear", "experts"):
        run = getattr(ik_kernel, name)
        monkeypatch.setattr(ik_kernel, name, lambda x, *rest, run=run: found.append(len(x)) or run(x, *rest))
    return found


@pytest.fixture(params=[True, False], ids=["bfloat16 instructions", "none"])
def native(request, monkeypatch):
    for module in (kernel, experts):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: request.param)
    return request.param


def test_products(calls, native):
    weight = torch.randn(48, 96).bfloat16()
    for rows in (1, 64, 65):
        x = torch.randn(rows, 96).bfloat16()
        assert error(product.linear(x, weight), x.float() @ weight.float().T) < BF16
    assert calls == ([1, 64] if native else [1, 64, 65])


def test_what_stays_with_torch(calls):
    x = torch.randn(1, 64)
    product.linear(x, torch.randn(64, 64))  # float32
    product.linear(x.bfloat16(), torch.randn(63, 64).bfloat16())  # small
    assert calls == []


def test_experts_in_turn_are_grouped_ones():
    """To the bit, with rows that choose nobody."""
    w13, w2 = torch.randn(4, 128, 96).bfloat16() / 8, torch.randn(4, 96, 64).bfloat16() / 8
    for rows in (0, 1, 40):
        x, weights = torch.randn(rows, 96).bfloat16(), torch.rand(rows, 2)
        ids = torch.rand(rows, 4).topk(2).indices
        ids[: rows // 2, 1], ids[:1] = -1, -1
        found = [run(x, w13, w2, weights, ids, 0.7) for run in (experts.grouped_experts, experts.experts_in_turn)]
        assert torch.equal(*found)


@pytest.mark.parametrize(("most", "taken"), [(64, [1, 128]), (2, [1, 4])])
def test_experts(monkeypatch, calls, native, most, taken):
    """Torch with bfloat16 instructions takes over where an expert has more rows, on average, than we take."""
    monkeypatch.setattr(ik_rows, "ROWS", most)
    w13, w2 = torch.randn(4, 128, 96).bfloat16() / 8, torch.randn(4, 96, 64).bfloat16() / 8
    for rows in (*taken, taken[-1] + 1):
        x, weights = torch.randn(rows, 96).bfloat16(), torch.rand(rows, 2)
        ids = torch.rand(rows, 4).topk(2).indices
        ids[rows - 1, 0] = -1
        found = experts.run_experts(x, w13, w2, weights, ids, 0.7)
        wide = w13.float().chunk(2, dim=1)
        assert error(found, chosen_experts(x.float(), *wide, w2.float(), weights, ids, 0.7)) < 3 * BF16
    assert calls == (taken if native else [*taken, taken[-1] + 1])
