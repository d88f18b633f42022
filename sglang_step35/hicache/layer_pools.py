"""The MTP layers' KV pool as the hierarchical cache takes it: a pool for each layer.

SGLang packs draft KV behind the target's layers in every host page, so that both are written back, loaded and stored
together. It takes one pool of one layer from each draft runner; ours is one runner with one pool of all MTP layers.
"""

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.runtime_context import get_memory
from sglang.srt.speculative.base_spec_worker import HiCacheDraftMode, HiCacheDraftPlan


def check_plan(plan: HiCacheDraftPlan) -> None:
    """Raise ValueError where the MTP layers' KV would not follow the backbone's."""
    if plan.mode is not HiCacheDraftMode.PACKED:
        raise ValueError(
            f"--enable-hierarchical-cache would keep the MTP layers' KV in a pool of kind {plan.mode.value!r}, "
            "which the MTP worker does not wait for: leave --enable-unified-memory out"
        )
    storage = get_memory().hicache_storage_backend
    if storage not in (None, "file"):
        raise ValueError(
            f"--hicache-storage-backend {storage} would not tell one MTP depth's or checkpoint's KV from another's: "
            "use `file`, or serve without --speculative-algorithm"
        )


def layer_pools(pool) -> tuple:
    """One view of `pool` for each of its layers, first layer first; the buffers are shared."""
    if isinstance(pool, SWAKVPool):
        return tuple(SWALayerView(pool, layer) for layer in sorted(pool.layers_mapping))
    return tuple(LayerView(pool, slice(layer, layer + 1)) for layer in range(pool.layer_num))


class LayerView(MHATokenToKVPool):
    """Some layers of a multi-head pool, read from it when asked: on CUDA its buffers get their final size later."""

    def __init__(self, pool: MHATokenToKVPool, layers: slice):
        # Nothing is allocated: what is not found here is the pool's.
        self._pool = pool
        self._layers = layers
        self.layer_num = len(range(*layers.indices(pool.layer_num)))

    def __getattr__(self, name: str):
        return getattr(self._pool, name)

    @property
    def k_buffer(self) -> list:
        return self._pool.k_buffer[self._layers]

    @property
    def v_buffer(self) -> list:
        return self._pool.v_buffer[self._layers]

    @property
    def k_data_ptrs(self):
        return self._pool.k_data_ptrs[self._layers]

    @property
    def v_data_ptrs(self):
        return self._pool.v_data_ptrs[self._layers]

    @property
    def model_layer_ids(self) -> tuple[int, ...]:
        return self._pool.model_layer_ids[self._layers]


class SWALayerView(SWAKVPool):
    """One layer of a pool that keeps sliding layers apart; the other of its two pools is empty."""

    def __init__(self, pool: SWAKVPool, layer: int):
        self._pool = pool
        index, sliding = pool.layers_mapping[layer]
        one, none = slice(index, index + 1), slice(0)
        self.swa_kv_pool = LayerView(pool.swa_kv_pool, one if sliding else none)
        self.full_kv_pool = LayerView(pool.full_kv_pool, none if sliding else one)
        self.layer_num = 1

    def __getattr__(self, name: str):
        return getattr(self._pool, name)
