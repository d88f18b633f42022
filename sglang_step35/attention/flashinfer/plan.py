"""What FlashInfer is asked to read: the rows of a pass, and one plan for each kind of layer.

Letters: B requests of a pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind
from sglang.srt.speculative.spec_info import SpecInputType
from torch import Tensor

from sglang_step35.config import LayerSpec


@dataclass(frozen=True)
class LayerKind:
    """What a plan fixes for the sliding or the full layers of a runner.

    num_qo_heads, num_kv_heads: of this rank. earlier: keys a row reads before its own, -1 for all (FlashInfer's
    `window_left`).
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    earlier: int

    @property
    def group(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


def layer_kinds(layers: Sequence[LayerSpec], ranks: int) -> list[LayerKind | None]:
    """[sliding, full], in the order of SGLang's two wrappers; None where the runner has no such layer.

    ranks: tensor-parallel size of the attention. With more ranks than key/value heads each rank keeps one.
    """
    kinds = []
    for sliding in (True, False):
        found = {
            LayerKind(a.num_heads // ranks, max(1, a.num_kv_heads // ranks), a.head_dim, a.earlier_keys)
            for a in (layer.attention for layer in layers)
            if (a.window is not None) == sliding
        }
        if len(found) > 1:
            raise ValueError(f"layers of one kind with different attention: {sorted(map(str, found))}")
        kinds.append(found.pop() if found else None)
    return kinds


@dataclass(frozen=True)
class QueryRows:
    """The rows of a pass: of each request the `counts` positions before `ends`, which may begin before position 0.

    counts, ends: [B] int64. width: the common count, None in a prefill. ends_cpu: host copy where it is known.
    num_keys: at least ends.sum(), a host int.
    """

    counts: Tensor
    ends: Tensor
    width: int | None
    ends_cpu: Tensor | None
    num_keys: int

    def starts(self, earlier: int) -> Tensor:
        """[B] first position read: the first row's window, not before position 0."""
        if earlier < 0:
            return torch.zeros_like(self.ends)
        return (self.ends - self.counts - earlier).clamp(min=0)

    def key_bound(self, earlier: int) -> int:
        """At least as many entries as all requests read, without waiting for the device."""
        if earlier < 0 or self.width is None:
            return self.num_keys
        return min(self.num_keys, len(self.ends) * (earlier + self.width))

    @property
    def begins_early(self) -> bool:
        known = self.width is not None and self.ends_cpu is not None
        return known and bool((self.ends_cpu < self.width).any())

    def mask(self, earlier: int) -> Tensor:
        """[sum of width * keys read] bool, what FlashInfer's causal mask and window mean for these rows."""
        parts = []
        for end in self.ends_cpu.tolist():
            first = 0 if earlier < 0 else max(0, end - self.width - earlier)
            row = torch.arange(end - self.width, end)[:, None]  # positions, [width, 1]
            key = torch.arange(first, end)
            seen = key <= row
            if earlier >= 0:
                seen &= key >= row - earlier
            parts.append(seen.flatten())
        return torch.cat(parts)


def query_rows(seq_lens, seq_lens_cpu, seq_lens_sum, prefix_lens, spec_info) -> QueryRows:
    """The rows of a prefill (no spec_info), a verify pass or a draft extend; seq_lens as SGLang has them there."""
    total = int(seq_lens.sum()) if seq_lens_sum is None else seq_lens_sum
    if spec_info is None:
        return QueryRows(seq_lens - prefix_lens, seq_lens, None, seq_lens_cpu, total)
    if spec_info.spec_input_type == SpecInputType.EAGLE_VERIFY and spec_info.topk == 1:
        width = spec_info.draft_token_num
        ahead = width  # seq_lens does not count the verify window
    elif spec_info.spec_input_type == SpecInputType.EAGLE_DRAFT_EXTEND:
        width, ahead = spec_info.num_tokens_per_req, 0
    else:
        # A tree needs its mask; a chain is causal.
        raise NotImplementedError(
            f"--attention-backend flashinfer verifies chains only (--speculative-eagle-topk 1), "
            f"not {spec_info.spec_input_type}: use fa3 (Hopper) or triton"
        )
    return QueryRows(
        counts=torch.full_like(seq_lens, width),
        ends=seq_lens + ahead,
        width=width,
        ends_cpu=None if seq_lens_cpu is None else seq_lens_cpu + ahead,
        num_keys=total + ahead * len(seq_lens),
    )


class PrefillPlanner(stock.FlashInferIndicesUpdaterPrefill):
    """Kept: what SGLang's constructor collects; replaced: every plan, always paged and causal over the slots read."""

    def __init__(self, model_runner, attn_backend):
        super().__init__(model_runner, attn_backend)
        self.kinds = attn_backend.kinds
        self.update = self.plan_pass

    def plan_pass(
        self, req_pool_indices, seq_lens, seq_lens_cpu, seq_lens_sum, prefix_lens, prefill_wrappers,
        use_ragged, encoder_lens, spec_info, fixed_split_size=None, *, plan, **unsupported,
    ) -> None:  # fmt: skip
        """Plan the wrapper of each kind of layer; parameters as SGLang's `update`. seq_lens, prefix_lens: [B]."""
        assert not use_ragged
        rows = query_rows(seq_lens, seq_lens_cpu, seq_lens_sum, prefix_lens, spec_info)
        for kind, wrapper in zip(self.kinds, prefill_wrappers, strict=True):
            if kind is not None:
                self._plan_kind(kind, wrapper, rows, req_pool_indices, plan, fixed_split_size)

    def _plan_kind(self, kind: LayerKind, wrapper, rows: QueryRows, requests, plan, split_size) -> None:
        starts = rows.starts(kind.earlier)
        lens = rows.ends - starts
        kv_indptr = _indptr(lens)
        mask = None
        if rows.begins_early and not wrapper.is_cuda_graph_enabled:
            # The causal kernel subtracts rows from keys unsigned: with fewer keys than rows it can leave whole tiles
            # unmasked.
            mask = rows.mask(kind.earlier).to(lens.device)
        wrapper.begin_forward(
            _indptr(rows.counts),
            kv_indptr,
            self._slots(kind, requests, starts, lens, kv_indptr, rows.key_bound(kind.earlier), plan),
            self.kv_last_page_len[: len(lens)],
            kind.num_qo_heads,
            kind.num_kv_heads,
            kind.head_dim,
            1,
            custom_mask=mask,
            causal=True,
            # The kernel splits its work by the window planned here, so it must be the one it runs with.
            window_left=kind.earlier,
            q_data_type=self.q_data_type,
            kv_data_type=self.data_type,
            non_blocking=True,
            fixed_split_size=split_size,
        )

    def _slots(self, kind: LayerKind, requests, starts, lens, kv_indptr, bound: int, plan) -> Tensor:
        """[bound] int32, the slots of positions [starts, starts + lens) of every request, in the kind's pool."""
        translator = self.attn_backend.kv_index_translator
        own_pool = kind.earlier >= 0 and self._swa_kv_pool is not None
        translated = own_pool and translator.reads_are_translated
        # Zeros, because entries past the last key are translated with the others.
        slots = torch.zeros(bound, dtype=torch.int32, device=lens.device)
        translator.pack_read_stream(
            plan,
            req_pool_indices=requests,
            seq_lens=lens,
            indptr=kv_indptr,
            out=slots,
            kv_start_idx=starts,
            kind=IdSpaceKind.SLIDING_WINDOW if translated else IdSpaceKind.FULL,
            num_token_blocks=None,
            kv_lens_sum=bound,
        )
        if own_pool and not translated:
            slots = self._swa_kv_pool.translate_loc_from_full_to_swa(slots).int()
        return slots


def _indptr(lens: Tensor) -> Tensor:
    """[B + 1] int32 running sums of [B]."""
    return torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))


class DecodePlanner(stock.FlashInferIndicesUpdaterDecode):
    """Kept: SGLang's planning, which reads the right keys; replaced: heads, which are those of each kind of layer."""

    def __init__(self, model_runner, attn_backend):
        super().__init__(model_runner, attn_backend)
        self.kinds = attn_backend.kinds

    def call_begin_forward(self, wrapper, paged_kernel_lens, paged_kernel_lens_sum, kv_indptr, *rest, **more):
        kinds = zip(self.kinds, self.kv_indptr, strict=True)
        kind = next(kind for kind, buffer in kinds if buffer is kv_indptr)
        if kind is None:
            return
        self.num_qo_heads, self.num_kv_heads = kind.num_qo_heads, kind.num_kv_heads
        self.head_dim = kind.head_dim
        super().call_begin_forward(wrapper, paged_kernel_lens, paged_kernel_lens_sum, kv_indptr, *rest, **more)
