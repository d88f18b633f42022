"""Filters against SGLang's own PyTorch sampler rule written out plainly, and seeded coins."""

import torch

from sglang_step35.speculative.filters import Filters
from sglang_step35.speculative.sampling import SamplingRule, hashed_uniform


def plain_distribution(logits, temperature, top_k, top_p, min_p):
    """One row, in Python: sort, keep by rank, mass before, and share of the best; renormalise."""
    probs = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(len(probs)), key=lambda i: -probs[i].item())
    kept, mass = {}, 0.0
    for rank, token in enumerate(order):
        share = probs[token].item()
        if rank < top_k and mass <= top_p and share >= probs[order[0]].item() * min_p:
            kept[token] = share
        mass += share
    total = sum(kept.values())
    return torch.tensor([kept.get(i, 0.0) / total for i in range(len(probs))])


def test_filters_equal_the_plain_rule():
    torch.manual_seed(0)
    settings = [(0.7, 3, 1.0, 0.0), (1.3, 50, 0.6, 0.0), (1.0, 50, 1.0, 0.2), (0.9, 4, 0.8, 0.1)]
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*settings))
    rule = SamplingRule(
        temperatures=temperature[:, None],
        greedy=torch.zeros(4, dtype=torch.bool),
        filters=Filters(top_k, top_p, min_p),
    )
    logits = torch.randn(4, 2, 50) * 2
    found = rule.distribution(logits)
    for b, setting in enumerate(settings):
        for n in range(2):
            torch.testing.assert_close(
                found[b, n], plain_distribution(logits[b, n], *setting).float(), atol=1e-6, rtol=0
            )


def test_greedy_rows_are_one_hot():
    rule = SamplingRule(torch.tensor([[1.0], [1.0]]), torch.tensor([True, False]))
    logits = torch.tensor([[[0.0, 2.0, 1.0]], [[0.0, 2.0, 1.0]]])
    found = rule.distribution(logits)
    assert found[0, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(found[1], logits[1].softmax(-1))


def test_seeded_coins_depend_on_seed_position_and_stream_only():
    seeds, positions = torch.tensor([[1], [2]]), torch.tensor([[5, 6], [5, 6]])
    first = hashed_uniform(seeds, positions, 0)
    assert torch.equal(first, hashed_uniform(seeds, positions, 0))
    assert torch.equal(first[1:], hashed_uniform(seeds[1:], positions[1:], 0))
    assert len({x for stream in range(3) for x in hashed_uniform(seeds, positions, stream).flatten().tolist()}) == 12


def test_seeded_coins_are_uniform_and_uncorrelated():
    coins = hashed_uniform(torch.arange(100)[:, None], torch.arange(1000)[None], 1)
    assert coins.min() >= 0 and coins.max() < 1
    counts = torch.histc(coins, bins=20, min=0, max=1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # 19 degrees of freedom, p about 0.0007
    other = hashed_uniform(torch.arange(100)[:, None], torch.arange(1000)[None], 2)
    correlation = torch.corrcoef(torch.stack([coins.flatten(), other.flatten()]))[0, 1]
    assert correlation.abs() < 0.01
