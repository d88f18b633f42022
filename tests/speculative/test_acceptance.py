"""Losslessness of the acceptance rules against exact enumeration on a small vocabulary."""

import itertools

import pytest
import torch

from sglang_step35.speculative.acceptance import accept_greedy, accept_sampled, inverse_cdf, propose_surely

VOCAB, DRAFTS, SAMPLES = 5, 3, 200_000


def random_tables(seed):
    """Target and draft next-token tables [V, V]: row = last token, a first-order Markov model."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(2 * torch.randn(VOCAB, VOCAB, generator=generator), -1)
    q = torch.softmax(2 * torch.randn(VOCAB, VOCAB, generator=generator), -1)
    p[:, 1] = 0  # a token the target never emits but the draft does
    return p / p.sum(-1, keepdim=True), q


def draw(weights, generator):
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1)


def run_rounds(p, q, *, greedy_drafts, seed, rule=accept_sampled):
    """Sequences [SAMPLES, DRAFTS + 1] from token 0: speculative rounds, then plain sampling."""
    generator = torch.Generator().manual_seed(seed)
    last, drafts = torch.zeros(SAMPLES, dtype=torch.long), []
    for _ in range(DRAFTS):
        last = q[last].argmax(-1) if greedy_drafts else draw(q[last], generator)
        drafts.append(last)
    drafts = torch.stack(drafts, 1)
    context = torch.cat([torch.zeros(SAMPLES, 1, dtype=torch.long), drafts], 1)
    coins = torch.rand(SAMPLES, DRAFTS, generator=generator, dtype=torch.float64)
    final = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
    proposal = q[context[:, :-1]]
    if greedy_drafts:
        propose_surely(proposal, drafts, torch.zeros(SAMPLES))
    tokens, lengths = rule(drafts, p[context], proposal, coins, final)
    for column in range(1, DRAFTS + 1):  # continue what the round did not reach
        plain = draw(p[tokens[:, column - 1]], generator)
        tokens[:, column] = torch.where(lengths > column, tokens[:, column], plain)
    return tokens


def exact_distribution(p):
    """Probability of every token sequence of length DRAFTS + 1 from token 0."""
    table = torch.zeros([VOCAB] * (DRAFTS + 1))
    for sequence in itertools.product(range(VOCAB), repeat=DRAFTS + 1):
        chain = (0, *sequence)
        table[sequence] = torch.tensor([p[a, b] for a, b in itertools.pairwise(chain)]).prod()
    return table.flatten()


def chi_square(tokens, expected):
    """Pearson statistic per degree of freedom over the cells expected at least 10 times."""
    powers = VOCAB ** torch.arange(DRAFTS, -1, -1)
    counts = torch.bincount((tokens * powers).sum(1), minlength=len(expected)).double()
    expected = expected.double() * SAMPLES
    assert counts[expected == 0].sum() == 0
    cells = expected >= 10
    return (((counts - expected) ** 2 / expected)[cells].sum() / (cells.sum() - 1)).item()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("greedy_drafts", [False, True])
def test_sampled_output_follows_the_target(seed, greedy_drafts):
    p, q = random_tables(seed)
    tokens = run_rounds(p, q, greedy_drafts=greedy_drafts, seed=seed)
    assert chi_square(tokens, exact_distribution(p)) < 1.3


@pytest.mark.parametrize("first", [0, 1, 2])
def test_looked_up_drafts_after_sampled_ones_leave_the_target_alone(first):
    """From column `first` on every draft follows from the tokens before it, and its proposal is one-hot."""
    p, q = random_tables(first)

    def looked_up(drafts, target, proposal, coins, final):
        drafts, target = drafts.clone(), target.clone()
        for column in range(first, DRAFTS):
            before = drafts[:, column - 1] if column else torch.zeros_like(final, dtype=torch.long)
            drafts[:, column] = (before * 2 + column) % VOCAB
            target[:, column + 1] = p[drafts[:, column]]
        propose_surely(proposal, drafts, torch.full((SAMPLES,), first))
        return accept_sampled(drafts, target, proposal, coins, final)

    tokens = run_rounds(p, q, greedy_drafts=False, seed=first, rule=looked_up)
    assert chi_square(tokens, exact_distribution(p)) < 1.3


def one_by_one(drafts, target, proposal, coins, final):
    """Every draft judged on its own, Leviathan et al. 2023."""
    index = drafts.unsqueeze(-1)
    ratio = (target[:, :-1].gather(-1, index) / proposal.gather(-1, index)).squeeze(-1)
    return drafts, (coins < ratio).long().cumprod(1).sum(1) + 1


def test_more_drafts_are_accepted_than_one_by_one():
    """The example of Sun et al. 2024, section 3: 11 of 9 drafts, one by one 10."""
    p, q = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2 / 3, 1 / 3])
    generator = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(q, 2 * SAMPLES, replacement=True, generator=generator).view(SAMPLES, 2)
    coins = torch.rand(SAMPLES, 3, generator=generator, dtype=torch.float64)
    tables = p.expand(SAMPLES, 3, 2), q.expand(SAMPLES, 2, 2)
    for rule, expected in ((accept_sampled, 11 / 9), (one_by_one, 10 / 9)):
        _, lengths = rule(drafts, *tables, coins[:, 1:], coins[:, 0])
        assert (lengths - 1).double().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_chain_may_end_where_its_drafts_say(seed):
    """As the layers stop behind a draft that they hardly believe in."""
    p, q = random_tables(seed)

    def stopping(drafts, target, proposal, coins, final):
        ends = (drafts == 2) | (drafts == 3)
        drafts = drafts.masked_fill(ends.long().cumsum(1) - ends.long() > 0, -1)
        return accept_sampled(drafts, target, proposal, coins, final)

    tokens = run_rounds(p, q, greedy_drafts=False, seed=seed, rule=stopping)
    assert chi_square(tokens, exact_distribution(p)) < 1.3


def wrong_rule(drafts, target, proposal, coins, final):
    """Resamples from p instead of the residual: the classic mistake."""
    kept = one_by_one(drafts, target, proposal, coins, final)[1] - 1
    rows = torch.arange(len(kept))
    tokens = torch.cat([drafts, torch.zeros(len(drafts), 1, dtype=torch.long)], 1)
    tokens[rows, kept] = inverse_cdf(target[rows, kept], final)
    return tokens, kept + 1


def test_a_wrong_rule_is_noticed():
    p, q = random_tables(0)
    tokens = run_rounds(p, q, greedy_drafts=False, seed=0, rule=wrong_rule)
    assert chi_square(tokens, exact_distribution(p)) > 3


def test_greedy_accepts_up_to_the_first_difference():
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3], [-1, -1, -1]])
    target = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    tokens, lengths = accept_greedy(drafts, target)
    assert lengths.tolist() == [4, 2, 1, 1]
    assert tokens[0].tolist() == [1, 2, 3, 4]


def test_no_draft_is_never_accepted_and_samples_from_the_target():
    target = torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]).expand(1000, 2, 2)
    drafts = torch.full((1000, 1), -1)
    coins = torch.zeros(1000, 1)
    final = torch.arange(1000) / 1000
    tokens, lengths = accept_sampled(drafts, target, torch.zeros(1000, 1, 2), coins, final)
    assert lengths.eq(1).all()
    assert (tokens[:, 0] == 1).sum() == 750


def test_greedy_requests_among_sampled_ones_stay_greedy():
    one_hot = torch.eye(4)[torch.tensor([2, 3])][None]
    drafts = torch.tensor([[2]])
    proposal = torch.eye(4)[torch.tensor([2])][None]
    tokens, lengths = accept_sampled(drafts, one_hot, proposal, torch.tensor([[0.999]]), torch.tensor([0.999]))
    assert (tokens.tolist(), lengths.tolist()) == ([[2, 3]], [2])


def test_inverse_cdf_never_returns_an_impossible_token():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(3, 5)
    picks = inverse_cdf(weights, torch.tensor([0.0, 0.5, 1.0 - 1e-12], dtype=torch.float64))
    assert picks.tolist() == [1, 3, 3]


def test_a_distribution_without_any_token_still_gives_a_valid_id():
    """What softmax makes of logits that a grammar has masked completely."""
    nothing = torch.full((2, 5), float("-inf")).softmax(-1)
    assert (inverse_cdf(nothing, torch.tensor([0.0, 0.9])) < 5).all()
