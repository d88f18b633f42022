"""Verify steps narrower than the full width: which are captured, with what settings, and that all ranks agree."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner import decode_cuda_graph_runner as decode_graphs
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from sglang_step35.names import DEPTH_PARAM
from sglang_step35.speculative import device, verify_graphs
from sglang_step35.speculative.ranks import ALONE
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.verify_graphs import NarrowSteps
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.nano_model import generate_all, greedy, histogram, prompts
from tests.support.pool_attention import PoolAttention, Recorder

TABLE = torch.cat([torch.zeros(1, 32, dtype=torch.int64), 1 + torch.arange(96).flip(0).view(3, 32)])


class Memory:
    """A GPU on which full verify graphs took `full` GB and narrow ones take `each`, by width."""

    def __init__(self, free: float, each: dict[int, float]):
        self.free, self.each = free, each
        self.asked = []

    def available(self, device, gpu_id, distributed, cpu_group):
        self.asked.append((device, gpu_id, distributed, cpu_group))
        return self.free


@pytest.fixture
def capture(monkeypatch):
    """Capture `widths` on such a GPU; returns NarrowSteps, and the tokens and drafts of what was built."""

    def run(widths, memory: Memory, full: float, ranks=ALONE):
        built = []

        def graphs(runner, *, attn_backend, speculative_num_steps, speculative_num_draft_tokens):
            built.append((speculative_num_draft_tokens, speculative_num_steps))
            memory.free -= memory.each[speculative_num_draft_tokens]

        monkeypatch.setattr(verify_graphs, "get_spec", lambda: SimpleNamespace(override=lambda **_: nullcontext()))
        monkeypatch.setattr(verify_graphs, "get_attention_backend", lambda *, model_runner: None)
        monkeypatch.setattr(verify_graphs, "DecodeCudaGraphRunner", graphs)
        monkeypatch.setattr(verify_graphs, "get_available_gpu_memory", memory.available)
        runner = SimpleNamespace(device="cuda", gpu_id=0, graph_memory_usage={"target_verify": full})
        narrow = NarrowSteps(runner, 4)
        narrow.capture(widths, ranks)
        return narrow, built

    return run


def test_each_width_is_built_for_its_own_number_of_tokens(capture):
    narrow, built = capture(range(1, 4), Memory(8.0, {1: 0.2, 2: 0.3, 3: 0.4}), full=0.5)
    assert built == [(1, 0), (2, 1), (3, 2)]
    assert [narrow.width(needed) for needed in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert narrow.gigabytes == pytest.approx(0.9)


@pytest.mark.parametrize(
    "free, each, full, widths",
    [
        (8.0, {1: 0.6, 2: 0.8, 3: 0.8}, 0.5, [1, 2]),  # 2 GB are theirs: of 0.6 left, width 3 should take 0.8
        (8.0, {1: 0.6, 2: 0.8, 3: 0.8}, 2.1, []),
        (1.0, {1: 0.2, 2: 0.2, 3: 0.2}, 0.2, [1]),
    ],
)
def test_narrow_graphs_take_at_most_a_quarter_of_what_is_free(capture, caplog, free, each, full, widths):
    caplog.set_level("INFO", "sglang_step35")
    narrow, built = capture(range(1, 4), Memory(free, each), full)
    assert [width for width, _ in built] == list(narrow.steps) == widths
    for width in range(1, 4):
        assert (f"Verify graphs of {width} tokens: {each[width]:.2f} GB" in caplog.text) == (width in widths)
        assert (f"No verify graphs of {width} tokens" in caplog.text) == (width not in widths)
    assert narrow.width(3) == 4


def test_ranks_decide_by_rank_0_and_the_smallest_gpu(capture):
    """What the full graphs took differs by rank; SGLang's free memory of all ranks does not."""
    group = SimpleNamespace(cpu_group="hosts")
    ranks = SimpleNamespace(alone=False, group=group, same_number=lambda value: 2.5)
    memory = Memory(8.0, {1: 0.1})
    narrow, built = capture([1], memory, full=0.1, ranks=ranks)
    assert built == [] and set(memory.asked) == {("cuda", 0, True, "hosts")}


@pytest.mark.parametrize(
    "settings, widths",
    [
        (MTPSettings(3, adaptive=True), [1, 2, 3]),
        (MTPSettings(1, adaptive=True), [1]),
        (MTPSettings(2, adaptive=True, look_ups=5), [1, 2, 3]),  # 3: without look-ups
        (MTPSettings(3), None),
        (MTPSettings(3, look_ups=5), None),
    ],
)
@pytest.mark.parametrize("graphs, wide", [(True, "graphs"), (False, "graphs"), (True, None)])
def test_narrow_steps_are_adaptive_depths(monkeypatch, settings, widths, graphs, wide):
    monkeypatch.setattr(device, "_captures_decode_graphs", lambda: graphs)
    asked, runner = [], SimpleNamespace(decode_cuda_graph_runner=wide)
    narrow = SimpleNamespace(runner=runner, capture=lambda widths, ranks: asked.append(list(widths)))
    device.capture_narrow_steps(narrow, settings, ALONE)
    assert asked == ([widths] if widths and graphs and wide else [])


class Slots:
    """SGLang's translator for a pool whose slots are their own ids."""

    def bind_runner_slots(self, batch):
        pass


def make_runner(model, config):
    """SGLang's model runner as far as its decode graph runner reads it."""
    return SimpleNamespace(
        model=model,
        model_config=config,
        device="cpu",
        gpu_id=0,
        dtype=torch.float32,
        is_draft_worker=False,
        server_args=None,
        lora_manager=None,
        ngram_embedding_manager=SimpleNamespace(enabled=False),
        spec_algorithm=SpeculativeAlgorithm.from_string("EAGLE"),
        decode_num_tokens_per_req=lambda num_draft_tokens: num_draft_tokens,
        kv_index_translator=Slots(),
        attn_tp_sequence_sharded=lambda tokens: False,
        get_pp_proxy_topk_size=lambda: None,
        get_pp_proxy_residual_num_blocks=lambda: None,
        get_pp_proxy_dspark_hidden_size=lambda: None,
        get_aux_hidden_states_width=lambda: None,
        graph_shared_output=SimpleNamespace(get_logits_buffer=lambda vocab, rows: torch.zeros(rows, vocab)),
        hisparse_coordinator=None,
        capture_head_hooks=[],
        capture_tail_hooks=[],
        canary_manager=None,
        device_timer=None,
        graph_memory_usage={"target_verify": 0.0},
        attn_backend="full",
        decode_cuda_graph_runner="full",
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("target"), CheckpointShape())
    model_host.ensure_runtime(directory)
    return directory


@pytest.fixture(scope="module")
def model(directory):
    return model_host.load(directory)


@pytest.fixture
def narrow(directory, model, monkeypatch):
    """Widths 1, 2 and 3 in SGLang's own runner, whose graphs run again what they recorded."""

    def capture(self):
        with torch.inference_mode():
            for size in reversed(self.capture_bs):
                self.capture_one_shape(size, self.model_runner.model)

    monkeypatch.setattr(decode_graphs, "get_batch_sizes_to_capture", lambda *_, **__: ([1, 2, 4], []))
    monkeypatch.setattr(decode_graphs, "resolve_decode_backend", lambda runner: Recorder())
    monkeypatch.setattr(decode_graphs.DllmConfig, "from_server_args", lambda args: None)
    monkeypatch.setattr(DecodeCudaGraphRunner, "capture", capture)
    monkeypatch.setattr(DecodeCudaGraphRunner, "_record_in_graph_metadata_prep_done", lambda self: None)
    monkeypatch.setattr(verify_graphs, "get_attention_backend", lambda *, model_runner: PoolAttention(TABLE))
    monkeypatch.setattr(verify_graphs, "get_available_gpu_memory", lambda *_, **__: 1.0)
    made = NarrowSteps(make_runner(model, ModelConfig(str(directory), dtype="float32")), 4)
    made.capture(range(1, 4), ALONE)
    return made


def verify_batch(width):
    """Three requests' chains of `width` random tokens; a fourth is padding in the graphs."""
    generator = torch.Generator().manual_seed(width)
    requests, committed = torch.tensor([3, 1, 2]), torch.tensor([10, 1, 21])
    positions = committed[:, None] + torch.arange(width)
    chain = torch.randint(0, 500, (3, width), generator=generator)
    batch = SimpleNamespace(seq_lens=committed)
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=3,
        input_ids=chain.flatten(),
        req_pool_indices=requests,
        seq_lens=committed,
        out_cache_loc=TABLE[requests[:, None], positions].flatten(),
        seq_lens_sum=32,
        seq_lens_cpu=committed,
        positions=positions.flatten(),
        spec_algorithm=SpeculativeAlgorithm.from_string("EAGLE"),
        spec_info=device._causal_verify_input(batch, chain),
        capture_hidden_mode=CaptureHiddenMode.FULL,
    )


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_captured_steps_equal_eager_ones(narrow, model, width):
    batch, eager = verify_batch(width), PoolAttention(TABLE)
    runner, step = narrow.runner, narrow.steps[width]
    step.attention.pools.clear()  # capturing wrote to slot 0
    with narrow.serving(width):
        graphs = runner.decode_cuda_graph_runner
        assert (graphs, runner.attn_backend) == (step.graphs, step.attention)
        assert graphs.can_run_graph(batch) and not graphs.can_run_graph(verify_batch(width + 1))
        found = graphs.execute(batch)
    assert (runner.decode_cuda_graph_runner, runner.attn_backend) == ("full", "full")
    batch = verify_batch(width)
    with forward_context(ForwardContext(attn_backend=eager), forward_batch=batch):
        expected = model(batch.input_ids, batch.positions, batch)
    for name in ("next_token_logits", "hidden_states"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
    for layer, pools in eager.pools.items():
        for ours, theirs in zip(step.attention.pools[layer], pools, strict=True):
            assert torch.allclose(ours[1:], theirs[1:], atol=1e-5)


def test_attention_reads_its_width_while_it_is_built(directory, monkeypatch):
    """From SGLang's settings, which are as before behind it."""
    before, seen = get_spec().speculative_num_draft_tokens, []
    build = lambda *_, **__: seen.append((get_spec().speculative_num_draft_tokens, get_spec().speculative_num_steps))
    monkeypatch.setattr(verify_graphs, "get_attention_backend", build)
    monkeypatch.setattr(verify_graphs, "DecodeCudaGraphRunner", build)
    monkeypatch.setattr(verify_graphs, "get_available_gpu_memory", lambda *_, **__: 1.0)
    runner = SimpleNamespace(device="cuda", gpu_id=0, graph_memory_usage={"target_verify": 0.0})
    NarrowSteps(runner, 4).capture([2], ALONE)
    assert seen == [(2, 1)] * 2 and get_spec().speculative_num_draft_tokens == before


@pytest.mark.gpu
@pytest.mark.server
@pytest.mark.parametrize("backend", ["flashinfer", "fa3", "triton"])
def test_on_cuda_every_width_gives_the_same_tokens(serve, backend):
    flags = ("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", backend, "--speculative-adaptive")
    server = serve(*NANO_ARGS, *MTP_ARGS, *flags)
    wanted = prompts()[:12]
    expected = [greedy(tuple(ids), 48) for ids in wanted]
    for drafts in range(4):
        answers = generate_all(server, wanted, 48, at_once=6, custom_params={DEPTH_PARAM: drafts})
        tokens = [answer["output_ids"] for answer in answers]
        assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 9  # bfloat16 turns some ties
        assert not any(count for answer in answers for count in histogram(answer)[drafts + 1 :])
    log = server.log.read_text(errors="replace")
    assert all(f"Verify graphs of {width} tokens" in log for width in (1, 2, 3))
