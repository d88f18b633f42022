"""Host pools of the hierarchical cache in plain torch, where SGLang has only kernels."""

from sglang.srt.mem_cache.host_memory import available_host_memory_bytes
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope, ranks_per_host
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from torch import Tensor

LAYOUTS = ("layer_first", "page_first")
_SHARE = 0.9  # of the free memory; SGLang leaves 10 GiB, more than a small machine has


class PortableMHATokenToKVPoolHost(MHATokenToKVPoolHost):
    """Kept: sizes, slots, pages as the files hold them; replaced: pinned memory and the copy kernels.

    Packed MTP layers follow the target's in every list of buffers.
    """

    def __init__(self, *args, **options):
        budget = int(_SHARE * available_host_memory_bytes(allow_cgroup_fallback=True)) // ranks_per_host()
        with host_memory_budget_scope(budget):
            super().__init__(*args, **options, pin_memory=False)
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"--hicache-mem-layout {self.layout} needs SGLang's kernels, which this platform lacks: "
                f"use {' or '.join(LAYOUTS)}"
            )

    def load_to_device_per_layer(
        self, device_pool, host_indices: Tensor, device_indices: Tensor, layer_id: int, io_backend, *, is_draft=False
    ) -> None:
        """Copy one layer's keys and values of host slots [n] to the pool's slots [n]."""
        if is_draft or 0 <= layer_id < self.target_layer_num:
            self.device_k_buffers[layer_id][device_indices] = self.k_data_refs[layer_id][host_indices]
            self.device_v_buffers[layer_id][device_indices] = self.v_data_refs[layer_id][host_indices]

    def backup_from_device_all_layer(
        self, device_pool, host_indices: Tensor, device_indices: Tensor, io_backend
    ) -> None:
        """Copy the pool's slots [n] to host slots [n], in every layer."""
        device = self.device_k_buffers + self.device_v_buffers
        for kept, buffer in zip(self.host_kv_data_refs, device, strict=True):
            kept[host_indices] = buffer[device_indices]


def host_pool_class(selected: type, buffer_info) -> type | None:
    """After `get_mha_host_pool_cls`: ours for plain keys and values, None where SGLang's choice stands."""
    return PortableMHATokenToKVPoolHost if selected is MHATokenToKVPoolHost else None
