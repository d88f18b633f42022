"""loops.py: periods of a text's end against a comparison of the whole text."""

import random

import pytest

from sglang_step35.guards.loops import Repetition, Tokens
from sglang_step35.guards.settings import LoopGuard
from tests.support.plain_guards import repeated


def texts():
    """Random texts of few letters, some of which repeat a part of themselves."""
    chance = random.Random(5)
    for letters in (1, 2, 3):
        for _ in range(12):
            text = [chance.randrange(letters) for _ in range(chance.randrange(1, 40))]
            yield text + text[-chance.randrange(1, 12) :] * chance.randrange(1, 5) + text[:3]


@pytest.mark.parametrize("guard", [LoopGuard(1, 2, 6), LoopGuard(3, 3, 3), LoopGuard(4, 3, 15), LoopGuard(2, 4, 40)])
def test_periods_are_those_of_the_whole_text(guard):
    rule, hits = Repetition(guard), 0
    for letters in texts():
        text, runs = Tokens(), rule.start()
        for i, token in enumerate(letters):
            runs = rule.after(runs, text, token)
            text.append(token)
            wanted = repeated(letters[: i + 1], guard.tokens, guard.times, guard.longest)
            assert rule.periods(runs) == wanted, letters[: i + 1]
            hits += bool(wanted)
    assert hits > 50


def test_a_text_grows_and_is_taken_back():
    text = Tokens()
    for i in range(5000):
        text.append(i)
        if i % 7 == 6:
            text.cut(3)
            for j in range(i - 2, i + 1):
                text.append(j)
    assert text.length == 5000 and text.back(1, 3).tolist() == [4999, 4998, 4997]
    assert text.back(4999, 6000).tolist() == [1, 0] and text.back(5001, 6000).tolist() == []
