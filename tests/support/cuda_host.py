"""The worker on the device of `fake_cuda`: SGLang's kernels, models and graphs by the shapes they give.

Letters: B requests, V vocabulary, H hidden size.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative import eagle_info, eagle_utils, eagle_worker_common
from sglang.srt.speculative.eagle_info import EagleDraftInput

from sglang_step35.model.mtp_pass import LayerPass
from sglang_step35.speculative import device, draft, graphs, host_copy, verify, worker
from sglang_step35.speculative.adaptive import Foretold
from sglang_step35.speculative.pass_buffers import PassBuffers, VerifiedBuffers
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.verify_graphs import NarrowStep
from tests.support.fake_cuda import replayed
from tests.support.speculative_flags import speculative_flags
from tests.support.toy_requests import ToyRequest

CUDA = torch.device("cuda")
POOL, LENGTH, VOCAB, HIDDEN, STEPS, PROMPT = 64, 256, 1000, 16, 3, 40


class Pool:
    """SGLang's request pool, all of it in use."""

    size = POOL

    def available_size(self):
        return 0

    def __init__(self):
        self.req_to_token = torch.zeros(POOL, LENGTH, dtype=torch.int32, device=CUDA)


class Model:
    """The MTP layers."""

    num_mtp_layers = STEPS

    def start_pass(self, positions, hidden, last, batch):
        return LayerPass(self, positions, hidden, last, batch)

    def forward_layer(self, layer, tokens, positions, hidden, batch):
        assert tokens.shape == positions.shape == hidden.shape[:1]
        return torch.empty_like(hidden)

    def compute_logits(self, layer, rows):
        return torch.empty(len(rows), VOCAB, dtype=torch.bfloat16, device=CUDA)


class Attention:
    """fa3 plans inside the graphs and needs no lengths on the host; FlashInfer plans before them and does."""

    def __init__(self, plans_on_host: bool):
        self.needs_cpu_seq_lens = plans_on_host
        self.verify_mask = SimpleNamespace(is_read=False)

    def draft_extend_metadata_captured_in_graph(self) -> bool:
        return not self.needs_cpu_seq_lens

    def init_forward_metadata_out_graph(self, batch) -> None:
        assert batch.seq_lens_cpu.tolist() and batch.seq_lens_sum

    def init_forward_metadata(self, batch) -> None:
        assert batch.seq_lens_cpu.device.type == "cpu"  # both plan eager passes there


class Graphs(graphs.MTPGraphRunner):
    """The real load and replay of a captured pass; nothing is captured."""

    def __init__(self, runner):
        self.model, self.attn_backend = runner.model, runner.attn_backend
        settings = MTPSettings(STEPS)
        self.captured_req_width, self.num_layers, self.reader = settings.pass_rows, STEPS, None
        self.seq_len_fill_value = settings.pass_rows
        self.capture_bs = [1, 8, 48]
        self.max_bs = 48
        hidden = (HIDDEN, torch.bfloat16, CUDA)
        self.verified = VerifiedBuffers(self.max_bs, settings, *hidden)
        self.buffers = PassBuffers.allocate(self.max_bs, self.captured_req_width, STEPS, *hidden)
        self.model_runner, self.reads_end_early = runner, not runner.attn_backend.needs_cpu_seq_lens
        self.device_module = SimpleNamespace(Event=lambda: SimpleNamespace(record=lambda: None))
        self.backend = SimpleNamespace(replay=self.replay)

    def model_context(self):
        return nullcontext()

    def replay(self, key, batch):
        if key.variant_label == "rows":
            with replayed():
                return self._find_rows(key.size)
        return self.model.compute_logits(0, batch.seq_lens)


class DraftWorker(draft.MTPDraftWorker):
    def __init__(self, server_args, gpu_id, nccl_port, target_worker):
        self.model, attention = Model(), target_worker.model_runner.attn_backend
        plan = SimpleNamespace(bind_replay=lambda batch, reader, slots: None)
        translator = SimpleNamespace(own_plan=lambda batch: plan)
        self.draft_runner = SimpleNamespace(
            model=self.model, attn_backend=attention, device=CUDA, kv_index_translator=translator
        )
        self.draft_worker = SimpleNamespace(alloc_memory_pool=lambda **_: None)
        self.graphs = Graphs(self.draft_runner) if server_args.graphs else None

    def _draft_scope(self):
        return torch.inference_mode()

    def _forward_scope(self, forward_batch):
        return torch.inference_mode()


class TargetWorker:
    def __init__(self, plans_on_host: bool):
        self.sliding_window_size = 63
        self.model_config = SimpleNamespace(num_nextn_predict_layers=STEPS, hidden_size=HIDDEN, vocab_size=VOCAB)
        self.model_runner = SimpleNamespace(
            model_config=self.model_config,
            sliding_window_size=63,
            dtype=torch.bfloat16,
            device=CUDA,
            attn_backend=Attention(plans_on_host),
            decode_cuda_graph_runner=None,
        )
        self.verified: list[int] = []  # widths of the verify steps

    def forward_batch_generation(self, batch, forward_batch=None, is_verify=False, **_unused):
        rows = len(forward_batch.input_ids) if is_verify else sum(batch.extend_lens)
        if is_verify:
            self.verified.append(rows // len(forward_batch.reqs))
        output = SimpleNamespace(
            hidden_states=torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device=CUDA),
            next_token_logits=torch.empty(rows, VOCAB, dtype=torch.bfloat16, device=CUDA),
        )
        sampled = None if is_verify else torch.empty(len(batch.reqs), dtype=torch.int32, device=CUDA)
        return GenerationBatchResult(logits_output=output, next_token_ids=sampled)


def forward_batch(batch, runner, **_unused):
    """SGLang's ForwardBatch.init_new, as far as lengths go: lists are copied through pinned memory."""
    for lens in (getattr(batch, "prefix_lens", None), getattr(batch, "extend_lens", None)):
        assert lens is None or isinstance(lens, list) or lens.device.type == "cuda"
    return SimpleNamespace(out_cache_loc_virtual=None, kv_loc_plan=None, kv_loc_cols=None, **vars(batch))


def prepare_for_verify(spec_info, pool, batch, target_worker):
    batch.input_ids, batch.forward_mode = spec_info.draft_token, ForwardMode.TARGET_VERIFY
    return forward_batch(batch, None), True


def async_h2d(values, *, dtype, device):
    """SGLang's copy through pinned memory, which does not exist here."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def verify_input(batch, draft_input, parents, order, drafts, probs, *, num_draft_tokens, **_unused):
    chain = torch.cat([draft_input.bonus_tokens[:, None], drafts], 1)
    return SimpleNamespace(draft_token=chain.flatten(), draft_token_num=num_draft_tokens)


def make_worker(monkeypatch, *, captured: bool = True, plans_on_host: bool = False, narrow=()):
    """captured: MTP passes behind a verify step replay graphs; plans_on_host: as FlashInfer, else as fa3.

    narrow: verify widths with graphs of their own, for adaptive depth.
    """
    spec = speculative_flags(STEPS, adaptive=bool(narrow))
    parallel = SimpleNamespace(attn_dp_size=1, pp_size=1, tp_rank=0, tp_group=None)
    for module in (worker, eagle_info):
        monkeypatch.setattr(module, "get_spec", lambda: spec)
    monkeypatch.setattr(worker, "get_parallel", lambda: parallel)
    monkeypatch.setattr(worker, "attention_backends", lambda: ("fa3",) * 2)
    monkeypatch.setattr(worker, "MTPDraftWorker", DraftWorker)
    monkeypatch.setattr(draft, "ForwardBatch", SimpleNamespace(init_new=forward_batch))
    monkeypatch.setattr(verify, "eagle_prepare_for_verify", prepare_for_verify)
    monkeypatch.setattr(eagle_worker_common, "build_eagle_verify_input", verify_input)
    monkeypatch.setattr(eagle_utils, "default_tree_mask_mode", lambda: None)
    monkeypatch.setattr(host_copy, "async_h2d", async_h2d)
    monkeypatch.setattr(device, "current_platform", SimpleNamespace(is_out_of_tree=lambda: False))
    pool = Pool()
    flags = dict(enable_metrics=False, served_model_name="fake", enable_hierarchical_cache=False)
    args = SimpleNamespace(graphs=captured, **flags)
    made = worker.Step35SpecWorker(args, 0, 0, TargetWorker(plans_on_host))
    made._foretold = lambda batch: Foretold([1.0] * (STEPS + 1))  # the models are stand-ins
    made.alloc_memory_pool(req_to_token_pool=pool)
    for width in narrow:
        made.narrow.steps[width] = NarrowStep(Attention(plans_on_host), None, 0.0)
    if captured:
        made._draft_worker.graphs.reader = made._draft_worker.reader
    return made


def make_requests(count: int, **options) -> list[ToyRequest]:
    return [ToyRequest(f"r{i}", list(range(PROMPT)), i, **options) for i in range(count)]


def sampling_info(requests, **changes) -> SimpleNamespace:
    """SGLang's SamplingBatchInfo, its tensors on the device."""
    size, greedy = len(requests), [not request.temperature for request in requests]
    on_device = lambda value, dtype: torch.full((size,), value, dtype=dtype, device=CUDA)
    fields = dict(
        is_all_greedy=all(greedy),
        is_any_greedy=any(greedy),
        temperatures=torch.ones(size, 1, device=CUDA),
        top_ks=on_device(1 << 30, torch.int32),
        top_ps=on_device(1.0, torch.float32),
        min_ps=on_device(0.0, torch.float32),
        need_top_k_sampling=False,
        need_top_p_sampling=False,
        need_min_p_sampling=False,
        sampling_seed=on_device(7, torch.int64),
        has_custom_logit_processor=False,
        logit_bias=None,
    )
    return SimpleNamespace(**{**fields, **changes})


def make_batch(worker, requests, mode: ForwardMode, **changes) -> SimpleNamespace:
    """The scheduler's batch: host lengths only for a prefill, or where attention asks for them."""
    size = len(requests)
    backend = worker._target_worker.model_runner.attn_backend
    known = mode.is_extend() or backend.needs_cpu_seq_lens
    fields = dict(
        forward_mode=mode,
        is_extend_in_batch=False,
        reqs=requests,
        req_pool_indices=torch.empty(size, dtype=torch.int64, device=CUDA),
        seq_lens=torch.empty(size, dtype=torch.int64, device=CUDA),
        seq_lens_cpu=torch.full((size,), PROMPT) if known else None,
        seq_lens_sum=None,
        sampling_info=sampling_info(requests),
        spec_info=None,
        decoding_reqs=None,
        prefill_stats=None,
        has_grammar=False,
        return_logprob=False,
    )
    return SimpleNamespace(**{**fields, **changes})


def prefill(worker, requests, **changes):
    spans = dict(prefix_lens=[0] * len(requests), extend_lens=[PROMPT] * len(requests))
    batch = make_batch(worker, requests, ForwardMode.EXTEND, **spans, **changes)
    with torch.inference_mode():
        return worker.forward_batch_generation(batch)


def round_of(worker, requests, draft_input: EagleDraftInput, **changes):
    batch = make_batch(worker, requests, ForwardMode.DECODE, spec_info=draft_input, **changes)
    with torch.inference_mode():
        return worker.forward_batch_generation(batch)
