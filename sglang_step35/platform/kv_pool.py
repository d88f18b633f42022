"""KV pool for devices without Triton."""

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool


class PortableMHATokenToKVPool(MHATokenToKVPool):
    """SGLang's multi-head KV pool; kept: buffers and addressing, replaced: the Triton slot copy."""

    def _create_buffers(self) -> None:
        """Raises MemoryError, with the flag to set, where the host does not give that much."""
        try:
            super()._create_buffers()
        except RuntimeError as error:  # torch's allocator
            if "allocate memory" not in str(error):
                raise
            raise MemoryError(
                f"no memory for the KV of {self.size} tokens in {self.layer_num} layers: set --max-total-tokens below "
                f"that, end other processes, or raise this one's limit (ulimit -v, the container's)"
            ) from error

    def _init_kv_copy_and_warmup(self) -> None:
        # Stock compiles and launches a Triton copy kernel here.
        self._kv_copy_config = None

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Copy slots src_loc [n] to tgt_loc [n] (int64) in every layer."""
        for buffer in (*self.k_buffer, *self.v_buffer):
            buffer[tgt_loc] = buffer[src_loc]
