"""Our FlashInfer backend: every pass reads the keys k > q - 512, eager and through the graphs' buffers.

On a CPU the wrappers are plain torch (tests/support/flashinfer_host.py) and check what we hand to FlashInfer; the
`gpu` tests run the same passes with FlashInfer's kernels. Spans are [(request, first position, end)] of a pass's rows.
"""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_step35.assets import PUBLISHED_CONFIG
from sglang_step35.attention.flashinfer import backend as flashinfer
from sglang_step35.attention.flashinfer.plan import LayerKind, QueryRows, layer_kinds
from tests.support.flashinfer_host import EARLIER, FULL_HEADS, KV_HEADS, WINDOW_HEADS, Host, fake_runtime, stock
from tests.support.flashinfer_wrappers import Wrapper
from tests.support.registered import flashinfer_maker
from tests.support.warm import call

EXTEND, DECODE = ForwardMode.EXTEND, ForwardMode.DECODE
VERIFY, DRAFT = ForwardMode.TARGET_VERIFY, ForwardMode.DRAFT_EXTEND_V2
PROMPTS = [(1, 0, 700), (2, 0, 512), (3, 0, 509), (4, 0, 3)]

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the stand-in wrappers")


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    torch.manual_seed(0)
    fake_runtime(monkeypatch)


@pytest.fixture(params=["static", "unified", "draft"])
def host(request):
    if torch.cuda.is_available():
        pytest.skip("the gpu tests cover it")
    return Host(draft=request.param == "draft", unified=request.param == "unified")


def all_passes(host):
    """Prefill, later chunks, decode, verify and draft extend of requests around the window's length."""
    host.run(EXTEND, PROMPTS)
    host.run(EXTEND, [(1, 700, 720), (5, 0, 9), (4, 3, 600)])
    host.run(DECODE, [(1, 720, 721), (2, 512, 513), (3, 509, 510), (5, 9, 10)])
    host.run(VERIFY, [(1, 721, 725), (2, 513, 517), (3, 510, 514), (5, 10, 14)])
    host.run(VERIFY, [(1, 722, 726), (3, 511, 515)])
    host.run(DRAFT, [(1, 719, 726), (3, 508, 515), (5, 7, 14)])
    host.run(EXTEND, [(1, 714, 1100)])


def test_all_passes_read_the_window(host):
    all_passes(host)


def test_draft_rows_before_the_first_position(host):
    host.run(EXTEND, [(1, 0, 600), (2, 0, 2)])
    host.run(DRAFT, [(1, 593, 604), (2, -5, 6)])
    host.run(EXTEND, [(3, 0, 40)])
    host.run(DRAFT, [(3, -9, 44), (1, 554, 607)])  # 53 rows over 44 keys


@cpu_only
def test_such_rows_get_a_mask_and_others_none():
    host = Host(draft=True)
    host.run(EXTEND, [(1, 0, 600), (2, 0, 2)])
    assert Wrapper.planned[-1].custom is None
    host.run(DRAFT, [(1, 593, 604), (2, -5, 6)])
    assert Wrapper.planned[-1].custom is not None
    host.run(DRAFT, [(1, 593, 604), (2, 0, 11)])
    assert Wrapper.planned[-1].custom is None


def replay(host, mode, live, padded_to, width):
    """Plan a replay of a captured pass: padded requests have SGLang's fill length and read row 0."""
    batch = host.batch(mode, live)
    spare = padded_to - len(live)
    pad = torch.nn.functional.pad
    batch.batch_size = padded_to
    batch.req_pool_indices = pad(batch.req_pool_indices, (0, spare))
    batch.seq_lens = pad(batch.seq_lens, (0, spare), value=1)
    batch.seq_lens_cpu = pad(batch.seq_lens_cpu, (0, spare), value=1)
    batch.seq_lens_sum += spare
    batch.out_cache_loc = pad(batch.out_cache_loc, (0, spare * width))
    host.backend.init_forward_metadata_out_graph(batch)
    return batch


@pytest.mark.parametrize("mode, width", [(VERIFY, 4), (DRAFT, 7), (DECODE, 1)])
def test_replays_read_the_window(host, mode, width):
    """A captured pass reads its buffers only; they are planned anew, with other lengths and padded requests."""
    host.run(EXTEND, PROMPTS)
    host.backend.init_cuda_graph_state(4, 4 * width)
    fill = [(0, 1, 1 + width)] if mode.is_target_verify() else [(0, 1 - width, 1)]
    capture = host.batch(mode, fill * 4)
    host.backend.init_forward_metadata_out_graph(capture, in_capture=True)
    captured = host.backend.forward_metadata
    rounds = [
        [(1, 700, 700 + width), (2, 512, 512 + width), (3, 509, 509 + width)],
        [(1, 701, 701 + width), (3, 510, 510 + width), (4, 3, 3 + width), (2, 513, 513 + width)],
    ]
    for live in rounds:
        batch = replay(host, mode, live, 4, width)
        host.backend.forward_metadata = captured
        inputs = host.inputs(live + [(0, 0, width)] * (4 - len(live)))
        outputs = host.forward(batch, inputs)
        n = width * len(live)
        host.check([o[:n] for o in outputs], live, [tuple(part[:n] for part in i) for i in inputs])


@cpu_only
def test_stock_verify_fails_the_same_check(monkeypatch):
    """The check can fail: SGLang's own planner passes it below the window's length and not above."""
    monkeypatch.setattr(Wrapper, "same_window", False)  # not even the windows of plan and run agree
    host = Host(cls=stock.FlashInferAttnBackend, draft=True)
    host.backend.use_paged = True
    host.run(EXTEND, [(1, 0, 700)])

    def verify(start):
        batch = host.batch(VERIFY, [(1, start, start + 4)])
        batch.spec_info.custom_mask = torch.ones(4, start + 4, dtype=torch.bool).tril(start).flatten()
        host.run(VERIFY, [(1, start, start + 4)], batch)

    verify(300)
    with pytest.raises(AssertionError, match="not close"):
        verify(700)


@cpu_only
def test_every_kind_is_planned_with_its_own_heads():
    host = Host()
    all_passes(host)
    heads = {wrapper.heads[:2] for wrapper in Wrapper.planned[::2]}
    assert heads == {(WINDOW_HEADS, KV_HEADS)}
    assert {wrapper.heads[:2] for wrapper in Wrapper.planned[1::2]} == {(FULL_HEADS, KV_HEADS)}
    assert {w.planned_window for w in Wrapper.planned if hasattr(w, "planned_window")} == {EARLIER, -1}


def published(ranks):
    import json

    from sglang_step35.config import parse_config

    fields = json.loads(PUBLISHED_CONFIG.read_text())
    spec = parse_config(fields)
    return layer_kinds(spec.layers, ranks), layer_kinds(spec.mtp_layers, ranks)


@pytest.mark.parametrize("ranks, sliding, full, kv", [(1, 96, 64, 8), (4, 24, 16, 2), (8, 12, 8, 1), (16, 6, 4, 1)])
def test_heads_of_the_published_model(ranks, sliding, full, kv):
    target, draft = published(ranks)
    assert target == [LayerKind(sliding, kv, 128, 511), LayerKind(full, kv, 128, -1)]
    assert draft == [LayerKind(sliding, kv, 128, 511), None]


@cpu_only
def test_decode_of_a_group_of_twelve_asks_for_tensor_cores(monkeypatch):
    monkeypatch.setenv("SGLANG_FLASHINFER_USE_TENSOR_CORE", "false")
    host = Host()
    assert host.backend.decode_use_tensor_cores
    assert all(wrapper.use_tensor_cores for wrapper in host.backend.decode_wrappers)
    host.backend.init_cuda_graph_state(2, 2)
    assert all(wrapper.use_tensor_cores for wrapper in host.backend._create_decode_wrappers(2, 2))
    host.run(EXTEND, PROMPTS)
    host.run(DECODE, [(1, 700, 701)])


@cpu_only
def test_graph_buffers_hold_the_longest_batch_and_no_more():
    host = Host()
    host.backend.init_cuda_graph_state(max_bs=4, max_num_tokens=16)
    sliding, full = host.backend.cuda_graph_kv_indices
    assert (len(sliding), len(full)) == (4 * EARLIER + 16, 4 * 1600 + 16)
    # Tiles of 128 packed rows (16 * 12 / 128, and one for each request but the last), at least two per multiprocessor.
    floats = WINDOW_HEADS * max(2 * 132 // KV_HEADS, 2 + 3) * 16 * (host.size + 1)
    assert host.backend.workspace_buffer.numel() >= floats * 4


@cpu_only
def test_no_mask_has_to_be_built_for_a_verify_step():
    mask = Host().backend.verify_mask
    assert not mask.is_read and not mask.fits(1) and mask.buffer.numel() == 0


@cpu_only
def test_a_tree_is_refused():
    host = Host()
    host.run(EXTEND, PROMPTS)
    batch = host.batch(VERIFY, [(1, 700, 704)])
    batch.spec_info.topk = 2
    with pytest.raises(NotImplementedError, match="--speculative-eagle-topk 1"):
        host.backend.init_forward_metadata(batch)


def test_mask_of_rows_that_begin_early():
    rows = QueryRows(torch.tensor([5]), torch.tensor([3]), 5, torch.tensor([3]), 3)
    assert rows.mask(1).view(5, 3).int().tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_registered_for_our_models_only(monkeypatch):
    """The name stays `flashinfer`; other models get SGLang's backend."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    from sglang_step35 import plugin

    plugin.register()
    monkeypatch.setattr(flashinfer, "Step35FlashInferBackend", lambda runner, **_: "ours")
    monkeypatch.setattr(attention_registry, "create_flashinfer_backend", lambda runner: "stock")
    monkeypatch.setattr(stock, "FlashInferAttnBackend", lambda runner, **_: "stock")
    create = attention_registry.ATTENTION_BACKENDS["flashinfer"]
    for name, built in dict(Step3p5ForCausalLM="ours", Step3p5MTP="ours", LlamaForCausalLM="stock").items():
        config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[name]))
        runner = SimpleNamespace(model_config=config, use_mla_backend=False, init_new_workspace=False)
        assert create(runner) == built
        factory = SimpleNamespace(draft_model_runner=runner)
        assert DraftBackendFactory._create_flashinfer_prefill_backend(factory) == ("flashinfer", built)


def test_registered_in_every_process():
    """SGLang's processes call load_plugins; nothing else is needed."""
    assert call(flashinfer_maker) == "sglang_step35.hook_functions"


@pytest.fixture(params=[False, True], ids=["target", "draft"])
def gpu_host(request):
    pytest.importorskip("flashinfer")
    return Host(device="cuda", size=128, dtype=torch.bfloat16, draft=request.param)


@pytest.mark.gpu
def test_kernels_read_the_window_in_all_passes(gpu_host):
    all_passes(gpu_host)


@pytest.mark.gpu
def test_kernels_with_rows_before_the_first_position(gpu_host):
    gpu_host.run(EXTEND, [(1, 0, 600), (2, 0, 2), (3, 0, 40)])
    gpu_host.run(DRAFT, [(1, 593, 604), (2, -5, 6)])
    gpu_host.run(DRAFT, [(3, -9, 44), (1, 554, 607)])


@pytest.mark.gpu
@pytest.mark.parametrize("mode, width", [(VERIFY, 4), (DRAFT, 7), (DECODE, 1)])
def test_captured_kernels_read_the_window(gpu_host, mode, width):
    """A real CUDA graph, captured at SGLang's fill length and replayed at others."""
    host, backend = gpu_host, gpu_host.backend
    host.run(EXTEND, PROMPTS)
    backend.init_cuda_graph_state(3, 3 * width)
    fill = [(0, 1, 1 + width)] if mode.is_target_verify() else [(0, 1 - width, 1)]
    static, inputs = host.batch(mode, fill * 3), host.inputs([(0, 0, width)] * 3)
    backend.init_forward_metadata_out_graph(static, in_capture=True)
    captured = backend.forward_metadata
    host.forward(static, inputs)  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = host.forward(static, inputs)
    for start in (0, 1):
        live = [(r, p + start, p + start + width) for r, p in ((1, 700), (2, 512), (3, 509))]
        batch = replay(host, mode, live, 3, width)
        backend.forward_metadata = captured
        static.out_cache_loc.copy_(batch.out_cache_loc)
        for old, new in zip(inputs, host.inputs(live), strict=True):
            for part, fresh in zip(old, new, strict=True):
                part.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        host.check(outputs, live, inputs)
