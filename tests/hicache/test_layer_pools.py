"""Views of single MTP layers, and what the portable host pools keep of them: each layer's own keys and values."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker, HiCacheDraftMode, HiCacheDraftPlan

from sglang_step35.hicache.layer_pools import layer_pools
from sglang_step35.hicache.portable_host import PortableMHATokenToKVPoolHost
from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool
from sglang_step35.speculative.worker import Step35SpecWorker

SLOTS, PAGE = 32, 4
SHAPE = dict(page_size=PAGE, dtype=torch.float32, head_num=2, head_dim=3, device="cpu", enable_memory_saver=False)


def plain_pool(layers: int):
    pool = PortableMHATokenToKVPool(size=SLOTS, layer_num=layers, **SHAPE)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.randn_like(buffer))
    return pool


def hybrid_pool(sliding: list[int], full: list[int]):
    kind = dict(token_to_kv_pool_class=PortableMHATokenToKVPool)
    layers = dict(swa_attention_layer_ids=sliding, full_attention_layer_ids=full)
    return SWAKVPool(size=SLOTS, size_swa=SLOTS, **kind, **layers, **SHAPE)


def host_pool(target, drafts, layout: str):
    def info(pool):
        return pool.get_device_pool_infos()[0].buffer_info

    return PortableMHATokenToKVPoolHost(
        info(target), 2.0, 0, PAGE, layout,
        device_capacity_tokens=SLOTS, start_layer=0, end_layer=target.layer_num,
        draft_buffer_infos=tuple(info(draft) for draft in drafts),
    )  # fmt: skip


def test_each_view_of_a_plain_pool_is_one_layer():
    pool = plain_pool(3)
    views = layer_pools(pool)
    assert [view.layer_num for view in views] == [1, 1, 1]
    for layer, view in enumerate(views):
        assert [view.k_buffer[0].data_ptr(), view.v_buffer[0].data_ptr()] == [
            pool.k_buffer[layer].data_ptr(), pool.v_buffer[layer].data_ptr(),
        ]  # fmt: skip
        assert view.size == SLOTS and view.model_layer_ids == (layer,)


def test_a_view_follows_buffers_that_are_replaced():
    pool = plain_pool(2)
    view = layer_pools(pool)[1]
    pool.k_buffer[1] = torch.zeros(4)
    assert view.k_buffer[0] is pool.k_buffer[1]


def test_views_of_a_hybrid_pool_keep_the_layers_order_and_kind():
    pool = hybrid_pool(sliding=[0, 2], full=[1])
    views = layer_pools(pool)
    assert [(v.swa_kv_pool.layer_num, v.full_kv_pool.layer_num) for v in views] == [(1, 0), (0, 1), (1, 0)]
    kept = [views[0].swa_kv_pool, views[1].full_kv_pool, views[2].swa_kv_pool]
    expected = [pool.swa_kv_pool.k_buffer[0], pool.full_kv_pool.k_buffer[0], pool.swa_kv_pool.k_buffer[1]]
    assert [view.k_buffer[0].data_ptr() for view in kept] == [buffer.data_ptr() for buffer in expected]


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_what_is_written_back_is_loaded_into_every_layer(layout):
    """Through other slots, and through a page as a file holds it."""
    target, draft = plain_pool(2), plain_pool(3)
    host = host_pool(target, layer_pools(draft), layout)
    buffers = [*target.k_buffer, *target.v_buffer, *draft.k_buffer, *draft.v_buffer]
    before = [buffer.clone() for buffer in buffers]
    source, kept = torch.arange(4, 12), torch.arange(16, 24)
    host.backup_from_device_all_layer(None, kept, source, "kernel")
    for page in (16, 20):
        data = host.get_data_page(page).clone()
        host.set_from_flat_data_page(page + 12, data)
    for buffer in buffers:
        buffer.zero_()
    loaded = torch.arange(20, 28)
    for layer in range(5):
        host.load_to_device_per_layer(None, kept + 12, loaded, layer, "kernel", is_draft=layer >= 2)
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer[loaded], old[source])
        assert not buffer[:20].any() and not buffer[28:].any()


def test_layouts_that_need_kernels_are_refused():
    with pytest.raises(ValueError, match="--hicache-mem-layout page_first_direct.*layer_first or page_first"):
        host_pool(plain_pool(1), (), "page_first_direct")


@pytest.fixture
def worker():
    one = object.__new__(Step35SpecWorker)
    one.settings = SimpleNamespace(num_steps=3)
    one._target_worker = SimpleNamespace(model_runner=SimpleNamespace())
    one._draft_worker = SimpleNamespace(draft_runner=SimpleNamespace(token_to_kv_pool=plain_pool(3)))
    return one


def plan(worker, monkeypatch, mode, storage=None):
    monkeypatch.setattr(BaseSpecWorker, "_build_hicache_draft_plan", lambda self: HiCacheDraftPlan(mode))
    with get_context().override_server_args(hicache_storage_backend=storage):
        return worker._build_hicache_draft_plan()


def test_the_plan_packs_every_layer(worker, monkeypatch):
    found = plan(worker, monkeypatch, HiCacheDraftMode.PACKED)
    assert len(found.device_pools) == 3
    assert worker._target_worker.model_runner.mtp_draft_device_pools is found.device_pools
    assert plan(worker, monkeypatch, HiCacheDraftMode.NONE).device_pools == ()


def test_what_would_lose_or_mix_mtp_layers_is_refused(worker, monkeypatch):
    with pytest.raises(ValueError, match="leave --enable-unified-memory out"):
        plan(worker, monkeypatch, HiCacheDraftMode.FUSED)
    with pytest.raises(ValueError, match="--hicache-storage-backend nixl.*use `file`"):
        plan(worker, monkeypatch, HiCacheDraftMode.PACKED, storage="nixl")
    assert len(plan(worker, monkeypatch, HiCacheDraftMode.PACKED, storage="file").device_pools) == 3
