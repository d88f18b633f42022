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
from sglang_step35.speculative.graphs import _reads_end_with_the_first_layer
from sglang_step35.speculative.pass_input import window_rows
from sglang_step35.speculative.settings import MTPSettings
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.nano_model import generate_all, greedy, histogram, prompts

STEPS, WIDTH, SLOTS = 3, 6, 128
COMMITTED = [10, 1, 21]  # the second request's window begins before position 0


@pytest.fixture(scope="module")
def mtp(tmp_path_factory):
    directory = make_checkpoint(tmp_path_factory.mktemp("mtp"), CheckpointShape())
    backbone = model_host.load(directory)
    model = model_host.load(directory, draft=True)
    model.share_with(backbone)
    return model


class PoolAttention:
    """Row by row over a pool of K and V; slot 0 takes what nobody reads."""

    def __init__(self, req_to_token):
        self.req_to_token = req_to_token
        self.pools = {}
        self.plans = []

    def forward(self, q, k, v, layer, batch, **_unused):
        dim = layer.head_dim
        q, k, v = (x.view(len(q), -1, dim) for x in (q, k, v))
        keys, values = self.pools.setdefault(layer.layer_id, (self.filled(k), self.filled(v)))
        keys[batch.out_cache_loc], values[batch.out_cache_loc] = k, v
        owners = batch.req_pool_indices.repeat_interleave(len(q) // batch.batch_size)
        rows = []
        for query, owner, position in zip(q, owners, batch.positions.tolist(), strict=True):
            first = max(0, position - layer.sliding_window_size)
            slots = self.req_to_token[owner, first : position + 1]
            groups = len(query) // k.shape[1]
            scores = torch.einsum("hd,thd->ht", query, keys[slots].repeat_interleave(groups, 1))
            weights = (scores * layer.scaling).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, values[slots].repeat_interleave(groups, 1)))
        return torch.stack(rows).flatten(1)

    @staticmethod
    def filled(like):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(SLOTS, *like.shape[1:], generator=generator)

    def init_forward_metadata(self, batch):
        self.plans.append("eager")

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.plans.append(("state", max_bs, max_num_tokens))

    def init_forward_metadata_out_graph(self, batch, in_capture=False):
        self.plans.append(("capture" if in_capture else "replay", batch.batch_size))

    def init_forward_metadata_in_graph(self, batch):
        pass

    def draft_extend_metadata_captured_in_graph(self):
        return False

    def shared_read_ends(self, mode):
        return SharedReadEnds.UNKNOWN


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


class Recorder:
    """In place of SGLang's graph backend."""

    def __init__(self):
        self.recorded = {}

    def capture_one(self, key, run, post_warmup_hook=None):
        run()
        self.recorded[key] = run

    def replay(self, key, batch):
        return self.recorded[key]()


def make_runner(mtp, req_to_token):
    return SimpleNamespace(
        model=mtp,
        attn_backend=PoolAttention(req_to_token),
        device="cpu",
        dtype=torch.float32,
        model_config=SimpleNamespace(hidden_size=mtp.spec.hidden_size),
        spec_algorithm=None,
        kv_index_translator=SimpleNamespace(bind_runner_slots=lambda batch: None),
    )


@pytest.fixture
def graphs(mtp, requests_table, monkeypatch):
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
    return graphs.MTPGraphRunner(make_runner(mtp, requests_table), MTPSettings(STEPS))


@pytest.fixture(scope="module")
def requests_table():
    """Slots of 3 requests' positions; row 0 belongs to nobody."""
    order = 1 + torch.randperm(SLOTS - 1, generator=torch.Generator().manual_seed(2))[:96]
    return torch.cat([torch.zeros(1, 32, dtype=torch.int64), order.view(3, 32)])


def random_pass(mtp, table, seed):
    """Rows and hidden states of a pass after a verify step."""
    generator = torch.Generator().manual_seed(seed)
    committed, owners = torch.tensor(COMMITTED), torch.tensor([3, 1, 2])
    rows = window_rows(
        seq_lens=committed,
        seq_lens_cpu=committed,
        accept_lens=torch.randint(1, STEPS + 2, (3,), generator=generator),
        width=WIDTH,
        verify_width=STEPS + 1,
        first_known=torch.zeros(3, dtype=torch.int64),
        req_to_token=table,
        req_pool_indices=owners,
        tokens=torch.randint(0, 500, (3, WIDTH + STEPS), generator=generator),
    )
    hidden = torch.randn(3 * WIDTH, mtp.spec.hidden_size, generator=generator)
    batch = SimpleNamespace(
        batch_size=3,
        req_pool_indices=owners,
        positions=rows.positions,
        out_cache_loc=rows.slots,
        out_cache_loc_virtual=None,
        kv_loc_plan=None,
        kv_loc_cols=None,
        moe_num_token_non_padded=None,
    )
    return rows, hidden, batch


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
    type(graphs)(runner, MTPSettings(STEPS))
    mode, ends = ForwardMode.DRAFT_EXTEND_V2, torch.tensor([10, 21])
    starts, *_ = backend._update_draft_extend_buffers(None, 2, ends, mode, None, torch.tensor([0, 1]))
    assert starts.tolist() == [0, WIDTH, 2 * WIDTH]
    assert backend._build_cuda_graph_forward_metadata(2, mode, None).max_extend_len == WIDTH


def test_captured_passes_equal_eager_ones(mtp, graphs, requests_table):
    from sglang_step35.speculative.draft import EagerPass

    eager = make_runner(mtp, requests_table)
    graphs.attn_backend.pools.clear()  # capturing wrote to slot 0
    for seed in range(3):
        rows, hidden, batch = random_pass(mtp, requests_table, seed)
        with forward_context(ForwardContext(attn_backend=graphs.attn_backend), forward_batch=batch):
            found = drafted(graphs.begin(batch, rows, hidden))
        rows, hidden, batch = random_pass(mtp, requests_table, seed)
        with forward_context(ForwardContext(attn_backend=eager.attn_backend), forward_batch=batch):
            expected = drafted(EagerPass(eager, batch, rows, hidden))
        assert torch.allclose(found, expected, atol=1e-5)
        for layer, pools in eager.attn_backend.pools.items():
            for ours, theirs in zip(graphs.attn_backend.pools[layer], pools, strict=True):
                assert torch.allclose(ours[1:], theirs[1:], atol=1e-5)


def test_attention_is_planned_once_for_all_layers(mtp, graphs, requests_table):
    assert graphs.attn_backend.plans == [("state", 4, 24), ("capture", 4), ("capture", 2), ("capture", 1)]
    rows, hidden, batch = random_pass(mtp, requests_table, 5)
    with forward_context(ForwardContext(attn_backend=graphs.attn_backend), forward_batch=batch):
        drafted(graphs.begin(batch, rows, hidden))
    assert graphs.attn_backend.plans[4:] == [("replay", 4)]


@pytest.mark.parametrize("early", [True, False])
def test_the_scheduler_waits_for_the_first_layer_only(mtp, graphs, requests_table, monkeypatch, early):
    replayed, recorded = [], []
    replay = graphs.backend.replay
    monkeypatch.setattr(graphs.backend, "replay", lambda key, batch: replayed.append(key) or replay(key, batch))
    event = SimpleNamespace(record=lambda: recorded.append(len(replayed)))
    monkeypatch.setattr(graphs, "device_module", SimpleNamespace(Event=lambda: event))
    monkeypatch.setattr(graphs, "reads_end_early", early)
    graphs.model_runner.shared_read_done_event = None
    rows, hidden, batch = random_pass(mtp, requests_table, 5)
    with forward_context(ForwardContext(attn_backend=graphs.attn_backend), forward_batch=batch):
        drafted(graphs.begin(batch, rows, hidden))
    assert len(replayed) == STEPS
    assert recorded == ([1] if early else [])
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
    "counts, ends, served",
    [
        ([6] * 4, None, True),
        ([6] * 4, [6, 9, 7, 30], True),
        ([6] * 4, [6, 9, 5, 30], False),  # begins before position 0
        ([6] * 5, None, False),
        ([6, 8], None, False),
    ],
)
def test_what_is_left_to_the_eager_pass(graphs, counts, ends, served):
    rows = SimpleNamespace(row_counts=counts, ends_cpu=None if ends is None else torch.tensor(ends))
    assert graphs.serves(ForwardMode.DRAFT_EXTEND_V2, rows) == served
    assert not graphs.serves(ForwardMode.EXTEND, rows)


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
