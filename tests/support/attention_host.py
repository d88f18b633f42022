"""A stand-in for SGLang's model runner around real KV pools, with a record of all keys to check attention against.

Letters: T query rows, H query heads, N key/value heads, D head size.
"""

from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_step35.attention.portable.backend import PortableAttnBackend
from sglang_step35.platform.kv_pool import PortableMHATokenToKVPool

FULL_HEADS, WINDOW_HEADS, KV_HEADS, SIZE = 4, 6, 2, 16
EARLIER = 7  # a window of 8 keys
SCALE = 0.4
SLOTS, SWA_SLOTS, ROWS, LENGTH = 1024, 512, 8, 256


class Host:
    """One full layer (0) and one sliding layer (1) over one set of pools.

    size: of a head; the compiled kernel reads 16, not 8.
    `known[request][position]` is [layer, k or v, N, D] as last written there.
    """

    device = "cpu"

    def __init__(self, page_size: int = 1, hybrid: bool = True, dtype: torch.dtype = torch.float32, size: int = SIZE):
        self.page_size, self.dtype, self.size = page_size, dtype, size
        self.req_to_token_pool = ReqToTokenPool(ROWS, LENGTH, "cpu", enable_memory_saver=False)
        build = self._hybrid_pool if hybrid else self._single_pool
        self.token_to_kv_pool, self.allocator, parts = build()
        for part in parts:  # slots in no order, as after hours of serving
            part.free_pages = part.free_pages[torch.randperm(len(part.free_pages))]
        self.layers = [
            RadixAttention(FULL_HEADS, self.size, SCALE, KV_HEADS, 0),
            RadixAttention(WINDOW_HEADS, self.size, SCALE, KV_HEADS, 1, sliding_window_size=EARLIER),
        ]
        self.known: dict[int, list[torch.Tensor]] = {}
        self.backend = PortableAttnBackend(self)

    def _hybrid_pool(self):
        pool = SWAKVPool(
            SLOTS,
            SWA_SLOTS,
            self.page_size,
            self.dtype,
            KV_HEADS,
            self.size,
            swa_attention_layer_ids=[1],
            full_attention_layer_ids=[0],
            device="cpu",
            token_to_kv_pool_class=PortableMHATokenToKVPool,
        )
        allocator = SWATokenToKVPoolAllocator(SLOTS, SWA_SLOTS, self.page_size, self.dtype, "cpu", pool, False)
        return pool, allocator, (allocator.full_attn_allocator, allocator.swa_attn_allocator)

    def _single_pool(self):
        pool = PortableMHATokenToKVPool(
            SLOTS, self.page_size, self.dtype, KV_HEADS, self.size, 2, "cpu", enable_memory_saver=False
        )
        if self.page_size == 1:
            allocator = TokenToKVPoolAllocator(SLOTS, self.dtype, "cpu", pool, False)
        else:
            allocator = PagedTokenToKVPoolAllocator(SLOTS, self.page_size, self.dtype, "cpu", pool, False)
        return pool, allocator, (allocator,)

    def allocate(self, request: int, until: int) -> None:
        """Give positions up to `until` of a request their slots."""
        row = self.req_to_token_pool.req_to_token[request]
        have = int((row > 0).sum())
        if until <= have:
            return
        if self.page_size == 1:
            row[have:until] = self.allocator.alloc(until - have).int()
            return
        old, new = torch.tensor([have]), torch.tensor([until])
        last = row[have - 1 : have].long() if have else torch.tensor([-1])
        row[have:until] = self.allocator.alloc_extend(old, old, new, new, last, until - have).int()

    def batch(self, mode: ForwardMode, spans: list[tuple[int, int, int]]) -> SimpleNamespace:
        """The fields of a ForwardBatch that a backend reads; spans = [(request, first position, end)]."""
        for request, _, end in spans:
            self.allocate(request, end)
        table = self.req_to_token_pool.req_to_token
        counts = [end - first for _, first, end in spans]
        verify = mode.is_target_verify()
        slots = [table[request, position] if position >= 0 else 0 for request, position in self.rows(spans)]
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(spans),
            req_pool_indices=torch.tensor([request for request, _, _ in spans], dtype=torch.int64),
            seq_lens=torch.tensor([first if verify else end for _, first, end in spans], dtype=torch.int64),
            out_cache_loc=torch.tensor(slots, dtype=torch.int64),
            extend_seq_lens_cpu=None if verify or mode.is_decode() else counts,
            extend_seq_lens=None if verify or mode.is_decode() else torch.tensor(counts),
            spec_info=SimpleNamespace(draft_token_num=counts[0]) if verify else None,
        )

    @staticmethod
    def rows(spans: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """[(request, position)] in the order of the flat batch."""
        return [(request, position) for request, first, end in spans for position in range(first, end)]

    def attend(self, batch: SimpleNamespace, spans: list[tuple[int, int, int]]):
        """Run both layers on random rows. Returns per layer (output, expected), [T, H, D] each; expected is float64
        and NaN for rows before position 0."""
        rows, results = self.rows(spans), []
        for layer, (k, v) in zip(self.layers, self._fresh(rows), strict=True):
            q = torch.randn(len(rows), layer.tp_q_head_num * self.size).to(self.dtype)
            out = self.backend.forward(q, k, v, layer, batch)
            q, out = (rows_of.unflatten(1, (-1, self.size)) for rows_of in (q, out))
            results.append((out, self._expected(q, layer, rows)))
        return results

    def write(self, mode: ForwardMode, spans: list[tuple[int, int, int]]) -> None:
        """Random keys and values of rows that attend to nothing."""
        batch = self.batch(mode, spans)
        self.backend.init_forward_metadata(batch)
        for layer, (k, v) in zip(self.layers, self._fresh(self.rows(spans)), strict=True):
            self.backend.write_kv(k, v, layer, batch)

    def _fresh(self, rows: list[tuple[int, int]]) -> torch.Tensor:
        """[layer, k or v, T, N, D], recorded."""
        fresh = torch.randn(2, 2, len(rows), KV_HEADS, self.size).to(self.dtype)
        for i, (request, position) in enumerate(rows):
            known = self.known.setdefault(request, [])
            if position >= 0:
                known[position:] = [fresh[:, :, i]]
        return fresh

    def run(self, mode: ForwardMode, spans: list[tuple[int, int, int]]):
        """Plan and attend; see `attend`."""
        batch = self.batch(mode, spans)
        self.backend.init_forward_metadata(batch)
        return self.attend(batch, spans)

    def _expected(self, q: torch.Tensor, layer: RadixAttention, rows: list[tuple[int, int]]) -> torch.Tensor:
        found = torch.full(q.shape, torch.nan, dtype=torch.float64)
        for i, (request, position) in enumerate(rows):
            if position < 0:
                continue
            first = max(0, position - EARLIER) if layer.sliding_window_size >= 0 else 0
            seen = torch.stack(self.known[request][first : position + 1])[:, layer.layer_id].double()  # [K, k/v, N, D]
            k, v = seen.repeat_interleave(q.shape[1] // KV_HEADS, 2).unbind(1)
            weights = (torch.einsum("hd,khd->hk", q[i].double(), k) * SCALE).softmax(-1)
            found[i] = torch.einsum("hk,khd->hd", weights, v)
        return found
