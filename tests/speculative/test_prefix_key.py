"""Lookahead keys against plain tuples of (lookahead + 1)-grams."""

from array import array
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_step35.speculative.prefix_key import LookaheadKey, cap_insert, set_lag

TOKENS = st.lists(st.integers(0, 2), max_size=14)
LOOKAHEAD = st.integers(1, 3)


def grams(tokens, lookahead):
    """The units of a key: at t the tokens t .. t + lookahead."""
    return [tuple(tokens[t : t + lookahead + 1]) for t in range(len(tokens) - lookahead)]


def key(tokens, lookahead):
    return LookaheadKey(array("q", tokens), None, lookahead)


def shared(a, b):
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


@settings(max_examples=300, deadline=None)
@given(TOKENS, LOOKAHEAD, st.data())
def test_length_iteration_and_slices(tokens, lookahead, data):
    units = grams(tokens, lookahead)
    found = key(tokens, lookahead)
    assert len(found) == len(units)
    assert list(found) == units
    start = data.draw(st.integers(0, len(units)))
    stop = data.draw(st.integers(0, len(units)))
    assert list(found[start:stop]) == units[start:stop]


@settings(max_examples=500, deadline=None)
@given(TOKENS, TOKENS, LOOKAHEAD, st.integers(1, 3), st.data())
def test_match_counts_equal_units_from_an_offset(first, second, lookahead, page, data):
    a, b = grams(first, lookahead), grams(second, lookahead)
    offset = data.draw(st.integers(0, len(b)))
    found = key(first, lookahead).match_at(key(second, lookahead), offset, page)
    assert found == shared(a, b[offset:]) // page * page, (found, a, b)


@settings(max_examples=300, deadline=None)
@given(TOKENS, TOKENS, LOOKAHEAD, st.integers(1, 3))
def test_child_keys_are_equal_exactly_when_the_page_of_units_is(first, second, lookahead, page):
    a, b = grams(first, lookahead), grams(second, lookahead)
    if len(a) < page or len(b) < page:
        return
    same = key(first, lookahead).child_key(page) == key(second, lookahead).child_key(page)
    assert same == (a[:page] == b[:page])


@pytest.mark.parametrize("flag", [False, True])
def test_stock_kinds_behave_as_in_the_base_class(flag):
    tokens = array("q", [5, 6, 7, 8])
    ours, stock = LookaheadKey(tokens, "x", flag), RadixKey(tokens, "x", flag)
    assert len(ours) == len(stock)
    assert list(ours) == list(stock)
    assert list(ours[1:3]) == list(stock[1:3])
    assert ours.child_key(2) == stock.child_key(2)
    assert ours.match(LookaheadKey(array("q", [5, 6, 7, 9]), "x", flag)) == stock.match(
        RadixKey(array("q", [5, 6, 7, 9]), "x", flag)
    )


def test_namespaces_are_kept():
    salted = LookaheadKey(array("q", [1, 2, 3, 4]), "lora", 3, cache_salt="s")
    assert salted[0:1].extra_key == "lora" and salted[0:1].cache_salt == "s"
    with pytest.raises(ValueError, match="extra_key"):
        salted.match(LookaheadKey(array("q", [1, 2, 3, 4]), None, 3))


class Pool:
    """Stands for SGLang's request pool."""


def capped(up_to, lag=None):
    """Tokens inserted of a request whose prefix of 33 rows came from the cache, with S = 3."""
    pool = Pool()
    if lag is not None:
        set_lag(pool, [0, 0, lag].__getitem__)
    cache = SimpleNamespace(tree_core=SimpleNamespace(is_eagle=3), req_to_token_pool=pool)
    req = SimpleNamespace(kv=SimpleNamespace(cache_protected_len=33, req_pool_idx=2))
    arguments, options = cap_insert(cache, req, up_to=up_to, extra=1)
    assert arguments == (cache, req) and options == {"up_to": options["up_to"], "extra": 1}
    return options["up_to"]


@pytest.mark.parametrize("up_to, inserted", [(33, 0), (35, 0), (36, 36), (50, 50)])
def test_an_insert_never_covers_less_than_the_cached_prefix(up_to, inserted):
    """A prefix of 33 rows was matched with 36 tokens; a chunk may end before the 36th."""
    assert capped(up_to) == capped(up_to, lag=0) == inserted


@pytest.mark.parametrize("lag, inserted", [(1, 49), (14, 36), (15, 0), (60, 0)])
def test_an_insert_stops_where_mtp_kv_is_not_final(lag, inserted):
    assert capped(50, lag) == inserted
