"""CUDA graphs of the MTP pass behind a verify step.

SGLang's multi-layer runner has a model, a KV pool and a sampler in every layer's graph. Here each layer
of one model is a graph, and choosing drafts, which depends on what the requests ask, stays between
the graphs. In front of them one graph goes from what was verified to the rows of the pass. Letters: B requests, V
vocabulary.
"""

from functools import partial
from types import SimpleNamespace

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner import (
    DecodeCudaGraphRunner,
    ShapeKey,
    get_batch_sizes_to_capture,
    model_capture_mode,
)
from sglang.srt.model_executor.runner_backend.utils import resolve_decode_backend
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput
from torch import Tensor

from sglang_step35.speculative.pass_buffers import PassBuffers, VerifiedBuffers
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.window import RoundWindow, WindowReader


class MTPGraphRunner(DecodeCudaGraphRunner):
    """Kept: SGLang's capture loop, its memory pool, graph backends and batch sizes; replaced: what is
    captured and replayed, so that nothing of the parent's set-up runs.

    Serves passes of the settings' `pass_rows` rows per request, which all are unless rounds skip layers.
    """

    def __init__(self, runner, settings: MTPSettings, reader: WindowReader):
        self.model_runner = runner
        self.model = runner.model
        self.attn_backend = runner.attn_backend
        self.device = runner.device
        self.device_module = torch.get_device_module(self.device)
        self.num_layers = settings.num_steps
        width = self.captured_req_width = settings.pass_rows
        self._set_what_the_capture_loop_reads()
        self.capture_bs, _ = get_batch_sizes_to_capture(runner)
        self.max_bs = max(self.capture_bs)
        _fit_attention(self.attn_backend, width)
        self.attn_backend.init_cuda_graph_state(self.max_bs, self.max_bs * width)
        # A window of all its rows, so that even a dummy request has keys for each.
        self.seq_len_fill_value = width
        self.reader = reader
        hidden = (runner.model_config.hidden_size, runner.dtype, self.device)
        self.verified = VerifiedBuffers(self.max_bs, settings, *hidden)
        self.buffers = PassBuffers.allocate(self.max_bs, width, self.num_layers, *hidden)
        self.reads_end_early = _reads_end_with_the_first_layer(self.attn_backend)
        self.backend = resolve_decode_backend(self)
        with model_capture_mode():
            self.capture()

    def _set_what_the_capture_loop_reads(self) -> None:
        self.compile_bs = []
        self.attention_graph_variants = None
        self.enable_torch_compile = False
        self.enable_profile_cuda_graph = False
        self.enable_pdmux = False
        self.record_nolora_graph = False

    def warmup(self) -> None:
        """The target's runner has warmed up the kernels."""

    def capture_one_shape(self, size: int, forward, *_variant) -> None:
        """Capture the rows and every layer for batches of `size` requests."""
        self.verified.pad(size)
        self.backend.capture_one(_key(size, "rows"), partial(self._find_rows, size))
        batch = self._static_batch(size)
        after_warmup = getattr(self.attn_backend, "on_after_cuda_graph_warmup", None)
        with forward_context(ForwardContext(attn_backend=self.attn_backend), forward_batch=batch):
            self.attn_backend.init_forward_metadata_out_graph(batch, in_capture=True)
            for layer in range(self.num_layers):
                self.backend.capture_one(
                    _key(size, f"mtp{layer}"),
                    partial(self._run_layer, layer, batch),
                    post_warmup_hook=after_warmup,
                )

    def _find_rows(self, size: int) -> None:
        """From the verified tokens to the pass's buffers: what a graph records."""
        verified = self.verified.first(size)
        self.reader.remember(verified)
        rows, hidden = self.reader.rows(verified, verified.tokens.shape[1], self.captured_req_width)
        self.buffers.load(rows, hidden, verified.requests)

    def _run_layer(self, layer: int, batch: ForwardBatch) -> Tensor:
        """Logits [B, V]: what a graph records. Reads and writes nothing but buffers."""
        if layer == 0:
            self.attn_backend.init_forward_metadata_in_graph(batch)
        views = self.buffers.first(batch.batch_size)
        if layer > 0:
            views.line[views.draft_at + layer - 1] = views.drafts[:, layer - 1]
        tokens = views.line[views.base + layer]
        # Views are new objects for every layer: no graph uses what another one looked up.
        out = self.model.forward_layer(layer, tokens, views.positions, views.hidden_states, batch)
        views.hidden_states.copy_(out)
        return self.model.compute_logits(layer, out[views.last])

    def _static_batch(self, size: int) -> ForwardBatch:
        """SGLang's description of a pass over the buffers."""
        views, width = self.buffers.first(size), self.captured_req_width
        batch = ForwardBatch(
            forward_mode=ForwardMode.DRAFT_EXTEND_V2,
            batch_size=size,
            input_ids=views.base,
            req_pool_indices=views.req_pool_indices,
            seq_lens=views.seq_lens,
            seq_lens_cpu=views.seq_lens_cpu,
            seq_lens_sum=size * width,
            out_cache_loc=views.out_cache_loc,
            positions=views.positions,
            return_logprob=False,
            spec_algorithm=self.model_runner.spec_algorithm,
            spec_info=self._spec_info(views),
            capture_hidden_mode=CaptureHiddenMode.FULL,
            extend_seq_lens=views.extend_seq_lens,
            extend_seq_lens_cpu=[width] * size,
            extend_start_loc=views.extend_seq_lens.cumsum(0).int() - width,
            extend_num_tokens=size * width,
            global_num_token_non_padded_cpu=size * width,
            return_hidden_states_before_norm=True,
        )
        self.model_runner.kv_index_translator.bind_runner_slots(batch)
        return batch

    def _spec_info(self, views) -> EagleDraftExtendInput:
        spec_info = EagleDraftExtendInput(
            hidden_states=views.hidden_states,
            positions=views.positions,
            num_tokens_per_req=self.captured_req_width,
            num_tokens_for_logprob_per_req=1,
        )
        spec_info.extend_seq_lens_tensor = views.extend_seq_lens
        return spec_info

    def serves(self, mode: ForwardMode, window: RoundWindow) -> bool:
        """Whether the pass over this window was captured: one behind a verify step, not a prefill's.

        Rows before position 0, which the first round of a one-token prompt has, need a mask of FlashInfer that no
        graph holds. Where the host does not know the lengths, attention (fa3) needs none.
        """
        ends = window.ends_cpu
        fits = len(window.verified.requests) <= self.max_bs and window.num_rows == self.captured_req_width
        starts_early = ends is not None and bool((ends < window.num_rows).any())
        return mode.is_draft_extend_v2() and fits and not starts_early

    def begin(self, window: RoundWindow) -> "CapturedPass":
        """Load what was verified, find the rows and plan their attention."""
        count = len(window.verified.requests)
        size = self._pad_to_bucket(count, self.capture_bs)
        self.verified.load(window.verified, size)
        with self.model_context():
            self.backend.replay(_key(size, "rows"), None)
        batch = self._replayed_batch(size, window.ends_cpu)
        if not self.attn_backend.draft_extend_metadata_captured_in_graph():
            self.attn_backend.init_forward_metadata_out_graph(batch)
        return CapturedPass(self, batch, count)

    def _replayed_batch(self, size: int, ends: Tensor | None) -> SimpleNamespace:
        """What attention plans from: the buffers, and the lengths [B] where the host knows them."""
        views, host = self.buffers.first(size), None
        if ends is not None:
            self.buffers.load_host(ends, size, self.seq_len_fill_value)
            host = views.seq_lens_cpu
        batch = SimpleNamespace(
            batch_size=size,
            forward_mode=ForwardMode.DRAFT_EXTEND_V2,
            input_ids=views.base,
            req_pool_indices=views.req_pool_indices,
            seq_lens=views.seq_lens,
            seq_lens_cpu=host,
            seq_lens_sum=None if host is None else int(host.sum()),
            encoder_lens=None,
            extend_seq_lens=views.extend_seq_lens,
            out_cache_loc=views.out_cache_loc,
            mamba_track_indices=None,
            spec_info=self._spec_info(views),
        )
        translator = self.model_runner.kv_index_translator
        translator.own_plan(batch).bind_replay(batch, translator, slots=views.out_cache_loc)
        return batch

    def publish_read_done(self) -> None:
        """From here on the scheduler may write to the request pool: its barrier need not wait for the whole pass."""
        event = self.device_module.Event()
        event.record()
        self.model_runner.shared_read_done_event = event


class CapturedPass:
    """One pass by graphs; see `draft.EagerPass`."""

    def __init__(self, graphs: MTPGraphRunner, batch: SimpleNamespace, count: int):
        self.graphs = graphs
        self.batch = batch
        self.count = count

    def logits(self, layer: int) -> Tensor:
        """Run a layer; [B, V], valid until the next pass."""
        with self.graphs.model_context():
            out = self.graphs.backend.replay(_key(self.batch.batch_size, f"mtp{layer}"), self.batch)
        if layer == 0 and self.graphs.reads_end_early:
            self.graphs.publish_read_done()
        return out[: self.count]

    def forward(self, layer: int) -> None:
        """Run a layer for its KV and for the next one."""
        self.logits(layer)

    def put(self, layer: int, drafts: Tensor) -> None:
        """Let the next layer read these drafts [B]."""
        if layer + 1 < self.graphs.num_layers:
            self.graphs.buffers.drafts[: self.count, layer].copy_(drafts)


def _fit_attention(backend, rows: int) -> None:
    """Let the draft's attention expect `rows` rows of each request.

    SGLang's Triton backend takes the verify width for it (layers/attention/triton_backend.py), others what the batch
    says. The backend serves no other passes, see `device.attach_draft_attention`.
    """
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    if isinstance(backend, TritonAttnBackend):
        backend.num_draft_tokens = rows


def _reads_end_with_the_first_layer(backend) -> bool:
    """Whether no later layer reads what the scheduler writes: the slots of requests and their sliding twins.

    Where planning is part of layer 0's graph (fa3), that graph copies all of them
    (layers/attention/flashattention_backend.py: init_forward_metadata_in_graph); other backends declare it.
    """
    early = (SharedReadEnds.PRE_REPLAY, SharedReadEnds.IN_REPLAY)
    return (
        backend.draft_extend_metadata_captured_in_graph()
        or backend.shared_read_ends(ForwardMode.DRAFT_EXTEND_V2) in early
    )


def _key(size: int, part: str) -> ShapeKey:
    return ShapeKey(size=size, variant_label=part)
