"""Min-p beside seeds in SGLang's sampler in plain torch, which fails for both without us."""

import torch
from sglang.srt.plugins import load_plugins

DRAWS = 4000
PROBS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def counts(min_p: float, top_p: float, top_k: int) -> torch.Tensor:
    """How often each token is drawn, by as many seeds."""
    load_plugins()
    from sglang.srt.layers import sampler

    rows = torch.ones(DRAWS)
    tokens = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        PROBS.repeat(DRAWS, 1), (top_k * rows).int(), top_p * rows, min_p * rows, True, torch.arange(DRAWS),
        torch.full((DRAWS,), 7), return_filtered_probs=False, max_top_k=top_k,
    )  # fmt: skip
    return torch.bincount(tokens.long(), minlength=len(PROBS))


def check(found: torch.Tensor, kept: list[int]) -> None:
    """Only these tokens, in proportion: within five standard deviations."""
    expected = torch.zeros(len(PROBS))
    expected[kept] = PROBS[kept] / PROBS[kept].sum() * DRAWS
    assert ((found - expected).abs() <= 5 * expected.sqrt()).all(), (found, expected)


def test_min_p_keeps_what_is_likely_enough_beside_the_best():
    check(counts(min_p=0.35, top_p=1.0, top_k=5), [0, 1, 2])
    check(counts(min_p=0.0, top_p=1.0, top_k=5), [0, 1, 2, 3, 4])


def test_top_k_and_top_p_hold_beside_it():
    check(counts(min_p=0.2, top_p=0.6, top_k=5), [0, 1])
    check(counts(min_p=0.2, top_p=1.0, top_k=3), [0, 1, 2])


def test_a_seed_draws_the_same_again():
    assert counts(0.35, 1.0, 5).tolist() == counts(0.35, 1.0, 5).tolist()
