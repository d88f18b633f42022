"""What a request's own text foretells, against a brute-force search, and the record of what came true."""

import random
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_step35.speculative.lookup import NGRAM, REACH, LookUps, NGramIndex, RequestText
from tests.support.plain_lookup import continuation

# Few different tokens, so that everything occurs again; and pieces repeated, so that long matches do.
TOKENS = st.integers(0, 2)
PIECES = st.lists(st.lists(TOKENS, min_size=1, max_size=40), min_size=1, max_size=4).flatmap(
    lambda pieces: st.lists(st.sampled_from(pieces), max_size=9)
)


@settings(max_examples=400, deadline=None)
@given(PIECES, st.lists(TOKENS, max_size=4), st.integers(0, 12), st.data())
def test_continuations_are_those_of_a_brute_force_search(pieces, drafts, count, data):
    text = [token for piece in pieces for token in piece]
    cut = data.draw(st.integers(0, len(text)))
    index = NGramIndex(text[:cut])
    for token in text[cut:]:  # in any portions
        index.extend([token])
    assert index.continuation(drafts, count) == continuation(text, drafts, count)
    assert index.tokens.tolist() == text


def test_the_longest_occurrence_counts_and_of_equal_ones_the_latest():
    short, long = [7, 1, 2, 3, 4, 5], [6, 9, 1, 2, 3, 4, 5]
    text = [*long, 100, *short, 200, *short, 300, 9, 1, 2]
    assert NGramIndex(text).continuation([3, 4, 5], 2) == [100, 7]
    assert NGramIndex([*text[:-3], 8, 1, 2]).continuation([3, 4, 5], 1) == [300]


def test_a_period_goes_on_beyond_the_text():
    assert NGramIndex([1, 2, 3] * 4).continuation([1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert NGramIndex([4] * NGRAM).continuation([4], 3) == [4, 4, 4]


@pytest.mark.parametrize("text, drafts", [([], []), ([1] * (NGRAM - 1), []), (list(range(50)), [7]), ([5], [5] * 9)])
def test_what_has_not_occurred_foretells_nothing(text, drafts):
    assert NGramIndex(text).continuation(drafts, 8) == []


def test_cost_does_not_grow_with_the_text():
    """Every look-up compares OCCURRENCES x REACH tokens at most: the worst text is one token, over and over."""

    def seconds(length: int) -> float:
        index = NGramIndex([3] * (length - REACH) + [1] + [3] * (REACH - 1))
        start = time.process_time()
        for _ in range(300):
            index.continuation([3, 3, 3], 8)
            index.extend([3])
        return time.process_time() - start

    assert min(seconds(200_000) for _ in range(3)) < 5 * min(seconds(2_000) for _ in range(3))


def test_memory_of_a_token():
    chance = random.Random(0)
    text = [chance.randrange(128_896) for _ in range(50_000)]
    tracemalloc.start()
    index = NGramIndex(text)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / len(index) < 256


# The record.


def echo(length: int) -> RequestText:
    return RequestText("a", NGramIndex([*range(length), 0, 1, 2, 3, 4]))


def test_hope_follows_what_came_true_whether_offered_or_not():
    """One request repeats its prompt, one goes another way each time; neither was ever offered anything."""
    true, false, position = echo(200), echo(200), 5
    start = true.hope(8)
    for turn in range(20):
        chain = [position, position + 1, position + 2]
        assert true.look_up(chain, 8) == list(range(position + 3, position + 11))
        true.add([*chain, position + 3])
        position += 4
        false.look_up([5, 6, 7], 8)
        false.add([5, 6, 7, 1000 + turn, 0, 1, 2, 3, 4])
    assert true.hope(8) > 6 > start > 0.3 > false.hope(8)


def test_wrong_drafts_before_count_against_the_chain_not_against_what_was_looked_up():
    text = echo(50)
    chain, further = text.chain.table(), text.further.table()
    text.look_up([5, 6, 7], 4)
    text.add([5, 6, 99])
    assert text.chain.table() < chain and text.further.table() == further


def test_texts_follow_their_requests():
    texts = LookUps(6)
    texts.begin(3, "a", list(range(20)))
    texts.add([3, 5], [[0, 1, 2, 9], [7, 7, 7, 7]], [3, 1])
    assert texts.find([3, 5], [[3, 4], [3, 4]])[0] == [[5, 6, 7, 8], []]
    assert texts.find([3], [None]) == ([[]], 0.0)
    texts.begin(3, "a", [*range(20), 0, 1, 2, 3])  # prefilled again after a retraction, one token later
    assert texts.find([3], [[4]])[0] == [[5, 6, 7, 8, 9]]
    texts.begin(3, "a", list(range(100, 120)))  # the name again, for another prompt
    assert texts.find([3], [[3, 4]])[0] == [[]]
    texts.begin(3, "b", [*range(20), 0, 1, 2, 3, 4])  # the index again, for another request
    assert texts.find([3], [[]])[0] == [[5, 6, 7, 8, 9, 10]]
    texts.keep([1])
    assert texts.find([3], [[3, 4]])[0] == [[]]
