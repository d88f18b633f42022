"""mask.py: packed rows against sets of tokens."""

import numpy as np
import pytest
import torch

from sglang_step35.guards import mask

V = 70  # no multiple of 32


def allowed(row: torch.Tensor) -> set[int]:
    return {v for v in range(V) if row[v // 32].item() >> (v % 32) & 1}


@pytest.mark.parametrize("token", [0, 31, 32, 63, 69])
def test_only_one_and_all_but_one(token):
    everything = set(range(V))
    assert allowed(mask.only(token, mask.words(V))) == {token}
    assert allowed(mask.all_but({token, 5}, mask.words(V))) == everything - {token, 5}


def test_forbidden_tokens_as_words():
    forbidden = np.random.default_rng(0).random(V) < 0.5
    assert allowed(mask.allowing(forbidden)) == set(np.flatnonzero(~forbidden).tolist())


def test_rules_narrow_a_row_but_never_leave_it_empty():
    row = mask.only(7, mask.words(V)) | mask.only(64, mask.words(V))
    assert mask.narrow(row, mask.all_but({7}, mask.words(V))) and allowed(row) == {64}
    assert not mask.narrow(row, mask.only(7, mask.words(V))) and allowed(row) == {64}
