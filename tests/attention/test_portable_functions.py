"""Attention functions and plans against dense float64 attention, without SGLang.

Letters: T query rows of a pass, B requests, Q rows of a request, K keys, H query heads, N key/value heads, D head size.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_step35.attention.portable import functions, paged_call, plan
from sglang_step35.attention.portable.kernel_calls import BatchCall, KeySlots, KVReader, StreamCall, as_key_slots
from sglang_step35.attention.portable.paged_call import SlotTable
from sglang_step35.attention.portable.plan import PassRows, cut_pass
from sglang_step35.config import ALL_KEYS

SCALE = 0.3
DEFAULTS = {name: value for name, value in vars(plan).items() if name.isupper() and isinstance(value, int)}


def dense(q, k_pool, v_pool, table, rows, earlier_keys):
    """Attention of every row by itself: q [T, H, D], pools [slots, N, D]. Returns [T, H, D] float64, NaN for rows
    before position 0."""
    out = torch.full(q.shape, torch.nan, dtype=torch.float64)
    group = q.shape[1] // k_pool.shape[1]
    row = 0
    for request, count, end in zip(rows.requests, rows.counts, rows.ends, strict=True):
        for position in range(end - count, end):
            if position >= 0:
                first = 0 if earlier_keys < 0 else max(0, position - earlier_keys)
                slots = table[request, first : position + 1]
                k, v = (pool[slots].double().repeat_interleave(group, 1) for pool in (k_pool, v_pool))
                weights = (torch.einsum("hd,khd->hk", q[row].double(), k) * SCALE).softmax(-1)
                out[row] = torch.einsum("hk,khd->hd", weights, v)
            row += 1
    return out


def slot_table(batch: int, length: int, run: int) -> torch.Tensor:
    """[batch, length] slots from 1 on; runs of `run` consecutive ones in random order."""
    runs = torch.arange(-(-batch * length // run) * run).view(-1, run)
    return runs[torch.randperm(len(runs))].flatten()[: batch * length].view(batch, length) + 1


def compare(
    counts, ends, earlier_keys, *, group=2, run=1, dtype=torch.float32, tolerance=1e-5, call_keys=None, in_place=False
):
    """Plan and run one layer over random pools, and check its rows. Slot 0 holds NaN: no request may read it."""
    length = max([*ends, 1])
    table = slot_table(len(counts), length, run)
    rows = PassRows(torch.randperm(len(counts)), counts, ends)
    k_pool, v_pool = torch.randn(2, int(table.max()) + 1, 2, 16).to(dtype)
    k_pool[0] = v_pool[0] = torch.nan
    q = torch.randn(rows.total, 2 * group, 16).to(dtype)
    out = torch.full_like(q, torch.nan)
    find = lambda requests, positions: table[requests, positions]
    calls = cut_pass(rows, earlier_keys, find, call_keys, SlotTable(table.int()) if in_place else None)
    reader = KVReader().of_layer(k_pool, v_pool)
    for call in calls:
        call.run(q, reader, SCALE, out)
    assert torch.isfinite(out).all()
    expected = dense(q, k_pool, v_pool, table, rows, earlier_keys)
    real = ~expected.isnan()
    torch.testing.assert_close(out[real].double(), expected[real], atol=tolerance, rtol=tolerance)
    return calls


@pytest.fixture
def limit(monkeypatch):
    return lambda **values: [monkeypatch.setattr(plan, name, value) for name, value in values.items()]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pass(data):
    """Ragged batches of every kind, with limits that put every kind of work call within reach of short requests."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    window = draw(st.sampled_from([ALL_KEYS, 0, 1, 7, 31]))
    edges = st.sampled_from([0, 1, max(window, 0), window + 1, window + 2, 60])
    counts = draw(st.lists(st.sampled_from([0, 1, 1, 4, 6, 8, 33]), min_size=1, max_size=5))
    ends = [max(0, count + draw(edges) - draw(st.sampled_from([0, 0, 2]))) for count in counts]
    limits = {
        "SHORT_ROWS": draw(st.sampled_from([1, 5, 16])),
        "FULL_BLOCK_ROWS": draw(st.sampled_from([3, 1024])),
        "WINDOW_BLOCK_ROWS": draw(st.sampled_from([3, 8, 128])),
        "BATCH_KEYS": draw(st.sampled_from([0, 20, 1024])),
        "PIECE_KEYS": draw(st.sampled_from([5, 1024])),
        "BLOCK_PIECE_KEYS": draw(st.sampled_from([5, 1024])),
        "SHORTEST_RUN": draw(st.sampled_from([2, 8, 512])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_call, "ALONE", 1)
        patch.setattr(torch, "get_num_threads", lambda parts=draw(st.sampled_from([1, 2, 3, 8])): parts)
        for name, value in limits.items():
            patch.setattr(plan, name, value)
        compare(
            counts,
            ends,
            window,
            group=draw(st.sampled_from([1, 3])),
            run=draw(st.sampled_from([1, 4, 16, 4096])),
            call_keys=draw(st.sampled_from([None, 1, 64])),
            in_place=draw(st.booleans()),
        )


@pytest.mark.parametrize("length", [510, 511, 512, 513, 1100])
def test_window_of_512_keys(length):
    """511 earlier keys, around the window's edge, in a batch with a short request and in blocks of a chunk."""
    compare([1, 4, 1], [length, length, 3], 511)
    compare([length - 3], [length], 511, run=16)


def test_full_layer_lengths():
    """A batch in which a request's first 512 columns are all hidden, and a streamed request beside it."""
    compare([1, 4, 1], [1020, 9, 1], ALL_KEYS)
    compare([4, 1, 40], [1500, 1025, 1400], ALL_KEYS, run=16)
    compare([2], [1500], ALL_KEYS, run=4096)


@pytest.mark.parametrize("earlier_keys", [ALL_KEYS, 511])
def test_bfloat16(earlier_keys):
    compare([1, 4, 40], [600, 1300, 1300], earlier_keys, group=8, run=16, dtype=torch.bfloat16, tolerance=0.02)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), keys=st.integers(1, 12), window=st.sampled_from([ALL_KEYS, 0, 3]))
def test_visible_keys(rows, keys, window):
    seen = functions.visible_keys(rows, keys, window)
    for row in range(rows):
        for key in range(keys):
            distance = (keys - key) - (rows - row)
            assert seen[row, key] == (distance >= 0 and (window < 0 or distance <= window))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=0, max_size=8), st.integers(1, 5))
def test_contiguous_runs(lengths, shortest):
    """Every slot comes out once; runs are at least as long as asked for, and none of such length is left over."""
    parts = [torch.arange(length) + 100 * (7 * i % 8) for i, length in enumerate(lengths)]
    slots = torch.cat(parts) if parts else torch.arange(0)
    runs, rest = functions.contiguous_runs(slots, shortest)
    found = [slot for start, length in runs for slot in range(start, start + length)]
    assert sorted(found + rest.tolist()) == sorted(slots.tolist())
    assert sorted(length for _, length in runs) == sorted(length for length in lengths if length >= max(1, shortest))


def test_merging_equals_one_softmax():
    q, k, v = torch.randn(5, 4, 16), torch.randn(90, 2, 16), torch.randn(90, 2, 16)
    whole, _ = functions.attend_rows(q, k, v, SCALE)
    parts = [functions.attend_rows(q, k[a:b], v[a:b], SCALE) for a, b in ((0, 1), (1, 40), (40, 90))]
    torch.testing.assert_close(functions.merge_partials(parts), whole)
    assert functions.merge_partials(parts[:1]) is parts[0][0]


def test_causal_block_needs_square():
    q, k = torch.randn(5, 4, 16), torch.randn(6, 2, 16)
    with pytest.raises(ValueError, match="as many keys as rows, got 6 and 5"):
        functions.attend_block(q, k, k, None, SCALE)


def test_keys_in_place():
    """Consecutive slots are read as a view, in order; others are gathered into shared memory; dtypes are converted."""
    pool = torch.randn(20, 2, 4)
    reader = KVReader().of_layer(pool, pool)
    view, _ = reader.read(as_key_slots(torch.arange(3, 9)), torch.float32)
    assert view.data_ptr() == pool[3].data_ptr() and torch.equal(view, pool[3:9])
    gathered, values = reader.read(KeySlots(2, slots=torch.tensor([7, 3])), torch.float32)
    assert torch.equal(gathered, pool[[7, 3]]) and gathered.data_ptr() != values.data_ptr()
    again, _ = reader.read(as_key_slots(torch.tensor([1, 0])), torch.float32)
    assert again.data_ptr() == gathered.data_ptr()
    assert reader.read(as_key_slots(torch.arange(2)), torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("earlier_keys", [ALL_KEYS, 31, 600])
def test_kept_masks_are_those_of_batches(earlier_keys):
    for rows, keys in ((1, 1), (4, 4), (4, 255), (4, 256), (7, 632)):
        batch = functions.batch_mask(rows, keys, torch.tensor([keys, 9000]), earlier_keys)
        assert torch.equal(functions.aligned_mask(rows, keys, earlier_keys).expand_as(batch), batch)


def test_decode_reads_the_window_in_one_call():
    """All requests in one call, and no slot outside their windows among its keys."""
    table = slot_table(3, 300, 1)
    seen = []

    def find(requests, positions):
        seen.append((requests + 0 * positions, positions))
        return table[requests, positions]

    rows = PassRows(torch.tensor([2, 0, 1]), [1, 1, 1], [300, 9, 120])
    (call,) = cut_pass(rows, 31, find)
    assert isinstance(call, BatchCall) and call.shape == (3, 1, 32)
    for request, end in zip([2, 0, 1], [300, 9, 120], strict=True):
        positions = seen[0][1][seen[0][0] == request]
        assert positions.min() == max(0, end - 32) and positions.max() == end - 1
    assert len(seen) == 1


def test_long_context_is_read_in_place():
    """A context of consecutive slots needs no gather: two views, the prefix and the rows' own keys."""
    table = slot_table(1, 5000, 5000)
    (call,) = cut_pass(PassRows(torch.tensor([0]), [4], [5000]), ALL_KEYS, lambda r, p: table[r, p])
    assert isinstance(call, StreamCall)
    assert call.pieces == [KeySlots(4996, start=1)] and call.own == KeySlots(4, start=4997)


def test_rows_must_match_requests():
    with pytest.raises(ValueError, match="2 requests, 1 counts and 2 ends"):
        PassRows(torch.arange(2), [1], [1, 1])


def test_limits_are_consistent():
    """A verify or draft pass of three MTP layers always is a batch."""
    assert DEFAULTS["SHORT_ROWS"] >= 2 * 4 - 1
    assert DEFAULTS["PIECE_KEYS"] >= DEFAULTS["SHORTEST_RUN"]
