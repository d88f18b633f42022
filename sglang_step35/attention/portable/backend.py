"""SGLang attention backend for CPUs in torch and numba: full and sliding-window layers on SGLang's KV pools.

Letters: T query rows of a pass (flat over requests), B requests, H query heads, N key/value heads, D head size.
"""

from collections.abc import Sequence

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

from sglang_step35.attention.portable.kernel_calls import KernelCall, KVReader
from sglang_step35.attention.portable.paged_call import NAMES, PagedCall, SlotTable, prepare, reads
from sglang_step35.attention.portable.paged_steps import PagedSteps
from sglang_step35.attention.portable.plan import PassRows, cut_pass
from sglang_step35.config import ALL_KEYS
from sglang_step35.names import ATTENTION_BACKEND

CALL_BYTES = 4 << 20  # of keys read by one batched call; more leaves the caches


def create_backend(runner) -> "PortableAttnBackend":
    """Factory for SGLang's attention registry (`register_attention_backend`)."""
    return PortableAttnBackend(runner)


class PortableAttnBackend(AttentionBackend):
    """Kept: SGLang's backend contract; replaced: everything it computes.

    Against SGLang's torch_native: sliding layers read their window only, from translated slots of the sliding pool;
    all modes, verify and draft-extend among them, are one description of rows; what does not depend on the layer is
    computed once per pass.
    """

    def __init__(self, model_runner):
        """Raises ValueError for a device other than CPU or for encoder-decoder models."""
        super().__init__()
        if torch.device(model_runner.device).type != "cpu":
            raise ValueError(
                f"attention backend {ATTENTION_BACKEND} runs on CPUs only, not on {model_runner.device}: leave out "
                f"--attention-backend there and SGLang picks a kernel for the device"
            )
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self._reader = KVReader()
        prepare(self.token_to_kv_pool.dtype)  # now, not in front of the first request
        self._hybrid = isinstance(self.token_to_kv_pool, SWAKVPool)
        self._plan(PassRows(self.req_to_token.new_empty(0, dtype=torch.int64), [], []), None)

    def support_triton(self) -> bool:
        return False

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata(self, forward_batch) -> None:
        """Plan a pass from SGLang's forward batch, whatever its mode."""
        counts, ends = batch_rows(forward_batch)
        self.plan_rows(forward_batch.req_pool_indices[: len(counts)], counts, ends, forward_batch.out_cache_loc)

    def plan_rows(
        self,
        req_pool_indices: Tensor,
        q_lens: Sequence[int] | Tensor,
        kv_lens: Sequence[int] | Tensor,
        out_cache_loc: Tensor | None,
    ) -> None:
        """Plan a pass: q_lens[b] rows of request b, of which the last stands at position kv_lens[b] - 1.

        req_pool_indices: [B]. out_cache_loc: [T] slots (of the full pool) the rows' keys and values are written to.
        Rows before position 0 are allowed as padding; what they return is finite as long as the pool is, and
        meaningless.
        """
        rows = PassRows(req_pool_indices.long(), _ints(q_lens), _ints(kv_lens))
        self._plan(rows, out_cache_loc)

    def _plan(self, rows: PassRows, out_cache_loc: Tensor | None) -> None:
        self._rows = rows
        self._calls: dict[tuple[int, bool], list[KernelCall]] = {}
        translate = self._hybrid and out_cache_loc is not None
        self._swa_out_loc = self.token_to_kv_pool.translate_loc_from_full_to_swa(out_cache_loc) if translate else None

    def kind(self, layer) -> tuple[int, bool]:
        """Which keys a layer reads: how many before the row's own, and whether from the sliding pool."""
        window = layer.sliding_window_size
        earlier_keys = ALL_KEYS if window is None or window < 0 else window
        return earlier_keys, self._hybrid and self.token_to_kv_pool.layers_mapping[layer.layer_id][1]

    def steps(self, layers: Sequence, rows: int, dtype: torch.dtype) -> PagedSteps | None:
        """These layers' attention as steps of a graph, for passes that `PagedSteps.plan` accepts; None without any."""
        return PagedSteps(self, layers, rows, dtype) if dtype in NAMES else None

    def paged_call(self, layer, keys: Tensor, rows: int, dtype: torch.dtype) -> PagedCall | None:
        """The one call that computes all rows of a planned pass of so many; None where it takes others."""
        calls = self._calls_for(layer, keys, dtype)
        whole = len(calls) == 1 and self._rows.total == rows and isinstance(calls[0], PagedCall)
        return calls[0] if whole else None

    def new_slots(self, layer, forward_batch) -> Tensor:
        """[T] int64, of the layer's pool: where the planned rows' keys and values belong."""
        _, in_swa_pool = self.kind(layer)
        return (self._swa_out_loc if in_swa_pool else forward_batch.out_cache_loc).long()

    def _calls_for(self, layer, keys: Tensor, dtype: torch.dtype) -> list[KernelCall]:
        """Kernel calls of the layer's kind, cut at the first layer that asks. keys: its pool; dtype: of its queries."""
        kind = earlier_keys, in_swa_pool = self.kind(layer)
        if kind not in self._calls:
            find = self._find_swa_slots if in_swa_pool else self._find_slots
            table = self._table(in_swa_pool) if reads(keys, dtype) else None
            self._calls[kind] = cut_pass(self._rows, earlier_keys, find, CALL_BYTES // keys[0].nbytes, table)
        return self._calls[kind]

    def _table(self, in_swa_pool: bool) -> SlotTable:
        return SlotTable(self.req_to_token, self.token_to_kv_pool.full_to_swa_index_mapping if in_swa_pool else None)

    def _find_slots(self, requests: Tensor, positions: Tensor) -> Tensor:
        return self.req_to_token[requests, positions].long()

    def _find_swa_slots(self, requests: Tensor, positions: Tensor) -> Tensor:
        return self.token_to_kv_pool.translate_loc_from_full_to_swa(self._find_slots(requests, positions))

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def write_kv(self, k: Tensor, v: Tensor, layer, forward_batch) -> None:
        """Put keys and values [T, N, D] of the planned rows into the pool."""
        slots = KVWriteLoc(forward_batch.out_cache_loc, self._swa_out_loc)
        self.token_to_kv_pool.set_kv_buffer(layer, slots, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer, forward_batch, save_kv_cache: bool) -> Tensor:
        """q: [T, H * D]. k, v: [T, N, D]. Returns [T, H * D]; rows behind the planned ones (padding) are 0."""
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER or layer.logit_cap:
            raise NotImplementedError(
                f"attention backend {ATTENTION_BACKEND} computes causal decoder attention without logit cap"
            )
        if save_kv_cache and k is not None:
            self.write_kv(k, v, layer, forward_batch)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        reader = self._reader.of_layer(keys, values)
        for call in self._calls_for(layer, keys, q.dtype):
            call.run(q, reader, layer.scaling, out)
        if len(out) > self._rows.total:
            out[self._rows.total :] = 0
        return out.flatten(1)


def batch_rows(forward_batch) -> tuple[list[int], list[int]]:
    """(rows, end) of every request of an SGLang forward batch; see PassRows.

    `seq_lens` counts the pass's own rows in every mode but TARGET_VERIFY, where it is the committed length.
    """
    mode = forward_batch.forward_mode
    size = forward_batch.batch_size
    if mode.is_idle() or size == 0:
        return [], []
    # On a CPU the device tensor is as cheap to read as its host mirror, and never stale.
    lengths = forward_batch.seq_lens[:size].tolist()
    if mode.is_decode():
        return [1] * size, lengths
    if mode.is_target_verify():
        count = forward_batch.spec_info.draft_token_num
        return [count] * size, [length + count for length in lengths]
    counts = forward_batch.extend_seq_lens_cpu
    counts = forward_batch.extend_seq_lens[:size] if counts is None else counts[:size]
    return _ints(counts), lengths


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
