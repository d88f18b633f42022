"""The portable backend on SGLang's own KV pools and allocators, against dense attention over the recorded keys.

Spans are [(request, first position, end)] of the rows of a pass.
"""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_step35.attention.portable import backend, plan
from sglang_step35.attention.portable.backend import PortableAttnBackend, batch_rows, create_backend
from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool
from tests.support.attention_host import EARLIER, KV_HEADS, SIZE, Host

EXTEND, DECODE, MIXED = ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED
VERIFY, DRAFT = ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2


@pytest.fixture(params=[(1, True), (16, True), (1, False), (16, False)], ids=lambda p: f"page{p[0]}-hybrid{p[1]}")
def host(request, size):
    torch.manual_seed(0)
    return Host(*request.param, size=size)


@pytest.fixture(params=[SIZE, SIZE // 2], ids=["in_place", "gathered"])
def size(request):
    return request.param


@pytest.fixture(params=["default", "tiny"])
def limits(request, monkeypatch):
    """Also with limits so small that every kind of work item occurs on short requests."""
    if request.param == "tiny":
        tiny = dict(SHORT_ROWS=4, FULL_BLOCK_ROWS=9, WINDOW_BLOCK_ROWS=5, BATCH_KEYS=10)
        for name, value in dict(tiny, PIECE_KEYS=6, BLOCK_PIECE_KEYS=11, SHORTEST_RUN=4).items():
            monkeypatch.setattr(plan, name, value)
        monkeypatch.setattr(backend, "CALL_BYTES", 24 * KV_HEADS * SIZE * 4)


def check(results, tolerance=1e-5):
    for out, expected in results:
        real = ~expected.isnan()
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out[real].double(), expected[real], atol=tolerance, rtol=tolerance)


def test_all_modes(host, limits):
    check(host.run(EXTEND, [(1, 0, 37), (4, 0, 3), (2, 0, 20)]))
    check(host.run(EXTEND, [(1, 37, 61), (3, 0, 11)]))  # a later chunk and a new request
    check(host.run(DECODE, [(3, 11, 12), (1, 61, 62), (4, 3, 4)]))
    check(host.run(MIXED, [(2, 20, 33), (3, 12, 13), (1, 62, 63)]))
    check(host.run(VERIFY, [(1, 63, 67), (4, 4, 8)]))
    check(host.run(VERIFY, [(1, 65, 69), (4, 5, 9)]))  # after accepting two rows and one
    check(host.run(DRAFT, [(1, 65, 69), (4, 5, 9)]))
    check(host.run(DECODE, [(1, 69, 70)]))


def test_rows_that_attend_to_nothing_are_read_by_later_ones(host, limits):
    host.write(EXTEND, [(1, 0, 37), (4, 0, 3)])
    check(host.run(EXTEND, [(1, 36, 37), (4, 2, 3)]))
    host.write(EXTEND, [(1, 37, 50)])
    check(host.run(DECODE, [(4, 3, 4), (1, 50, 51)]))


def test_planned_rows_before_the_first_position(host, limits):
    host.run(EXTEND, [(5, 0, 40), (6, 0, 2)])
    spans = [(5, 38, 44), (6, -1, 5)]
    batch = host.batch(DRAFT, spans)
    host.backend.plan_rows(batch.req_pool_indices, [6, 6], torch.tensor([44, 5]), batch.out_cache_loc)
    check(host.attend(batch, spans))


def test_bfloat16(size):
    host = Host(dtype=torch.bfloat16, size=size)
    check(host.run(EXTEND, [(1, 0, 50), (2, 0, 9)]), tolerance=0.03)
    check(host.run(VERIFY, [(1, 50, 54), (2, 9, 13)]), tolerance=0.03)


@pytest.mark.parametrize("mode", [DECODE, VERIFY, EXTEND], ids=lambda mode: mode.name)
def test_evicted_slots_are_not_read(mode, limits, size):
    """KeySlots that slid out of the window are freed; whatever then stands in the dummy slot must not matter."""
    host = Host(size=size)
    host.run(EXTEND, [(1, 0, 60), (2, 0, 5)])
    gone = host.req_to_token_pool.req_to_token[1, : 60 - EARLIER].long()
    swa = host.token_to_kv_pool.swa_kv_pool
    freed = host.token_to_kv_pool.translate_loc_from_full_to_swa(gone)
    host.allocator.free_swa(gone)
    for buffer in (*swa.k_buffer, *swa.v_buffer):
        buffer[freed] = torch.nan
        buffer[0] = torch.nan
    rows = {DECODE: 1, VERIFY: 4, EXTEND: 30}[mode]
    check(host.run(mode, [(1, 60, 60 + rows), (2, 5, 5 + rows)]))


def test_window_counts_the_own_key(size):
    """A change of the key EARLIER + 1 positions back leaves the row as it was; one EARLIER positions back does not."""
    outputs = []
    for changed in (None, 39 - EARLIER - 1, 39 - EARLIER):
        torch.manual_seed(1)
        host = Host(size=size)
        host.run(EXTEND, [(1, 0, 39)])
        if changed is not None:
            slot = host.req_to_token_pool.req_to_token[1, changed].long()
            host.token_to_kv_pool.get_value_buffer(1)[host.token_to_kv_pool.translate_loc_from_full_to_swa(slot)] += 1
        outputs.append(host.run(DECODE, [(1, 39, 40)])[1][0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_idle_and_padding_rows():
    host = Host()
    idle = host.batch(ForwardMode.IDLE, [])
    host.backend.init_forward_metadata(idle)
    layer = host.layers[1]
    empty = torch.zeros(0, layer.tp_q_head_num * SIZE)
    assert host.backend.forward(empty, None, None, layer, idle).shape == empty.shape
    host.run(EXTEND, [(1, 0, 12)])
    batch = host.batch(DECODE, [(1, 12, 13)])
    host.backend.init_forward_metadata(batch)
    batch.out_cache_loc = torch.tensor([batch.out_cache_loc[0], 0, 0])
    q = torch.randn(3, layer.tp_q_head_num * SIZE)
    k, v = torch.randn(2, 1, KV_HEADS, SIZE)
    real = SimpleNamespace(**{**vars(batch), "out_cache_loc": batch.out_cache_loc[:1]})
    out = host.backend.forward(q[:1], k, v, layer, real)
    padded = host.backend.forward(q, None, None, layer, batch)
    assert torch.equal(padded[:1], out)
    assert not padded[1:].any()


def test_strided_queries():
    """Queries may be a slice of the joint projection."""
    host = Host()
    host.run(EXTEND, [(1, 0, 30)])
    batch = host.batch(EXTEND, [(1, 30, 50)])
    for layer in host.layers:
        host.backend.init_forward_metadata(batch)
        wide = torch.randn(20, 100)
        q = wide[:, : layer.tp_q_head_num * SIZE]
        strided, dense = (host.backend.forward(t, None, None, layer, batch) for t in (q, q.contiguous()))
        assert torch.equal(strided, dense)


def test_draft_pool_of_sliding_layers_only():
    """The MTP layers' pool has no full layer and maps slots onto themselves."""
    pool = SWAKVPool(
        64, 64, 1, torch.float32, KV_HEADS, SIZE, [0, 1, 2], [], "cpu", token_to_kv_pool_class=PortableMHATokenToKVPool
    )
    pool.register_mapping(torch.arange(66))
    table = torch.arange(64, dtype=torch.int32).view(4, 16)
    runner = SimpleNamespace(device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool)
    backend = create_backend(runner)
    backend.plan_rows(torch.tensor([1, 2]), [4, 4], [12, 9], torch.cat([table[1, 8:12], table[2, 5:9]]).long())
    batch = SimpleNamespace(forward_mode=DRAFT, out_cache_loc=torch.cat([table[1, 8:12], table[2, 5:9]]).long())
    for layer_id in range(3):
        layer = RadixAttention(4, SIZE, 1.0, KV_HEADS, layer_id, sliding_window_size=EARLIER)
        k, v = torch.randn(2, 8, KV_HEADS, SIZE)
        out = backend.forward(torch.randn(8, 4 * SIZE), k, v, layer, batch)
        assert torch.isfinite(out).all() and out.abs().sum() > 0
        assert torch.equal(pool.get_key_buffer(layer_id)[table[2, 5:9].long()], k[4:])


def test_lengths_of_modes():
    """In a verify pass alone, seq_lens leaves out the pass's own rows."""
    fields = dict(batch_size=2, seq_lens=torch.tensor([9, 5]), spec_info=SimpleNamespace(draft_token_num=4))
    extend = dict(extend_seq_lens_cpu=None, extend_seq_lens=torch.tensor([3, 5]))
    assert batch_rows(SimpleNamespace(forward_mode=DECODE, **fields)) == ([1, 1], [9, 5])
    assert batch_rows(SimpleNamespace(forward_mode=VERIFY, **fields)) == ([4, 4], [13, 9])
    for mode in (EXTEND, MIXED, DRAFT):
        assert batch_rows(SimpleNamespace(forward_mode=mode, **fields, **extend)) == ([3, 5], [9, 5])
    assert batch_rows(SimpleNamespace(forward_mode=ForwardMode.IDLE, batch_size=0)) == ([], [])


def test_refusals():
    runner = SimpleNamespace(device="cuda")
    with pytest.raises(ValueError, match="CPUs only"):
        PortableAttnBackend(runner)
    host = Host()
    capped = RadixAttention(4, SIZE, 1.0, KV_HEADS, 0, logit_cap=30.0)
    batch = host.batch(DECODE, [(1, 0, 1)])
    host.backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match="logit cap"):
        host.backend.forward(torch.zeros(1, 4 * SIZE), None, None, capped, batch)
