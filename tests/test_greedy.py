"""The script that compares a million greedy tokens: it notices a wrong one, and goes on where it was."""

import json

import pytest

from scripts.benchmarks.greedy import Case, Progress, batch, compare, load, save
from tests.support.nano_model import greedy, prompts

IDS, COUNT = tuple(prompts()[0]), 12


def answer(output: list[int]) -> dict:
    meta = {"spec_verify_ct": 5, "cached_tokens": 0, "finish_reason": {"type": "length"}}
    return {"output_ids": output, "meta_info": meta}


def test_greedy_tokens_are_right_and_another_is_wrong():
    case, right = Case(list(IDS), COUNT), greedy(IDS, COUNT)
    progress = Progress(seed=0)
    compare(progress, [case], [answer(right)])
    assert (progress.tokens, progress.ties, progress.wrong) == (COUNT, 0, [])
    compare(progress, [case, case], [answer(right), answer([*right[:-1], (right[-1] + 1) % 1000])])
    assert (progress.batches, progress.requests, progress.tokens) == (2, 3, 3 * COUNT)
    assert progress.wrong == [[1, 1, COUNT - 1]]


def test_an_answer_cut_short_is_no_success():
    with pytest.raises(AssertionError, match="batch 0, request 0"):
        compare(Progress(seed=0), [Case(list(IDS), COUNT)], [answer(greedy(IDS, COUNT - 1))])


def test_progress_is_kept_and_belongs_to_its_seed(tmp_path):
    state = tmp_path / "state.json"
    assert load(state, 3) == Progress(seed=3)
    progress = Progress(seed=3, batches=2, tokens=70, wrong=[[1, 0, 4]])
    save(state, progress)
    assert load(state, 3) == progress and json.loads(state.read_text())["tokens"] == 70
    with pytest.raises(ValueError, match="--seed 3"):
        load(state, 4)


def test_batches_are_the_same_again_and_mixed():
    assert batch(0, 7) == batch(0, 7) != batch(1, 7)
    cases = [case for number in range(40) for case in batch(0, number)]
    assert {len(case.ids) for case in cases} >= {1, 64, 65, 1200} and {case.count for case in cases} >= {16, 400}
