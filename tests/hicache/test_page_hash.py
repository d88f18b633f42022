"""Hashes of pages under look-ahead against plain tuples of the tokens that a page's KV depends on."""

import itertools
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.utils import get_storage_hash_str

from sglang_step35.hicache.page_hash import page_hashes
from sglang_step35.speculative.prefix_key import LookaheadKey

TOKENS = st.lists(st.integers(0, 2), max_size=14)
PAGE = 3


def key(tokens, lookahead):
    return LookaheadKey(array("q", tokens), None, lookahead).page_aligned(PAGE)


def hashes(tokens, lookahead, prior=None):
    return page_hashes(None, key(tokens, lookahead), prior, PAGE)


def depends_on(tokens, lookahead):
    """For each whole page, all tokens that the KV up to its end was computed from."""
    pages = max(0, len(tokens) - lookahead) // PAGE
    return [tuple(tokens[: (page + 1) * PAGE + lookahead]) for page in range(pages)]


@settings(max_examples=300, deadline=None)
@given(TOKENS, TOKENS, st.integers(2, 3))
def test_pages_are_equal_exactly_when_all_tokens_they_depend_on_are(first, second, lookahead):
    a, b = hashes(first, lookahead), hashes(second, lookahead)
    wanted = [x == y for x, y in zip(depends_on(first, lookahead), depends_on(second, lookahead))]
    assert [x == y for x, y in zip(a, b)] == wanted
    assert len(a) == len(depends_on(first, lookahead))


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.integers(2, 3), st.integers(0, 4))
def test_a_split_key_gives_the_same_hashes(tokens, lookahead, page):
    whole = key(tokens, lookahead)
    cut = min(page * PAGE, len(whole))
    head = page_hashes(None, whole[:cut], None, PAGE)
    tail = page_hashes(None, whole[cut:], head[-1] if head else None, PAGE)
    assert head + tail == page_hashes(None, whole, None, PAGE)


def test_depths_and_namespaces_share_nothing():
    tokens = list(range(20))
    found = [hashes(tokens, 2), hashes(tokens, 3), hashes(tokens, 3, prior="00" * 32)]
    salted = LookaheadKey(array("q", tokens), None, 3, cache_salt="salt").page_aligned(PAGE)
    found.append(get_storage_hash_str(salted, page_size=PAGE))  # SGLang's, through the hook
    for one, other in itertools.combinations(found, 2):
        assert not set(one) & set(other)


@pytest.mark.parametrize("plain", [[1, 2, 3], LookaheadKey(array("q", [1, 2, 3]), None, True)])
def test_what_looks_ahead_one_token_or_none_is_left_to_sglang(plain):
    assert page_hashes(lambda *args: args, plain, "ab", 2) == (plain, "ab", 2)
