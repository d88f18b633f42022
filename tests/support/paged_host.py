"""Hybrid KV pools and this package's attention backend around some layers, requests with slots in no order."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_step35.attention.portable.backend import PortableAttnBackend
from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool
from tests.support import model_host

REQUESTS, LENGTH, SLOTS = 4, 160, 800


class PagedHost:
    """layers: SGLang's attentions, which stand in the pools by their number."""

    def __init__(self, layers: list[RadixAttention], dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype
        self.pool = self._pools()
        table = ReqToTokenPool(REQUESTS, LENGTH, "cpu", enable_memory_saver=False)
        table.req_to_token[1:] = torch.randperm(SLOTS - 1)[: LENGTH * REQUESTS].view(REQUESTS, LENGTH).int() + 1
        self.table = table.req_to_token[1:]
        runner = SimpleNamespace(device="cpu", req_to_token_pool=table, token_to_kv_pool=self.pool)
        self.backend = PortableAttnBackend(runner)

    def _pools(self) -> SWAKVPool:
        kinds = [layer.sliding_window_size >= 0 for layer in self.layers]
        pool = SWAKVPool(
            SLOTS,
            SLOTS,
            1,
            self.dtype,
            self.layers[0].tp_k_head_num,
            self.layers[0].qk_head_dim,
            swa_attention_layer_ids=[number for number, slides in enumerate(kinds) if slides],
            full_attention_layer_ids=[number for number, slides in enumerate(kinds) if not slides],
            device="cpu",
            token_to_kv_pool_class=PortableMHATokenToKVPool,
        )
        pool.register_mapping(torch.cat((torch.tensor([0]), torch.randperm(SLOTS) + 1)))
        return pool

    @contextmanager
    def planned(self, spans, slots: torch.Tensor | None = None) -> Iterator:
        """SGLang's description of a pass; spans: (request, ids, first position, end) of the rows."""
        places = [(request, position) for request, _, first, end in spans for position in range(first, end)]
        batch = model_host.batch_of([ids[position] for _, ids, first, end in spans for position in range(first, end)])
        batch.batch_size = len(spans)
        batch.req_pool_indices = torch.tensor([request + 1 for request, *_ in spans])
        batch.seq_lens = torch.tensor([end for *_, end in spans])
        batch.extend_seq_lens_cpu = [end - first for *_, first, end in spans]
        batch.extend_seq_lens = torch.tensor(batch.extend_seq_lens_cpu)
        batch.positions = torch.tensor([position for _, position in places])
        batch.out_cache_loc = torch.stack([self.table[place] for place in places]).long() if slots is None else slots
        with forward_context(ForwardContext(attn_backend=self.backend), forward_batch=batch):
            self.backend.init_forward_metadata(batch)
            yield batch

    def written(self) -> list[torch.Tensor]:
        """Keys and values of every layer."""
        return [part for layer in range(len(self.layers)) for part in self.pool.get_kv_buffer(layer)]


def prompts(*lengths: int) -> list[list[int]]:
    """Random ids, the same for the same lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]
