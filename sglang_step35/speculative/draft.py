"""The draft side: one runner holding every MTP layer, and the chain that runs them.

Stock multi-layer EAGLE builds one model runner, one KV pool and one forward batch per MTP layer.
Here the layers are one model with one pool of S layers: a pass plans its attention once, and the
weights are read once.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from sglang.srt.configs.draft_parallel import DraftParallelSpec, DraftTPExecution
from sglang.srt.layers.moe.utils import draft_model_build_scope, speculative_moe_backend_context
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.base_spec_worker import EagleDraftWorkerBase
from sglang.srt.speculative.draft_parallel import resolve_draft_parallel_layout
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput
from sglang.srt.speculative.spec_utils import draft_pp_context, draft_tp_context
from torch import Tensor

from sglang_step35.speculative.device import (
    attach_draft_attention,
    capture_graphs,
    plan_draft_attention,
    rounds_heads,
    writes_kv_alone,
)
from sglang_step35.speculative.pass_input import MTPPassInput
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.spans import MTP, spanned
from sglang_step35.speculative.window import CatchUp, RoundWindow, WindowReader

if TYPE_CHECKING:
    from sglang_step35.speculative.graphs import CapturedPass

logger = logging.getLogger(__name__)
_FEW_ROWS = 8  # of a request: describing a second pass costs more than they do in the last layer


class EagerPass:
    """One pass of the MTP layers, kernel by kernel. Letters: B requests, R rows, V vocabulary."""

    def __init__(self, runner, forward_batch: ForwardBatch, rows: MTPPassInput, hidden: Tensor):
        """hidden: [R, H], the backbone's hidden states before the final norm."""
        plan_draft_attention(runner, forward_batch, rows)
        self.layers = runner.model.start_pass(rows.positions, hidden, rows.last, forward_batch)
        self.rows = rows

    @property
    def hidden(self) -> Tensor:
        """[R, H], of the layer that ran last."""
        return self.layers.hidden

    def logits(self, layer: int) -> Tensor:
        """Run a layer; [B, V], its prediction after each request's last row."""
        return self.layers.logits(layer, self._tokens(layer))

    def forward(self, layer: int) -> None:
        """Run a layer for the next one alone."""
        self.layers.forward(layer, self._tokens(layer))

    def write_kv(self, layer: int) -> None:
        """Of a layer that no other follows, only what later passes read."""
        self.layers.write_kv(layer, self._tokens(layer))

    def _tokens(self, layer: int) -> Tensor:
        return self.rows.line[layer:].index_select(0, self.rows.base)

    def put(self, layer: int, drafts: Tensor) -> None:
        """Let the next layer read these drafts [B]."""
        self.rows.line[layer:].index_copy_(0, self.rows.draft_at, drafts)


class MTPDraftWorker(EagleDraftWorkerBase):
    """Owner of the MTP layers' runner; kept: SGLang's model loading and pools, replaced: drafting.

    Letters: B requests, R rows, H hidden size, V vocabulary, S MTP layers.
    """

    def __init__(self, server_args, gpu_id: int, nccl_port: int, target_worker: TpModelWorker):
        super().__init__()
        # The draft keeps the target's tensor-parallel layout.
        self.parallel_layout = resolve_draft_parallel_layout(
            DraftParallelSpec(tp_execution=DraftTPExecution.TARGET_LAYOUT)
        )
        with self._draft_scope(), draft_model_build_scope():
            self.draft_worker = TpModelWorker(
                server_args=server_args,
                gpu_id=gpu_id,
                nccl_port=nccl_port,
                is_draft_worker=True,
                # The draft runs at absolute target positions.
                context_length=target_worker.model_runner.model_config.context_len,
            )
        self.draft_runner = self.draft_worker.model_runner
        self.model = self.draft_runner.model
        self.graphs = None
        self.reader: WindowReader | None = None  # of the rounds' state, where graphs read it
        # Before the KV pools are sized: heads that differ from the backbone's take memory here.
        self.model.share_with(target_worker.model_runner.model)
        if rounds_heads(self.draft_runner, get_spec()):
            logger.info("%d heads in fewer bits for drafts", self.model.tables.round_heads())

    def alloc_memory_pool(self, **pools) -> None:
        """Allocate the S-layer draft KV pool over the target's slots."""
        self.draft_worker.alloc_memory_pool(**pools)

    def init_attention_backends(self) -> None:
        with self._draft_scope():
            self.draft_worker.init_attention_backends()
            attach_draft_attention(self.draft_runner)

    def init_cuda_graphs(self) -> None:
        with self._draft_scope():
            super().init_cuda_graphs()

    def _capture_cuda_graphs(self) -> None:
        self.graphs = capture_graphs(self.draft_runner, MTPSettings.from_spec(get_spec()), self.reader)

    def draft(self) -> None:
        """Unused: drafts come out of the pass that extends the MTP layers' KV."""

    def draft_extend(self) -> None:
        """Unused, see `run`."""

    @spanned(MTP)
    @torch.inference_mode()
    def extend(self, batch, rows: MTPPassInput, hidden: Tensor, depth: int, sampler) -> None:
        """Run the first `depth` MTP layers over a prefill's rows: write their KV, and choose drafts with the sampler.

        Without a sampler no prompt ends here, and nobody reads logits. A layer's KV is computed from the output of
        the layer before it, so that of the last layer only what predicts a draft is read: its last row.
        hidden: [R, H], see `run`.
        """
        last = depth - 1
        many = sampler is None or len(rows.positions) > _FEW_ROWS * len(rows.row_counts)
        narrow = many and writes_kv_alone(self.draft_runner)
        with self._eager_pass(batch, rows, hidden) as layers:
            for layer in range(last if narrow else depth):
                if sampler is None:
                    layers.forward(layer)
                else:
                    layers.put(layer, sampler(layer, layers.logits(layer)))
            if narrow:
                layers.write_kv(last)
            hidden = layers.hidden
        if narrow and sampler is not None:
            with self._eager_pass(batch, rows.last_rows(), hidden[rows.last]) as layers:
                layers.put(last, sampler(last, layers.logits(last)))

    @spanned(MTP)
    @torch.inference_mode()
    def run(self, batch, window: RoundWindow | CatchUp, depth: int, sampler) -> None:
        """Take in what was verified and run the MTP layers over the window: write their KV, and choose drafts of the
        first `depth` of them, fewer when the sampler is done before.

        sampler: called with (layer, logits [B, V]), returns the layer's drafts [B] int64.
        """
        last = sampler.num_steps - 1
        if batch.forward_mode.is_target_verify():
            batch.forward_mode = ForwardMode.DRAFT_EXTEND_V2
        with self._pass(batch, window) as layers:
            for layer in range(last + 1):
                if layer < depth:
                    layers.put(layer, sampler(layer, layers.logits(layer)))
                    depth = layer + 1 if sampler.done else depth
                elif layer < last or not writes_kv_alone(self.draft_runner):
                    layers.forward(layer)
                else:
                    layers.write_kv(layer)

    def _pass(self, batch, window: RoundWindow | CatchUp):
        if self.graphs is not None and self.graphs.serves(batch.forward_mode, window):
            return self._captured_pass(window)
        return self._eager_pass(batch, *window.rows())

    @contextmanager
    def _eager_pass(self, batch, rows: MTPPassInput, hidden: Tensor) -> Iterator[EagerPass]:
        if rows.ends_cpu is None:
            rows = replace(rows, ends_cpu=rows.ends.cpu())  # attention plans an eager pass on the host
        forward_batch = self._forward_batch(batch, rows, hidden)
        with self._draft_scope(), self._forward_scope(forward_batch):
            yield EagerPass(self.draft_runner, forward_batch, rows, hidden)

    @contextmanager
    def _captured_pass(self, window: RoundWindow) -> "Iterator[CapturedPass]":
        context = ForwardContext(attn_backend=self.draft_runner.attn_backend)
        with self._draft_scope(), forward_context(context):
            yield self.graphs.begin(window)

    def _forward_batch(self, batch, rows: MTPPassInput, hidden: Tensor) -> ForwardBatch:
        """SGLang's description of the pass; mutates `batch`, which the scheduler rolls back."""
        batch.spec_info = EagleDraftExtendInput(
            hidden_states=hidden,
            positions=rows.positions,
            num_tokens_per_req=max(rows.row_counts),
            num_tokens_for_logprob_per_req=1,
        )
        counts, ends = rows.row_counts, rows.ends_cpu
        assert ends is not None
        batch.input_ids = rows.line[rows.base]
        batch.out_cache_loc = rows.slots
        batch.extend_num_tokens = len(rows.positions)
        batch.seq_lens, batch.seq_lens_cpu = rows.ends, ends
        batch.extend_lens = counts
        batch.prefix_lens = [max(0, end - n) for end, n in zip(ends.tolist(), counts, strict=True)]
        batch.seq_lens_sum = int(ends.sum())
        return ForwardBatch.init_new(
            batch,
            self.draft_runner,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=True,
        )

    @contextmanager
    def _draft_scope(self):
        with ExitStack() as stack:
            stack.enter_context(draft_tp_context(self.parallel_layout))
            stack.enter_context(draft_pp_context())
            stack.enter_context(speculative_moe_backend_context())
            yield

    def _forward_scope(self, forward_batch: ForwardBatch):
        return forward_context(
            ForwardContext(attn_backend=self.draft_runner.attn_backend),
            forward_batch=forward_batch,
        )
