"""KV pool for devices without Triton."""

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class PortableMHATokenToKVPool(MHATokenToKVPool):
    """SGLang's multi-head KV pool; kept: buffers and addressing, replaced: the Triton slot copy."""

    def _init_kv_copy_and_warmup(self) -> None:
        # Stock compiles and launches a Triton copy kernel here.
        self._kv_copy_config = None

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy slots src_loc [n] to tgt_loc [n] (int64) in every layer."""
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[tgt_loc] = buffer[src_loc]
