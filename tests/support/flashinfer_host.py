"""Our FlashInfer backend on small pools, with wrappers that do in plain torch what FlashInfer's definition says.

`Host` builds the real backend, with SGLang's own constructor. On a CPU the wrappers are those of
`flashinfer_wrappers.py`: they read only what they were planned with, so a wrong plan gives a wrong result. On CUDA
they are FlashInfer's. `Host.run` compares each layer's output with dense attention over the keys written so far.

Letters: T rows of a pass, H query heads, N key/value heads, D head size, B requests.
"""

from types import SimpleNamespace

import torch
from sglang.srt.layers.attention import flashinfer_backend as stock
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleVerifyInput

from sglang_step35.attention.flashinfer import backend as flashinfer
from sglang_step35.config import AttentionSpec
from tests.support.flashinfer_wrappers import DecodeWrapper, PrefillWrapper, Wrapper, fast_decode_plan

EARLIER = 511
FULL_HEADS, WINDOW_HEADS, KV_HEADS = 8, 12, 1  # the published model on eight ranks
SLOTS, SWA_SLOTS, ROWS, LENGTH = 8192, 7000, 6, 1600
VALUE_SIZE = 30.0  # so that one key too many shows in bfloat16


class SlotPool(BaseSWAKVPool):
    """A sliding and a full layer over shared slot ids; the sliding one has its own, fewer, slots."""

    def __init__(self, host):
        shape = (KV_HEADS, host.size)
        self.kv = {0: (SLOTS, *shape), 1: (SWA_SLOTS, *shape)}
        self.kv = {layer: [torch.zeros(s, dtype=host.dtype, device=host.device) for _ in "kv"]
                   for layer, s in self.kv.items()}  # fmt: skip
        # Slots no request holds map to 0, as after eviction.
        self.mapping = torch.zeros(SLOTS, dtype=torch.int64, device=host.device)

    def translate_loc_from_full_to_swa(self, slots):
        return self.mapping[slots]

    def get_kv_cache_quant_method(self):
        access = SimpleNamespace(kind=None, scale_recipe=None)
        return SimpleNamespace(resolve_attention_access=lambda *_: access, needs_global_scale=lambda: False)

    def get_kv_buffer(self, layer_id):
        return tuple(self.kv[layer_id])

    def set_kv_buffer(self, layer, loc, k, v, *scales):
        where = loc.swa_loc if layer.sliding_window_size >= 0 else loc.loc
        for part, new in zip(self.kv[layer.layer_id], (k, v), strict=True):
            part[where] = new.view(len(where), KV_HEADS, -1)


SlotPool.__abstractmethods__ = frozenset()  # what the backend does not call


class Translator:
    """SGLang's gather of slots. With `unified`, reads come out translated, as from a unified pool."""

    def __init__(self, host, unified):
        self.host, self.reads_are_translated = host, unified

    def pack_read_stream(self, plan, *, req_pool_indices, seq_lens, indptr, out, kv_start_idx=None, kind, **unused):
        starts = torch.zeros_like(seq_lens) if kv_start_idx is None else kv_start_idx
        for request, start, n, at in zip(
            req_pool_indices.tolist(), starts.tolist(), seq_lens.tolist(), indptr.tolist(), strict=False
        ):
            slots = self.host.table[request, start : start + n]
            if kind == stock.IdSpaceKind.SLIDING_WINDOW:
                slots = self.host.pool.mapping[slots.long()]
            out[at : at + n] = slots

    def write_ids(self, batch, kind):
        return self.host.pool.mapping[batch.out_cache_loc]


def attention_spec(heads: int, earlier: int, size: int) -> SimpleNamespace:
    window = earlier + 1 if earlier >= 0 else None
    return SimpleNamespace(attention=AttentionSpec(heads, KV_HEADS, size, window, rope=None, head_gate=False))


class Host:
    """A model runner's fields with layer 0 full and layer 1 sliding; requests 1 .. ROWS - 1."""

    def __init__(self, device="cpu", size=8, dtype=torch.float32, draft=False, unified=False, cls=None):
        self.device, self.size, self.dtype = device, size, dtype
        self.table = torch.zeros(ROWS, LENGTH, dtype=torch.int32, device=device)
        self.pool = SlotPool(self)
        self.free = (torch.randperm(SLOTS - 1) + 1).tolist()
        self.free_swa = (torch.randperm(SWA_SLOTS - 1) + 1).tolist()
        self.known = torch.zeros(2, 2, ROWS, LENGTH, KV_HEADS, size, dtype=torch.float64)
        layers = [attention_spec(FULL_HEADS, -1, size), attention_spec(WINDOW_HEADS, EARLIER, size)]
        self.layers = [
            RadixAttention(FULL_HEADS, size, size**-0.5, KV_HEADS, 0),
            RadixAttention(WINDOW_HEADS, size, size**-0.5, KV_HEADS, 1, sliding_window_size=EARLIER),
        ][int(draft) :]
        spec = SimpleNamespace(layers=layers, mtp_layers=layers[1:])
        self.backend = (cls or flashinfer.Step35FlashInferBackend)(self.runner(spec, draft, unified))

    def runner(self, spec, draft: bool, unified: bool) -> SimpleNamespace:
        config = SimpleNamespace(
            num_attention_heads=FULL_HEADS, head_dim=self.size, v_head_dim=self.size, context_len=LENGTH,
            is_multimodal=False, is_encoder_decoder=False, hf_config=SimpleNamespace(architectures=["Step3p5"]),
            hf_text_config=SimpleNamespace(spec=lambda: spec),
            get_num_kv_heads=lambda *_: KV_HEADS, get_max_num_attention_heads=lambda: WINDOW_HEADS,
        )  # fmt: skip
        return SimpleNamespace(
            req_to_token_pool=SimpleNamespace(size=ROWS, req_to_token=self.table), token_to_kv_pool=self.pool,
            kv_index_translator=Translator(self, unified), server_args=None, model_config=config,
            prefill_attention_backend_str="flashinfer", decode_attention_backend_str="flashinfer",
            kv_cache_dtype=self.dtype, dtype=self.dtype, page_size=1, sliding_window_size=EARLIER,
            is_draft_worker=draft, device=self.device,
        )  # fmt: skip

    def batch(self, mode: ForwardMode, spans) -> SimpleNamespace:
        """The ForwardBatch of rows [(request, first position, end)]; first may be negative in a draft extend."""
        for request, _, end in spans:
            for position in range(int((self.table[request] > 0).sum()), end):
                self.table[request, position] = slot = self.free.pop()
                self.pool.mapping[slot] = self.free_swa.pop()
        counts = [end - first for _, first, end in spans]
        lens = [first if mode.is_target_verify() else end for _, first, end in spans]
        slots = [int(self.table[r, p]) if p >= 0 else 0 for r, first, end in spans for p in range(first, end)]
        prefix = [max(0, first) for _, first, _ in spans]

        def tensor(values):
            return torch.tensor(values, dtype=torch.int64, device=self.device)

        return SimpleNamespace(
            forward_mode=mode, batch_size=len(spans), req_pool_indices=tensor([r for r, _, _ in spans]),
            seq_lens=tensor(lens), seq_lens_cpu=torch.tensor(lens), seq_lens_sum=sum(lens), encoder_lens=None,
            out_cache_loc=tensor(slots), out_cache_loc_is_physical=True, positions=torch.zeros(len(slots)),
            extend_prefix_lens=tensor(prefix), extend_prefix_lens_cpu=prefix, kv_loc_plan=None,
            cross_attention_custom_mask=None, spec_info=self.spec_info(mode, counts[0]),
        )  # fmt: skip

    def spec_info(self, mode: ForwardMode, width: int):
        if mode.is_target_verify():
            info = EagleVerifyInput.create_idle_input(topk=1, spec_steps=3, num_verify_tokens=width, device=self.device)
            info.num_tokens_per_req = width
            return info
        return EagleDraftExtendInput(num_tokens_per_req=width) if mode.is_draft_extend_v2() else None

    def inputs(self, spans):
        """Random q, k, v of every layer for these rows, in the pass's dtype: [(q, k, v)], [T, heads * D] each."""
        rows = sum(end - first for _, first, end in spans)
        made = []
        for layer in self.layers:
            shapes = [(rows, heads * self.size) for heads in (layer.tp_q_head_num, KV_HEADS, KV_HEADS)]
            q, k, v = (torch.randn(shape, device=self.device) for shape in shapes)
            made.append(tuple(part.to(self.dtype) for part in (q, k, v * VALUE_SIZE)))
        return made

    def forward(self, batch, inputs):
        run = self.backend.forward_decode if batch.forward_mode.is_decode() else self.backend.forward_extend
        return [run(q, k, v, layer, batch) for layer, (q, k, v) in zip(self.layers, inputs, strict=True)]

    def expected(self, spans, inputs):
        """Dense attention, [T, H * D] float64 of each layer; NaN for rows before position 0."""
        rows = [(request, p) for request, first, end in spans for p in range(first, end)]
        results = []
        for layer, (q, k, v) in zip(self.layers, inputs, strict=True):
            for part, new in enumerate((k, v)):
                for i, (request, p) in enumerate(rows):
                    if p >= 0:
                        self.known[layer.layer_id, part, request, p] = new[i].view(KV_HEADS, -1).double()
            out = torch.full(q.shape, torch.nan, dtype=torch.float64)
            for i, (request, p) in enumerate(rows):
                if p >= 0:
                    first = max(0, p - EARLIER) if layer.sliding_window_size >= 0 else 0  # k > q - 512
                    keys, values = self.known[layer.layer_id, :, request, first : p + 1, 0]
                    weights = (q[i].view(-1, self.size).double().cpu() @ keys.T * layer.scaling).softmax(-1)
                    out[i] = (weights @ values).flatten()
            results.append(out)
        return results

    def check(self, outputs, spans, inputs) -> None:
        tolerance = 1e-4 if self.dtype == torch.float32 else 0.04
        for out, expected in zip(outputs, self.expected(spans, inputs), strict=True):
            real = ~expected.isnan()
            assert torch.isfinite(out).all()
            torch.testing.assert_close(out.double().cpu()[real], expected[real], atol=tolerance, rtol=tolerance / 4)

    def run(self, mode: ForwardMode, spans, batch=None) -> None:
        """Plan a pass, attend in every layer, and compare."""
        batch, inputs = batch or self.batch(mode, spans), self.inputs(spans)
        self.backend.init_forward_metadata(batch)
        self.check(self.forward(batch, inputs), spans, inputs)


def fake_runtime(monkeypatch, ranks: int = 1) -> None:
    """What SGLang's constructor asks of the process; on a CPU also its stand-in wrappers."""
    off = SimpleNamespace(enable_mis=False, enable_deterministic_inference=False)
    parallel = SimpleNamespace(attn_tp_size=ranks, attn_dcp_size=1)
    patches = dict(
        get_exec=lambda: SimpleNamespace(features=off, deterministic=off),
        get_parallel=lambda: parallel,
        get_buffer=lambda name, build: build(),
        get_platform=lambda: SimpleNamespace(is_sm100=False),
        DllmConfig=SimpleNamespace(from_server_args=lambda args: None),
        get_cuda_graph_max_batch_size=lambda size: size,
        is_in_tc_piecewise_cuda_graph=lambda: False,
    )
    monkeypatch.setattr(flashinfer, "get_parallel", lambda: parallel)
    if not torch.cuda.is_available():
        monkeypatch.setattr(Wrapper, "planned", [])
        patches.update(
            BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper,
            BatchPrefillWithRaggedKVCacheWrapper=PrefillWrapper,
            BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper,
            fast_decode_plan=fast_decode_plan,
        )
        empty = torch.empty  # SGLang's eager decode asks for device="cuda"
        monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
        one_gpu = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: one_gpu)
        monkeypatch.setenv("SGLANG_FLASHINFER_WORKSPACE_SIZE", "1024")
    for name, value in patches.items():
        monkeypatch.setattr(stock, name, value, raising=False)
