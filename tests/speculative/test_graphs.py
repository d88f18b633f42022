"""The captured MTP pass against the eager one, on a CPU: a stand-in for CUDA graphs runs again what it recorded.

Shows that a pass reads and writes nothing but the buffers, and that padding leaves no trace. That
kernels can be captured needs a GPU.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_step35.bench.servers import MTP_ARGS, NANO_ARGS
from sglang_step35.speculative.draft import EagerPass
from sglang_step35.speculative.graphs import _reads_end_with_the_first_layer
from sglang_step35.speculative.rings import RequestRings
from sglang_step35.speculative.settings import MTPSettings
from sglang_step35.speculative.window import RoundWindow, Verified, WindowReader
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.nano_model import generate_all, greedy, histogram, prompts
from tests.support.pool_attention import SLOTS, PoolAttention, Recorder

STEPS, WIDTH = 3, 6
COMMITTED = [10, 1, 21]  # the second request's window begins before position 0
OWNERS = [3, 1, 2]


@pytest.fixture(scope="module")
def mtp(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("mtp"), CheckpointShape())
    backbone = model_host.load(directory)
    model = model_host.load(directory, draft=True)
    model.share_with(backbone)
    return model


class TritonRows(TritonAttnBackend):
    """SGLang's Triton backend as far as it lays out a captured draft pass; its kernels need a GPU."""

    def __init__(self):
        self.num_draft_tokens, self.speculative_num_steps = STEPS + 1, STEPS
        self.sliding_window_size, self.device = None, "cpu"
        self.qo_indptr, self.kv_indptr = (torch.zeros(5, dtype=torch.int32) for _ in range(2))
        self.window_kv_indptr = self.cuda_graph_kv_indices = None

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        pass

    def _fill_kv_indptr_and_indices(self, *_unused):
        return self.kv_indptr


class Translator:
    """Of a pool whose slots are their own ids."""

    def bind_runner_slots(self, batch):
        pass

    def own_plan(self, batch):
        assert batch.out_cache_loc is not None
        return self

    def bind_replay(self, batch, reader, *, slots):
        batch.kv_loc_plan = self


def make_runner(mtp, req_to_token):
    return SimpleNamespace(
        model=mtp,
        attn_backend=PoolAttention(req_to_token),
        device="cpu",
        dtype=torch.float32,
        model_config=SimpleNamespace(hidden_size=mtp.spec.hidden_size),
        spec_algorithm=None,
        kv_index_translator=Translator(),
    )


@pytest.fixture
def graphs(mtp, reader, monkeypatch):
    from sglang_step35.speculative import graphs

    monkeypatch.setattr(graphs, "get_batch_sizes_to_capture", lambda runner: ([1, 2, 4], []))
    monkeypatch.setattr(graphs, "resolve_decode_backend", lambda runner: Recorder())
    monkeypatch.setattr(graphs, "model_capture_mode", nullcontext)
    monkeypatch.setattr(graphs.MTPGraphRunner, "model_context", lambda self: nullcontext())

    def capture(self):
        with torch.inference_mode():
            for size in reversed(self.capture_bs):
                self.capture_one_shape(size, None)

    monkeypatch.setattr(graphs.MTPGraphRunner, "capture", capture)
    return graphs.MTPGraphRunner(make_runner(mtp, reader.req_to_token), MTPSettings(STEPS), reader)


@pytest.fixture(scope="module")
def requests_table():
    """Slots of 3 requests' positions; row 0 belongs to nobody."""
    order = 1 + torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(2))[:96]
    return torch.cat([torch.zeros(1, 32, dtype=torch.int64), order.view(3, 32)])


def make_reader(hidden_size, table) -> WindowReader:
    """Rings that hold random states and tokens of all positions before the committed ones."""
    generator = torch.Generator().manual_seed(7)
    rings = RequestRings(4, 32, hidden_size, torch.float32, "cpu")
    rings.hidden[1:] = torch.randn(rings.hidden[1:].shape, generator=generator)
    rings.tokens[1:] = torch.randint(0, 500, rings.tokens[1:].shape, generator=generator)
    return WindowReader(rings, table, STEPS)


@pytest.fixture
def reader(mtp, requests_table):
    return make_reader(mtp.spec.hidden_size, requests_table)


def random_window(reader, seed, width=STEPS + 1) -> RoundWindow:
    """The pass behind a verify step of `width` tokens, as the worker makes it on CUDA."""
    generator = torch.Generator().manual_seed(seed)
    committed = torch.tensor(COMMITTED)
    verified = Verified(
        requests=torch.tensor(OWNERS),
        seq_lens=committed,
        seq_lens_cpu=committed,
        accept_lens=torch.randint(1, width + 1, (3,), generator=generator),
        tokens=torch.randint(0, 500, (3, width), generator=generator),
        hidden=torch.randn(3, width, reader.states.hidden.shape[-1], generator=generator),
    )
    return RoundWindow(reader, verified, STEPS + 1, WIDTH)


def eager_pass(runner, window):
    """The draft worker's way without graphs."""
    window.reader.remember(window.verified)
    rows, hidden = window.reader.rows(window.verified, window.width, window.num_rows)
    batch = SimpleNamespace(
        batch_size=3, req_pool_indices=window.verified.requests, positions=rows.positions, out_cache_loc=rows.slots
    )
    return EagerPass(runner, batch, rows, hidden)


def in_context(backend):
    return forward_context(ForwardContext(attn_backend=backend))


@torch.inference_mode()
def drafted(layers):
    """Logits of every layer, each fed the drafts of the one before."""
    found = []
    for layer in range(STEPS):
        logits = layers.logits(layer).clone()
        layers.put(layer, logits.argmax(-1))
        found.append(logits)
    return torch.stack(found)


def test_tritons_captured_pass_has_the_rows_of_the_mtp_pass(mtp, requests_table, graphs, monkeypatch):
    """It would take the verify width, STEPS + 1, and read the rows of other requests."""
    runner = make_runner(mtp, requests_table)
    runner.attn_backend = backend = TritonRows()
    monkeypatch.setattr(type(graphs), "capture", lambda self: None)
    type(graphs)(runner, MTPSettings(STEPS), graphs.reader)
    mode, ends = ForwardMode.DRAFT_EXTEND_V2, torch.tensor([10, 21])
    starts, *_ = backend._update_draft_extend_buffers(None, 2, ends, mode, None, torch.tensor([0, 1]))
    assert starts.tolist() == [0, WIDTH, 2 * WIDTH]
    assert backend._build_cuda_graph_forward_metadata(2, mode, None).max_extend_len == WIDTH


@pytest.mark.parametrize("verified", range(1, STEPS + 2))
def test_captured_passes_equal_eager_ones(mtp, graphs, reader, verified):
    """However few tokens were verified: the pass has its full rows, those past the accepted ones nobody reads."""
    eager, other = make_runner(mtp, reader.req_to_token), make_reader(mtp.spec.hidden_size, reader.req_to_token)
    graphs.attn_backend.pools.clear()  # capturing wrote to slot 0
    for seed in range(3):
        window = random_window(reader, seed, verified)
        with in_context(graphs.attn_backend):
            found = drafted(graphs.begin(window))
        with in_context(eager.attn_backend):
            expected = drafted(eager_pass(eager, random_window(other, seed, verified)))
        assert torch.allclose(found, expected, atol=1e-5)
        ends = (window.verified.seq_lens + window.verified.accept_lens).tolist()
        unread = [reader.req_to_token[owner, end : end + STEPS] for owner, end in zip(OWNERS, ends, strict=True)]
        read = torch.ones(SLOTS, dtype=torch.bool)
        read[0], read[torch.cat(unread)] = False, False
        for layer, pools in eager.attn_backend.pools.items():
            for ours, theirs in zip(graphs.attn_backend.pools[layer], pools, strict=True):
                assert torch.allclose(ours[read], theirs[read], atol=1e-5)


def test_attention_is_planned_once_for_all_layers(graphs, reader):
    assert graphs.attn_backend.plans == [("state", 4, 24), ("capture", 4), ("capture", 2), ("capture", 1)]
    with in_context(graphs.attn_backend):
        drafted(graphs.begin(random_window(reader, 5)))
    assert graphs.attn_backend.plans[4:] == [("replay", 4)]


@pytest.mark.parametrize("early", [True, False])
def test_the_scheduler_waits_for_the_first_layer_only(graphs, reader, monkeypatch, early):
    replayed, recorded = [], []
    replay = graphs.backend.replay
    monkeypatch.setattr(graphs.backend, "replay", lambda key, batch: replayed.append(key) or replay(key, batch))
    event = SimpleNamespace(record=lambda: recorded.append(len(replayed)))
    monkeypatch.setattr(graphs, "device_module", SimpleNamespace(Event=lambda: event))
    monkeypatch.setattr(graphs, "reads_end_early", early)
    graphs.model_runner.shared_read_done_event = None
    with in_context(graphs.attn_backend):
        drafted(graphs.begin(random_window(reader, 5)))
    assert [key.variant_label for key in replayed] == ["rows", "mtp0", "mtp1", "mtp2"]
    assert recorded == ([2] if early else [])
    assert graphs.model_runner.shared_read_done_event is (event if early else None)


@pytest.mark.parametrize(
    "in_graph, declared, early",
    [
        (True, SharedReadEnds.UNKNOWN, True),
        (False, SharedReadEnds.PRE_REPLAY, True),
        (False, SharedReadEnds.IN_REPLAY, True),
        (False, SharedReadEnds.POST_REPLAY, False),
        (False, SharedReadEnds.UNKNOWN, False),
    ],
)
def test_where_attention_reads_the_scheduler_s_tables(in_graph, declared, early):
    backend = SimpleNamespace(
        draft_extend_metadata_captured_in_graph=lambda: in_graph, shared_read_ends=lambda mode: declared
    )
    assert _reads_end_with_the_first_layer(backend) is early


@pytest.mark.parametrize(
    "rows, committed, served",
    [
        (6, [None] * 4, True),
        (6, [2, 5, 3, 26], True),
        (6, [2, 5, 1, 26], False),  # begins before position 0
        (6, [None] * 5, False),
        (8, [None] * 4, False),
    ],
)
def test_what_is_left_to_the_eager_pass(graphs, rows, committed, served):
    lens = None if None in committed else torch.tensor(committed)
    window = RoundWindow(None, SimpleNamespace(requests=committed, seq_lens_cpu=lens), STEPS + 1, rows)
    assert graphs.serves(ForwardMode.DRAFT_EXTEND_V2, window) == served
    assert not graphs.serves(ForwardMode.EXTEND, window)


@pytest.mark.gpu
@pytest.mark.server
@pytest.mark.parametrize("backend", ["flashinfer", "fa3", "triton"])
def test_on_cuda_graphs_change_neither_tokens_nor_drafts(serve, backend):
    flags = ("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", backend)
    wanted, found = prompts()[:12], []
    for disabled in ("0", "1"):
        server = serve(*NANO_ARGS, *MTP_ARGS, *flags, SGLANG_DISABLE_DRAFT_EXTEND_CUDA_GRAPH=disabled)
        answers = generate_all(server, wanted, 48, at_once=6)
        found.append([(a["output_ids"], histogram(a)) for a in answers])
    assert found[0] == found[1]
    tokens = [output for output, _ in found[0]]
    expected = [greedy(tuple(ids), 48) for ids in wanted]
    assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 9  # bfloat16 turns some ties
