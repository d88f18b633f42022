"""Penalties in a verify window against plain token-by-token decoding."""

import types

import pytest
import torch

from sglang_step35.speculative.penalties import PenaltyRule, penalise
from sglang_step35.speculative.state import OutputCounts


def plain(logits, output, rule):
    """Penalise one row for the tokens of `output`, one at a time."""
    row = logits.clone()
    for token in set(output):
        row[token] -= rule.frequency * output.count(token) + rule.presence
        row[token] = row[token] * rule.repetition if row[token] < 0 else row[token] / rule.repetition
    return row


@pytest.mark.parametrize("rule", [PenaltyRule(0.5, 0.0, 1.0), PenaltyRule(0.3, 0.7, 1.4)])
def test_every_row_counts_the_drafts_before_it(rule):
    torch.manual_seed(1)
    output, drafts = [3, 3, 1], [1, 3, 4]
    logits = torch.randn(4, 6)
    counts = torch.bincount(torch.tensor(output), minlength=6).float()
    found = penalise(logits, counts, torch.tensor(drafts), rule)
    for row in range(4):
        torch.testing.assert_close(found[row], plain(logits[row], output + drafts[:row], rule))


def test_counts_restart_for_a_new_request_in_the_same_row():
    counts = OutputCounts(5, "cpu")
    first = types.SimpleNamespace(rid="a", output_ids=[1, 1])
    counts.begin(7, first)
    counts.add(7, first, torch.tensor([2, 3]), torch.tensor([True, False]))
    assert counts.of(7, first).tolist() == [0, 2, 1, 0, 0]
    second = types.SimpleNamespace(rid="b", output_ids=[4])
    assert counts.of(7, second).tolist() == [0, 0, 0, 0, 1]
    counts.forget_except(set())
    assert counts.of(7, second).tolist() == [0, 0, 0, 0, 1]
