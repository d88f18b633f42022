"""The compiled kernel over pools in place against plain loops in float64, row by row.

Letters: T query rows of the pass, H query heads, N key/value heads, D head size.
"""

import math

import pytest
import torch

from sglang_step35.attention.portable import paged_call, plan, segment, team
from sglang_step35.attention.portable.kernel_calls import KVReader
from sglang_step35.attention.portable.paged_call import PagedCall, SlotTable, reads
from sglang_step35.attention.portable.paged_kernel import BY_AMX
from sglang_step35.attention.portable.plan import PassRows, cut_pass
from sglang_step35.config import ALL_KEYS
from sglang_step35.packed import amx_rows

SCALE = 0.2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def one_row(q, keys, values):
    """q [D]; keys, values [K, D]. Plain softmax attention, in Python's own floats but for the sums of products."""
    scores = [float(q.double() @ key.double()) * SCALE for key in keys]
    weights = [math.exp(score - max(scores)) for score in scores]
    found = torch.zeros(len(q), dtype=torch.float64)
    for weight, value in zip(weights, values, strict=True):
        found += weight / sum(weights) * value.double()
    return found


class Case:
    """Requests with rows [count] up to position `end` over pools whose slots are in no order, slot 0 never used."""

    def __init__(self, spans, *, heads=2, group=3, size=32, dtype=torch.float32):
        torch.manual_seed(len(spans) + group)
        self.rows = PassRows(torch.randperm(len(spans)), [count for count, _ in spans], [end for _, end in spans])
        length = max(1, *(end for _, end in spans))
        slots = torch.randperm(len(spans) * length) + 1
        self.table = slots.view(len(spans), length).int()
        self.keys, self.values = torch.randn(2, len(slots) + 1, heads, size).to(dtype)
        self.keys[0] = self.values[0] = torch.nan
        self.q = torch.randn(self.rows.total, heads * group, size).to(dtype)
        self.group, self.mapping = group, None

    def call(self, earlier_keys) -> PagedCall:
        find = lambda requests, positions: self.table[requests, positions].long()
        (call,) = cut_pass(self.rows, earlier_keys, find, in_place=SlotTable(self.table, self.mapping))
        return call

    def run(self, earlier_keys) -> torch.Tensor:
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype)
        self.call(earlier_keys).run(self.q, KVReader().of_layer(self.keys, self.values), SCALE, out)
        return out

    def check(self, earlier_keys) -> None:
        out, row = self.run(earlier_keys), 0
        tolerance = TOLERANCE[self.q.dtype]
        assert torch.isfinite(out).all()
        for request, count, end in zip(self.rows.requests, self.rows.counts, self.rows.ends, strict=True):
            for position in range(end - count, end):
                first = 0 if earlier_keys < 0 else max(0, position - earlier_keys)
                seen = self.table[request, first : max(position + 1, 0)].long()
                for head in range(self.q.shape[1] if len(seen) else 0):
                    own = (pool[seen, head // self.group] for pool in (self.keys, self.values))
                    expected = one_row(self.q[row, head], *own)
                    torch.testing.assert_close(out[row, head].double(), expected, atol=tolerance, rtol=tolerance)
                row += 1


@pytest.fixture(params=[1, 2, 3, 16])
def parts(request, monkeypatch):
    """The work in so many parts at most, however small it is."""
    monkeypatch.setattr(paged_call, "ALONE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


@pytest.fixture(params=["float32", "bfloat16", BY_AMX])
def dtype(request, monkeypatch):
    """Of queries and pools. Where the CPU has AMX, it multiplies all bfloat16 numbers that nobody keeps from it."""
    if request.param == "bfloat16":
        monkeypatch.setattr(amx_rows, "supported", lambda: False)
    elif request.param == BY_AMX and not amx_rows.supported():
        pytest.skip("the CPU has no AMX")
    chosen = torch.float32 if request.param == "float32" else torch.bfloat16
    assert paged_call.kind(chosen) == request.param
    return chosen


@pytest.mark.parametrize("earlier_keys", [ALL_KEYS, 0, 5, 63, 64, 100])
def test_requests_of_different_lengths(dtype, earlier_keys, parts):
    """Decode beside verify rows, lengths around a block's, windows that begin within one."""
    Case([(1, 1), (4, 64), (1, 65), (4, 200), (2, 3)], dtype=dtype).check(earlier_keys)


@pytest.mark.parametrize("heads, group, size", [(1, 1, 16), (1, 8, 128), (2, 5, 48), (3, 2, 64), (2, 12, 128)])
def test_shapes(dtype, heads, group, size, parts):
    """Heads that share a key in no multiple of a tile, sizes of whole and of broken tiles."""
    case = Case([(1, 130), (3, 70), (5, 66)], heads=heads, group=group, size=size, dtype=dtype)
    case.check(ALL_KEYS)
    case.check(90)


@pytest.mark.parametrize("earlier_keys", [ALL_KEYS, 7])
def test_rows_before_the_first_position(dtype, earlier_keys, parts):
    """Padding rows are 0, also of requests that have no other; beside them the real rows are right."""
    case = Case([(4, 2), (1, 0), (3, 0), (20, 9), (4, 80)], dtype=dtype)
    case.check(earlier_keys)
    out = case.run(earlier_keys)
    padding = torch.tensor([0, 1, 4, 5, 6, 7, *range(8, 19)])
    assert not out[padding].any() and (out[19:] != 0).any(-1).all()


@pytest.mark.parametrize("earlier_keys", [ALL_KEYS, 7])
def test_slots_of_another_pool(earlier_keys, parts):
    """Keys of a sliding pool lie in other slots than the table says, which a mapping tells."""
    case = Case([(4, 90), (1, 30)])
    moved = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(len(case.keys) - 1) + 1))
    expected = case.run(earlier_keys)
    case.keys[moved], case.values[moved], case.mapping = case.keys.clone(), case.values.clone(), moved
    assert torch.equal(case.run(earlier_keys), expected)


@pytest.mark.parametrize(
    ("table", "mapping", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), None, "int32 rows without gaps"),
        (torch.zeros(3, 2, dtype=torch.int32).T, None, "int32 rows without gaps"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), "int64 without gaps"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(9, dtype=torch.int64)[::2], "int64 without gaps"),
    ],
)
def test_slots_that_compiled_code_would_misread(table, mapping, message):
    with pytest.raises(ValueError, match=message):
        SlotTable(table, mapping)


def test_large_scores(dtype):
    """The largest score comes first, last or between; its weight is 1 and the others' vanish, in bounds of float32."""
    for place in (0, 63, 64, 150, 199):
        case = Case([(1, 200)], group=1, dtype=dtype)
        case.keys[case.table[0, place].long()] = case.q[0].view(2, -1) * 50
        case.check(ALL_KEYS)


def test_nan_of_a_key_is_not_hidden(dtype):
    case = Case([(1, 100)], dtype=dtype)
    case.keys[case.table[0, 40].long(), 1] = torch.nan
    out = case.run(ALL_KEYS)
    assert torch.isfinite(out[:, :3]).all() and out[:, 3:].isnan().all()


def test_slices_are_read_where_they_are(dtype):
    """Queries of a joint projection, pools that are slices of a larger one."""
    case = Case([(4, 90)], dtype=dtype)
    expected = case.run(ALL_KEYS)
    wide = torch.randn(4, 500).to(dtype)
    wide[:, :192] = case.q.flatten(1)
    case.q = wide[:, :192].unflatten(1, (6, 32))
    both = torch.stack((case.keys, case.values), 1)
    case.keys, case.values = both.unbind(1)
    assert not case.q.is_contiguous() and not case.keys.is_contiguous() and reads(case.keys, dtype)
    assert torch.equal(case.run(ALL_KEYS), expected)


def test_repeats_are_equal(dtype, parts):
    case = Case([(4, 300), (1, 77)], dtype=dtype)
    assert all(torch.equal(case.run(100), case.run(100)) for _ in range(5))


def test_without_openmp(monkeypatch):
    """One thread takes every part."""
    monkeypatch.setattr(paged_call, "ALONE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(team, "_parallel", lambda: None)
    Case([(4, 300), (1, 77)]).check(ALL_KEYS)


def test_threads_that_pay():
    """One of little work; of more, no thread gets less than ALONE, and none nothing."""
    case = Case([(1, 100)])
    assert case.call(ALL_KEYS)._parts(6 * 32, 2) == 1
    large = Case([(4, 1000)]).call(ALL_KEYS)
    assert large._parts(paged_call.ALONE, 2) == min(torch.get_num_threads(), 2 * math.ceil(1000 / segment.KEYS))


@pytest.mark.parametrize(
    "shape, pool, queries, expected",
    [
        ((9, 2, 128), torch.bfloat16, torch.bfloat16, True),
        ((9, 2, 16), torch.float32, torch.float32, True),
        ((9, 2, 12), torch.float32, torch.float32, False),
        ((9, 2, 128), torch.float32, torch.bfloat16, False),
        ((9, 2, 128), torch.float8_e4m3fn, torch.float8_e4m3fn, False),
        ((9, 2, 128), torch.float16, torch.float16, False),
        ((9, 2, 128), torch.float64, torch.float64, False),
    ],
)
def test_which_pools_are_read(shape, pool, queries, expected):
    assert reads(torch.zeros(shape).to(pool), queries) == expected
    assert not reads(torch.zeros(2, 9, shape[2]).to(pool).transpose(0, 1), queries)


def test_longer_requests_stay_with_torch():
    """A chunk beside decode rows: the rows of few are one call, whatever their number of keys."""
    rows = PassRows(torch.arange(3), [1, 40, 16], [3000, 40, 2000])
    table = SlotTable(torch.zeros(3, 3000, dtype=torch.int32))
    calls = cut_pass(rows, ALL_KEYS, lambda requests, positions: positions, in_place=table)
    assert [type(call).__name__ for call in calls] == ["PagedCall", "StreamCall"]
    assert calls[0].requests[:2, 3].tolist() == [0, 2] and plan.SHORT_ROWS == 16
