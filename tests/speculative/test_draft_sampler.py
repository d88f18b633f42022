"""Drafts of one pass: how they are drawn, what is kept of them, and what the scheduler relays."""

import pytest
import torch

from sglang_step35.speculative.acceptance import NO_DRAFT
from sglang_step35.speculative.device import greedy_choice
from sglang_step35.speculative.draft_sampler import FIRST_DRAFT_STREAM, DraftSampler
from tests.support.nano_model import chi_square
from tests.support.toy_requests import ToyRequest, sample, sampling_info

VOCAB, STEPS = 5, 3


class StopAfter:
    """A stop rule that ends a pass after a number of layers and records what it is told."""

    def __init__(self, layers):
        self.layers, self.told = layers, []

    def stops(self, confidences):
        self.told.append([list(row) for row in confidences])
        return len(confidences) >= self.layers


def request(temperature=0.0, seed=0):
    return ToyRequest(rid="r", origin_input_ids=[0], pool_idx=0, temperature=temperature, seed=seed)


def sampler(requests, positions, stop_rule=None, **changes):
    info = sampling_info(requests, **changes)
    return DraftSampler(info, torch.tensor(positions), num_steps=STEPS, stop_rule=stop_rule)


def logits_of(count, seed=0):
    """[STEPS, count, VOCAB]."""
    return 2 * torch.randn(STEPS, count, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_greedy_requests_draft_the_most_likely_token_and_keep_no_distribution():
    logits = logits_of(2)
    made = sampler([request(), request()], [4, 9])
    for layer in range(STEPS):
        assert made(layer, logits[layer]).tolist() == logits[layer].argmax(-1).tolist()
    assert made.probs == [] and made.confidences == [] and not made.done


def test_a_sampled_draft_is_what_its_seed_position_and_layer_say_in_any_batch():
    requests = [request(0.7, seed=3), request(), request(1.5, seed=8)]
    positions, logits = [11, 5, 20], logits_of(3)
    together = sampler(requests, positions)
    found = torch.stack([together(layer, logits[layer]) for layer in range(STEPS)]).tolist()
    for order in ([2, 0, 1], [0], [2, 1]):
        made = sampler([requests[b] for b in order], [positions[b] for b in order])
        for layer in range(STEPS):
            assert made(layer, logits[layer, order]).tolist() == [found[layer][b] for b in order]
    for layer in range(STEPS):
        assert found[layer][1] == logits[layer, 1].argmax()
        for b in (0, 2):
            chances = (logits[layer, b] / requests[b].temperature).softmax(-1)
            assert found[layer][b] == sample(chances, requests[b].coin(positions[b], FIRST_DRAFT_STREAM + layer))


def test_the_kept_distributions_are_those_the_drafts_were_drawn_from():
    requests, logits = [request(0.7), request(1.5), request()], logits_of(3)
    made = sampler(requests, [1, 2, 3], need_top_k_sampling=True, top_ks=torch.tensor([2, 3, 1]))
    drafts = [made(layer, logits[layer]) for layer in range(STEPS)]
    assert len(made.probs) == STEPS
    for layer in range(STEPS):
        for b, (count, temperature) in enumerate([(2, 0.7), (3, 1.5), (1, 1.0)]):
            best = (logits[layer, b] / temperature).topk(count)
            expected = torch.zeros(VOCAB).scatter(0, best.indices, best.values.softmax(-1))
            torch.testing.assert_close(made.probs[layer][b], expected)
            assert expected[drafts[layer][b]] > 0


def test_sampled_chains_follow_the_product_of_the_layers_distributions():
    """Unseeded requests; every layer's logits depend on the draft before it. Against all V^3 chains."""
    samples = 20_000
    tables = logits_of(VOCAB, seed=1)  # [layer, draft before, V]
    requests = [request(0.9)] * samples
    made = sampler(requests, list(range(samples)), sampling_seed=None)
    chains, last = [], torch.zeros(samples, dtype=torch.int64)
    for layer in range(STEPS):
        last = made(layer, tables[layer][last])
        chains.append(last)
    chances = (tables / 0.9).softmax(-1)
    expected = {
        (a, b, c): float(chances[0, 0, a] * chances[1, a, b] * chances[2, b, c])
        for a in range(VOCAB)
        for b in range(VOCAB)
        for c in range(VOCAB)
    }
    statistic, limit = chi_square([tuple(row) for row in torch.stack(chains, 1).tolist()], expected)
    assert statistic < limit


def test_layers_of_seeded_requests_draw_independently():
    """Seeds count as samples: a coin shared by two layers would show in the joint distribution."""
    samples = 20_000
    requests = [request(1.0, seed=seed) for seed in range(samples)]
    made = sampler(requests, [7] * samples)
    flat = torch.zeros(samples, VOCAB)
    pairs = torch.stack([made(layer, flat) for layer in range(2)], 1).tolist()
    expected = {(a, b): 1 / VOCAB**2 for a in range(VOCAB) for b in range(VOCAB)}
    statistic, limit = chi_square([tuple(pair) for pair in pairs], expected)
    assert statistic < limit


def test_a_pass_is_done_when_the_rule_says_so_from_the_drafts_own_probabilities():
    requests, logits, rule = [request(), request(0.5, seed=1)], logits_of(2), StopAfter(2)
    made, told = sampler(requests, [1, 2], rule), []
    for layer in range(2):
        drafts = made(layer, logits[layer])
        # Among sampling requests a greedy one's distribution is one-hot: its draft is certain.
        chance = (logits[layer, 1] / 0.5).softmax(-1)[drafts[1]].item()
        told.append([1.0, chance])
        assert made.done == (layer == 1)
    torch.testing.assert_close(torch.tensor(rule.told[-1]), torch.tensor(told))


def test_confidence_of_a_greedy_batch_is_the_layers_probability():
    logits, rule = logits_of(2), StopAfter(9)
    made = sampler([request(), request()], [1, 2], rule)
    made(0, logits[0])
    torch.testing.assert_close(torch.tensor(made.confidences[0]), logits[0].softmax(-1).max(-1).values)


def test_the_relay_fills_what_was_not_drafted_with_no_draft():
    logits, bonus = logits_of(2), torch.tensor([3, 4])
    for count in range(STEPS + 1):
        made = sampler([request(), request()], [1, 2])
        drafts = [made(layer, logits[layer]).tolist() for layer in range(count)]
        relayed = made.draft_input(bonus)
        assert relayed.topk_index.tolist() == [
            [drafts[i][b] if i < count else NO_DRAFT for i in range(STEPS)] for b in range(2)
        ]
        assert relayed.topk_index.dtype == torch.int64 and relayed.topk_p.shape == (2, STEPS)
        assert relayed.bonus_tokens.tolist() == [3, 4] and relayed.draft_probs is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_greedy_choice_is_torchs(dtype):
    """Of equal ones the first; few values in so many columns are often equal."""
    logits = torch.randint(0, 50, (3, 4, 200)).to(dtype)
    assert torch.equal(greedy_choice(logits), logits.argmax(-1))
