"""Admission beside a hit in host memory: SGLang's own tree, pools and budget, with slots that are nearly all taken."""

import inspect
import itertools
from array import array
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.allocation import alloc_paged_token_slots_extend
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_step35.hicache.load_back import select_admission
from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool

PAGE, WINDOW, CHUNK, FULL, SLIDING = 16, 80, 64, 1024, 256
PREFIX, ENDS = array("q", range(128)), (64, 80, 128)  # a cached prompt, and where its chunks ended
PROMPT = PREFIX + array("q", range(500, 700))
_PARAMS = SimpleNamespace(max_new_tokens=8, ignore_eos=False)
RUNNING = SimpleNamespace(reqs=[SimpleNamespace(sampling_params=_PARAMS, output_ids=[])])


class Loader:
    """In the place of SGLang's controller: gives a load its slots on the device and moves nothing."""

    write_policy = "write_through"

    def __init__(self, tree):
        self.tree = tree

    def load(self, host_indices, node_id, extra_pools):
        allocator = self.tree.token_to_kv_pool_allocator
        for transfer in extra_pools:
            allocator.evict_to_free_tokens(self.tree, len(transfer.host_indices))
            transfer.device_indices = allocator.swa_attn_allocator.alloc(len(transfer.host_indices))
        return allocator.full_attn_allocator.alloc(len(host_indices))


def extend(tree, start: int, stop: int) -> torch.Tensor:
    """Slots for a request's tokens from `start`, where a page begins, to `stop`."""
    lens = [torch.tensor([length]) for length in (start, start, stop, stop)]
    last = cached_slots(tree, start)[-1:] if start else torch.tensor([-1])
    return alloc_paged_token_slots_extend(tree, *lens, last, stop - start)


def node_at(tree, length: int) -> int:
    return tree.tree_core.match_full_device_prefix(RadixKey(PREFIX[:length]))[1]


def cached_slots(tree, length: int) -> torch.Tensor:
    return tree.path_device_indices(node_at(tree, length))


def empty_tree() -> UnifiedRadixCache:
    shape = dict(page_size=PAGE, dtype=torch.float32, head_num=1, head_dim=2, device="cpu", enable_memory_saver=False)
    layers = dict(swa_attention_layer_ids=[0], full_attention_layer_ids=[1])
    pool = SWAKVPool(size=FULL, size_swa=SLIDING, token_to_kv_pool_class=PortableMHATokenToKVPool, **layers, **shape)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(4, FULL, "cpu", False),
        token_to_kv_pool_allocator=SWATokenToKVPoolAllocator(FULL, SLIDING, PAGE, torch.float32, "cpu", pool, False),
        page_size=PAGE,
        sliding_window_size=WINDOW,
        tree_components=(ComponentType.FULL, ComponentType.SWA),
        tree_core_backend="python",
    )
    return UnifiedRadixCache(params)


@pytest.fixture
def make_tree():
    """`make_tree()`: a tree that knows PREFIX. Of its sliding slots only the host still has the first node's."""

    def make() -> UnifiedRadixCache:
        tree, slots = empty_tree(), torch.empty(0, dtype=torch.int64)
        for start, stop in itertools.pairwise((0, *ENDS)):
            slots = torch.cat([slots, extend(tree, start, stop)])
            tree.insert(InsertParams(key=RadixKey(PREFIX[:stop]), value=slots, prev_prefix_len=start))
        tree.cache_controller, tree.load_back_threshold = Loader(tree), 10
        tree.tree_core.set_hicache_enabled()
        tree.tree_core.has_swa_host_pool = True
        first = tree.tree_core.node_by_id(node_at(tree, ENDS[0]))
        first.component_data[ComponentType.SWA].host_value = torch.arange(ENDS[0])
        tree.evict(EvictParams(swa_num_tokens=ENDS[0]))
        assert tree.swa_evictable_size() == len(PREFIX) - ENDS[0]
        return tree

    with get_context().override_server_args():
        yield make


@pytest.fixture
def stock(monkeypatch):
    """SGLang's own selection, whether or not another test of this process has applied our hooks."""
    own = inspect.unwrap(PrefillAdder._select_prefill_admission)
    monkeypatch.setattr(PrefillAdder, "_select_prefill_admission", own)
    return own


@pytest.fixture
def ours(stock, monkeypatch):
    hooked = partialmethod(lambda adder, *args, **options: select_admission(stock, adder, *args, **options))
    monkeypatch.setattr(PrefillAdder, "_select_prefill_admission", hooked)


def take(tree, sliding: int) -> torch.Tensor:
    """So many sliding slots that requests hold beside the tree."""
    return tree.token_to_kv_pool_allocator.swa_attn_allocator.alloc(sliding)


def admit(tree, running=RUNNING, max_new_tokens: int = 8, prompt: array = PROMPT) -> Req | None:
    """The request that continues PREFIX, if one pass of admission admits it."""
    req = Req("one", None, prompt, SamplingParams(max_new_tokens=max_new_tokens))
    req.init_next_round_input(tree)
    adder = PrefillAdder(PAGE, tree, tree.token_to_kv_pool_allocator, running, 1.0, FULL, CHUNK)
    adder.add_one_req(req, False, None)
    return req if adder.can_run_list else None


def test_sglang_admits_what_it_cannot_allocate(make_tree, stock):
    tree = make_tree()
    take(tree, 80)
    req = admit(tree)
    with pytest.raises(RuntimeError, match="Prefill out of memory(?s:.*)Available swa: 48"):
        extend(tree, req.prefix_len, req.extend_end)


def test_such_a_request_waits_until_slots_are_free(make_tree, ours):
    tree = make_tree()
    taken = take(tree, 80)
    assert admit(tree) is None
    assert tree.swa_evictable_size() == 64  # nothing stays locked
    tree.token_to_kv_pool_allocator.swa_attn_allocator.free(taken)
    req = admit(tree)
    assert (req.prefix_len, req.extend_end) == (128, 192)  # with its hit in host memory
    extend(tree, 128, 192)


def test_whatever_is_admitted_can_be_allocated(make_tree, ours):
    admitted = []
    for taken, new, running in itertools.product(range(0, 193, 16), (1, 8, 300), (RUNNING, None)):
        tree = make_tree()
        take(tree, taken)
        req = admit(tree, running, new)
        admitted.append(req is not None)
        if req:
            extend(tree, req.prefix_len, req.extend_end)
    assert 10 < sum(admitted) < len(admitted)


@pytest.mark.parametrize("taken", [0, 32, 96])
def test_where_nothing_runs_a_request_never_waits_for_its_hit(make_tree, ours, taken):
    """The longest there is, too: what cannot be loaded beside the other slots is computed anew."""
    longest = PREFIX + array("q", range(1000, 1000 + FULL - len(PREFIX) - PAGE - 9))
    for prompt in (PROMPT, longest):
        tree = make_tree()
        take(tree, taken)
        req = admit(tree, None, prompt=prompt)
        assert (req.prefix_len, req.extend_end) == ((128, 192) if taken < 32 else (0, 64))
        extend(tree, req.prefix_len, req.extend_end)


def test_without_a_hit_in_host_memory_nothing_changes(make_tree, ours):
    def unmatched(taken):
        tree = make_tree()
        take(tree, taken)
        return admit(tree, prompt=PROMPT[128:])

    # A window and a page must fit, and one page must be left.
    assert unmatched(SLIDING - WINDOW - 2 * PAGE) and not unmatched(SLIDING - WINDOW - PAGE)
