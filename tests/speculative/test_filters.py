"""Partial selection against a whole sort of the vocabulary, done plainly in NumPy."""

import numpy as np
import pytest
import torch

from sglang_step35.speculative.filters import CANDIDATES, GROWTH, Filters

VOCAB = 2 * GROWTH * CANDIDATES + 321
ROWS = {  # scale of the logits, top_k, top_p, min_p
    "peaked": (4.0, 1 << 30, 0.95, 0.0),
    "more than the first look": (2.0, 1 << 30, 0.9, 0.0),
    "top_k": (1.0, 50, 1.0, 0.0),
    "top_k beyond the first look": (1.0, CANDIDATES + 7, 1.0, 0.0),
    "top_k at the edge of the first look": (1.0, CANDIDATES, 1.0, 0.0),
    "flat, nearly all stay": (0.01, 1 << 30, 0.97, 0.0),
    "flat, half of them stay": (0.01, 1 << 30, 0.5, 0.0),
    "min_p": (2.0, 1 << 30, 1.0, 0.1),
    "min_p keeps all": (0.001, 1 << 30, 1.0, 0.1),
    "all three": (2.0, 300, 0.8, 0.01),
    "nothing": (2.0, 1 << 30, 1.0, 0.0),
    "greedy": (2.0, 1, 1.0, 0.0),
}


def sorted_rule(probs: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row: sort all, keep by rank, mass before and share of the best; renormalise."""
    order = np.argsort(-probs, kind="stable")
    ordered = probs[order].astype(np.float64)
    before = np.cumsum(ordered) - ordered
    stays = (np.arange(len(probs)) < top_k) & ((before <= top_p) | (top_p == 1)) & (ordered >= ordered[0] * min_p)
    kept = np.zeros_like(ordered)
    kept[order] = ordered * stays
    return kept / kept.sum()


@pytest.fixture(scope="module")
def probs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([row[0] for row in ROWS.values()])[:, None]
    return (torch.randn(len(ROWS), VOCAB, generator=generator) * scales).softmax(-1)


def filters(*names: str) -> Filters:
    """All three, one row for each name."""
    _, top_ks, top_ps, min_ps = zip(*(ROWS[name] for name in names), strict=True)
    return Filters(torch.tensor(top_ks), torch.tensor(top_ps), torch.tensor(min_ps))


def test_a_batch_of_all_kinds(probs):
    found = filters(*ROWS).apply(probs)
    for row, name in enumerate(ROWS):
        wanted = sorted_rule(probs[row].numpy(), *ROWS[name][1:])
        np.testing.assert_allclose(found[row].numpy(), wanted, atol=1e-9, rtol=2e-4, err_msg=name)
        # Sums of float32 may move the edge of a set by a token of negligible mass.
        assert abs(int((found[row] > 0).sum()) - int((wanted > 0).sum())) <= 1, name


ALONE = [(0, "top_k"), (1, "peaked"), (1, "more than the first look"), (1, "flat, half of them stay"), (2, "min_p")]


@pytest.mark.parametrize("kind, name", ALONE)
def test_one_filter_alone(probs, kind, name):
    row = list(ROWS).index(name)
    fields = [None, None, None]
    fields[kind] = torch.tensor([ROWS[name][1 + kind]])
    found = Filters(*fields).apply(probs[row : row + 1])
    np.testing.assert_allclose(found[0].numpy(), sorted_rule(probs[row].numpy(), *ROWS[name][1:]), atol=1e-9, rtol=2e-4)


def test_without_filters_nothing_is_touched(probs):
    assert Filters().apply(probs) is probs


def test_equal_probabilities():
    found = Filters(top_ks=torch.tensor([3])).apply(torch.full((1, VOCAB), 1 / VOCAB))
    assert sorted(found[0].tolist())[-4:] == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_rows_of_a_request_share_its_filters(probs):
    repeated = filters("top_k", "peaked").repeat(2)
    assert repeated.top_ks.tolist() == [50, 50, 1 << 30, 1 << 30]
    assert repeated.min_ps.tolist() == [0.0] * 4


def test_a_row_without_any_possible_token_stays_undefined():
    """A grammar may forbid every token; the request ends, its neighbours go on."""
    rows = torch.stack([torch.full((2000,), float("nan")), torch.arange(1, 2001) / 2001000])
    found = Filters(top_ks=torch.tensor([5, 5])).apply(rows)
    assert found[0].isnan().all()
    assert (found[1] > 0).sum() == 5


def test_kernels_keep_the_same_tokens(probs, monkeypatch):
    """FlashInfer's kernels, here by what they are documented to do, give each set on its own."""

    def renormalised(rows, stays):
        kept = rows * stays
        return kept / kept.sum(-1, keepdim=True)

    def top_k_renorm_probs(rows, top_k):
        assert int(top_k.max()) <= VOCAB
        edges = [row.topk(int(k)).values[-1] for row, k in zip(rows, top_k, strict=True)]
        return renormalised(rows, rows >= torch.stack(edges)[:, None])

    def top_p_renorm_probs(rows, top_p):
        ordered, index = rows.double().sort(dim=-1, descending=True)
        stays = ordered.cumsum(-1) - ordered <= top_p[:, None]
        return renormalised(rows, torch.zeros_like(stays).scatter(-1, index, stays))

    monkeypatch.setattr("flashinfer.sampling.top_k_renorm_probs", top_k_renorm_probs)
    monkeypatch.setattr("flashinfer.sampling.top_p_renorm_probs", top_p_renorm_probs)
    rule = filters(*ROWS)
    on_cuda = rule._on_cuda(probs)
    torch.testing.assert_close(on_cuda / on_cuda.sum(-1, keepdim=True), rule.apply(probs), atol=1e-7, rtol=2e-4)
