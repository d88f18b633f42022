"""The window SGLang's CUDA attention backends read for our sliding layers: 512 keys, the row's own among them.

SGLang counts earlier keys: the model's `get_attention_sliding_window_size()` and each layer's `sliding_window_size` are
511. The first tests hand that to SGLang's own planning code on a CPU and look at what it asks the kernels for. The
`gpu` ones run the kernels against this package's attention.

Some planning paths are wrong in SGLang 0.5.23; tests named `test_stock_...` pin that down, so that they fail once an
SGLang update repairs them. For FlashInfer, sglang_step35/attention/flashinfer.py then has less to replace
(tests/attention/test_flashinfer_backend.py).
"""

from types import SimpleNamespace

import pytest
import torch

from sglang_step35.attention.portable import functions
from sglang_step35.config import ALL_KEYS, parse_config
from tests.support.published_config import edited

EARLIER = 511
SIZE, KV_HEADS = 128, 8


class Translator:
    """Records which positions each request is read at, in place of SGLang's gather kernel."""

    reads_are_translated = False
    window_kv_kind = None

    def __init__(self):
        self.reads = []

    def pack_read_stream(self, plan, *, req_pool_indices, seq_lens, kv_start_idx=None, **unused):
        starts = [0] * len(seq_lens) if kv_start_idx is None else kv_start_idx.tolist()
        self.reads.append([(start, start + length) for start, length in zip(starts, seq_lens.tolist(), strict=True)])
        return True


class Wrapper:
    """Records the plans of a FlashInfer wrapper."""

    is_cuda_graph_enabled = False
    _custom_mask_buf = None

    def __init__(self):
        self.plans = []

    def begin_forward(self, *arguments, **keywords):
        self.plans.append(keywords)


def updater(kind: str):
    """SGLang's FlashInfer planner ("Decode" or "Prefill") for our window, and its translator and ragged wrapper."""
    module = pytest.importorskip("sglang.srt.layers.attention.flashinfer_backend")
    planner = object.__new__(getattr(module, f"FlashInferIndicesUpdater{kind}"))
    backend = SimpleNamespace(kv_index_translator=Translator(), dq_paged_kernel_lens=None)
    indptr = [torch.zeros(9, dtype=torch.int32) for _ in range(2)]
    vars(planner).update(
        sliding_window_size=EARLIER,
        attn_backend=backend,
        kv_indptr=indptr,
        qo_indptr=[row.clone() for row in indptr],
        kv_last_page_len=torch.ones(8, dtype=torch.int32),
        _swa_kv_pool=None,
        prefill_wrapper_ragged=Wrapper(),
        num_qo_heads=96,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        q_data_type=torch.bfloat16,
        data_type=torch.bfloat16,
    )
    return planner, backend.kv_index_translator


def plan_extend(prefix, total, *, ragged, spec_info=None):
    """Plan an extend pass; returns (positions read by the sliding wrapper, plan keywords paged, plans ragged)."""
    planner, translator = updater("Prefill")
    wrappers = [Wrapper(), Wrapper()]
    planner.update_sliding_window(
        torch.arange(len(total)),
        torch.tensor(total),
        torch.tensor(total),
        sum(total),
        None if prefix is None else torch.tensor(prefix),
        wrappers,
        ragged,
        None,
        spec_info,
        plan=None,
    )
    return translator.reads[0], wrappers[0].plans[0], planner.prefill_wrapper_ragged.plans


def test_decode_reads_512_keys():
    planner, translator = updater("Decode")
    calls = []

    def record(wrapper, lengths, total, indptr, starts, *rest, **more):
        calls.append((lengths, starts))

    planner.call_begin_forward = record
    lengths = torch.tensor([1000, 512, 513, 3])
    planner.update_sliding_window(
        lengths, lengths, 2028, [None, None], None, None, plan=None, req_pool_indices=torch.arange(4)
    )
    assert calls[0][0].tolist() == [512, 512, 512, 3]
    assert calls[0][1].tolist() == [488, 0, 1, 0]


def test_paged_extend_reads_512_keys():
    """As with SGLANG_FLASHINFER_USE_PAGED=1: the first row's window starts 511 keys before it."""
    reads, paged, _ = plan_extend([1000, 0], [1010, 700], ragged=False)
    assert reads == [(1000 - EARLIER, 1010), (0, 700)]
    assert paged["window_left"] == EARLIER


def test_layers_hand_their_window_to_the_kernel():
    """Sliding layers use the first wrapper and pass 511; full layers the second and -1."""
    module = pytest.importorskip("sglang.srt.layers.attention.flashinfer_backend")
    from sglang.srt.layers.radix_attention import RadixAttention

    backend = object.__new__(module.FlashInferAttnBackend)
    asked = []

    def wrapper(name):
        def forward(q, cache, **keywords):
            asked.append((name, keywords["window_left"]))
            return q

        return SimpleNamespace(forward=forward)

    vars(backend).update(
        num_wrappers=2,
        dispatch_reason=module.WrapperDispatch.SLIDING_WINDOW,
        forward_metadata=SimpleNamespace(
            prefill_wrappers=[wrapper("sliding"), wrapper("full")], use_ragged=False, multi_item_params=None
        ),
        prefill_uses_dequant_workspace=False,
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda layer_id: None),
    )
    for earlier in (EARLIER, ALL_KEYS):
        layer = RadixAttention(4, SIZE, 1.0, 2, layer_id=0, sliding_window_size=earlier)
        backend.forward_extend(torch.zeros(2, 4 * SIZE), None, None, layer, SimpleNamespace())
    assert asked == [("sliding", EARLIER), ("full", -1)]


def test_models_report_earlier_keys():
    """SGLang sizes reads, eviction and prefix matching by this number, for the target and the MTP layers alike."""
    causal_lm = pytest.importorskip("sglang_step35.model.causal_lm")
    mtp = pytest.importorskip("sglang_step35.model.mtp")
    for owner in (causal_lm.Step3p5ForCausalLM, mtp.Step3p5MTP):
        model = SimpleNamespace(spec=parse_config(edited(sliding_window=EARLIER + 1)))
        assert owner.get_attention_sliding_window_size(model) == EARLIER


def test_stock_flashinfer_ignores_the_window_in_ragged_prefill():
    """SGLang's default prefill plans the chunk's own keys without a window: rows past 512 see too much.

    SGLANG_FLASHINFER_USE_PAGED=1 avoids it.
    """
    _, _, ragged = plan_extend([0], [700], ragged=True)
    assert "window_left" not in ragged[0]


def test_stock_flashinfer_verify_reads_the_first_keys():
    """A verify pass at position 1000 reads positions 0 .. 515 instead of 489 .. 1004."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    idle = EagleVerifyInput.create_idle_input(topk=1, spec_steps=3, num_verify_tokens=4, device="cpu")
    idle.draft_token_num = 4
    reads, _, _ = plan_extend(None, [1000], ragged=False, spec_info=idle)
    assert reads == [(0, 515)]


def test_stock_triton_decode_reads_511_keys():
    """One too few: the length is cut to the number of earlier keys though it counts the row's own key."""
    module = pytest.importorskip("sglang.srt.layers.attention.triton_backend")
    translator = Translator()
    lengths = torch.tensor([1000, 3])
    module.update_sliding_window_buffer(
        torch.zeros(3, dtype=torch.int32), translator, None, torch.arange(2), EARLIER, lengths, 2, "cpu"
    )
    assert translator.reads == [[(489, 1000), (0, 3)]]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def expected(q, k, v, rows):
    """Our attention of the last `rows` positions: q [rows, H, D], k, v [K, N, D]."""
    mask = functions.additive(functions.visible_keys(rows, len(k), EARLIER))
    out, _ = functions.attend_block(q.float().cpu(), k.float().cpu(), v.float().cpu(), mask, SIZE**-0.5)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rows", [1, 4, 700])
def test_flashinfer_kernel_reads_512_keys(rows):
    flashinfer = pytest.importorskip("flashinfer")
    q = torch.randn(rows, 96, SIZE, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 1100, KV_HEADS, SIZE, dtype=torch.bfloat16, device="cuda")
    out = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, window_left=EARLIER)
    torch.testing.assert_close(out.float().cpu(), expected(q, k, v, rows), atol=0.02, rtol=0.02)


@pytest.mark.gpu
@needs_cuda
def test_paged_flashinfer_reads_512_keys():
    """The paged wrapper as SGLang plans it, with page size 1 and slots in random order."""
    flashinfer = pytest.importorskip("flashinfer")
    rows, keys = 20, EARLIER + 20
    q = torch.randn(rows, 96, SIZE, dtype=torch.bfloat16, device="cuda")
    pool = torch.randn(2, 4096, 1, KV_HEADS, SIZE, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(4096, device="cuda")[:keys].int()
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD"
    )

    def indptr(count):
        return torch.tensor([0, count], dtype=torch.int32, device="cuda")

    last = torch.ones(1, dtype=torch.int32, device="cuda")
    wrapper.plan(
        indptr(rows), indptr(keys), slots, last, 96, KV_HEADS, SIZE, 1,
        causal=True, window_left=EARLIER, q_data_type=torch.bfloat16,
    )  # fmt: skip
    out = wrapper.run(q, (pool[0], pool[1]))
    k, v = (part[slots.long(), 0] for part in pool)
    torch.testing.assert_close(out.float().cpu(), expected(q, k, v, rows), atol=0.02, rtol=0.02)
