"""Stand-ins for FlashInfer's wrappers: its definition in plain torch, from what was planned and nothing else.

Letters: T rows of a pass, H query heads, N key/value heads, D head size, B requests.
"""

import inspect

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer")  # for its signatures


class Wrapper:
    """Base of both: keeps a plan, in the given buffers under CUDA graphs, and attends from it."""

    planned: list["Wrapper"] = []  # wrappers in the order of their plans
    same_window = True  # whether a plan and its runs must name the same window, as the kernel's work split needs

    def __init__(self, workspace, layout, backend="auto", use_cuda_graph=False, use_tensor_cores=None, **buffers):
        self.workspace, self.use_tensor_cores = workspace, use_tensor_cores
        self.is_cuda_graph_enabled = use_cuda_graph
        self.buffers, self._custom_mask_buf = buffers, buffers.get("custom_mask_buf")
        self.device = workspace.device
        for name, buffer in buffers.items():
            setattr(self, f"_{name.removesuffix('_buf').removesuffix('_buffer')}_buf", buffer)

    def keep(self, name: str, value: torch.Tensor) -> None:
        assert value.dtype == torch.int32, name
        if self.is_cuda_graph_enabled:
            buffer = getattr(self, name)
            buffer[: len(value)].copy_(value)  # raises where it does not fit
        else:
            setattr(self, name, value)

    def begin_forward(self, *arguments, **keywords):
        real = getattr(flashinfer, self.stands_for)
        inspect.signature(real.plan).bind(self, *arguments, **keywords)  # raises TypeError
        Wrapper.planned.append(self)
        self.plan(*arguments, **keywords)

    def seen(self, row: int, rows: int, length: int) -> torch.Tensor:
        """[length] bool: which of a request's listed keys its row reads. Both are aligned at their ends."""
        own = length - rows + row
        key = torch.arange(length)
        mask = key <= own if self.causal else torch.ones(length, dtype=torch.bool)
        return mask & (key >= own - self.window_left) if self.window_left >= 0 else mask

    def attend(self, q, cache, scale, qo_indptr):
        """q: [T, H, D]; cache: (k, v), each [slots, N, D]. The full precision definition, row by row."""
        out = torch.zeros(q.shape, dtype=torch.float64)
        kv, slots = self._paged_kv_indptr_buf.tolist(), self._paged_kv_indices_buf
        masked = 0
        for b in range(len(qo_indptr) - 1):
            listed = slots[kv[b] : kv[b + 1]].long()
            k, v = (part[listed].double().repeat_interleave(q.shape[1] // part.shape[1], 1) for part in cache)
            rows, length = qo_indptr[b + 1] - qo_indptr[b], len(listed)
            for row in range(rows):
                seen = self.seen(row, rows, length)
                if self.custom is not None:
                    at = masked + row * length
                    seen = self.custom[at : at + length]
                scores = torch.einsum("hd,khd->hk", q[qo_indptr[b] + row].double(), k) * scale
                weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
                out[qo_indptr[b] + row] = torch.einsum("hk,khd->hd", weights, v)
            masked += rows * length
        return out.to(q.dtype)


class PrefillWrapper(Wrapper):
    stands_for = "BatchPrefillWithPagedKVCacheWrapper"

    def plan(self, qo, kv, slots, last_page, q_heads, kv_heads, size, page, custom_mask=None, causal=False,
             window_left=-1, **unused):  # fmt: skip
        self.keep("_qo_indptr_buf", qo)
        self.keep("_paged_kv_indptr_buf", kv)
        self.keep("_paged_kv_indices_buf", slots)
        self.heads, self.planned_window, self.custom = (q_heads, kv_heads, size), window_left, custom_mask
        assert page == 1 and len(last_page) == len(qo) - 1 and len(slots) >= int(kv[-1])

    def forward(self, q, cache, causal, sm_scale, window_left, logits_soft_cap, k_scale, v_scale):
        assert (q.shape[1], cache[0].shape[1], q.shape[2]) == self.heads
        assert not self.same_window or window_left == self.planned_window
        self.causal, self.window_left = causal, window_left
        return self.attend(q, cache, sm_scale, self._qo_indptr_buf.tolist())


class DecodeWrapper(Wrapper):
    stands_for = "BatchDecodeWithPagedKVCacheWrapper"
    causal, window_left, custom = False, -1, None

    def plan(self, kv, slots, last_page, q_heads, kv_heads, size, page, global_override_indptr_cpu=None, **unused):
        self.keep("_paged_kv_indptr_buf", kv)
        if not self.is_cuda_graph_enabled:
            self.keep("_paged_kv_indices_buf", slots)
        self.heads = (q_heads, kv_heads, size)
        if global_override_indptr_cpu is not None:
            assert global_override_indptr_cpu.tolist() == kv.tolist()

    def forward(self, q, cache, sm_scale, logits_soft_cap, k_scale, v_scale):
        assert (q.shape[1], cache[0].shape[1], q.shape[2]) == self.heads
        return self.attend(q, cache, sm_scale, list(range(len(q) + 1)))


def fast_decode_plan(wrapper, *arguments, **keywords):
    inspect.signature(flashinfer.fast_decode_plan).bind(wrapper, *arguments, **keywords)
    DecodeWrapper.plan(wrapper, *arguments, **keywords)
