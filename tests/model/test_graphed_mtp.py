"""Passes of the MTP layers by graphs, over real KV pools, against the reference's logits.

Letters: T rows of a pass, V vocabulary.
"""

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from sglang_step35.model.graphed_mtp import GraphedPass
from sglang_step35.model.mtp_pass import LayerPass
from sglang_step35.packed import ik_check, ik_library
from tests.packed.test_model import K_WIDE, SMALL, converted, k_mix
from tests.support import model_host
from tests.support.checkpoints import CheckpointShape, make_checkpoint
from tests.support.paged_host import PagedHost, prompts
from tests.support.reference import load_reference

TOLERANCE = 1e-4
LAYERS = 3

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


class Server:
    """MTP layers over hybrid pools, fed the reference's hidden states; `ways` says which pass each run took."""

    def __init__(self, backbone, mtp, reference, dtype=torch.float32, by_graphs: bool = True):
        self.backbone, self.model, self.reference, self.dtype = backbone, mtp, reference, dtype
        mtp.share_with(backbone)
        # Float32 activations, too; or none.
        mtp.graphed._faster = lambda x: by_graphs and len(x) <= 64 and bool(mtp.graphed._weights())
        self.host = PagedHost([layer.block.self_attn.attn for layer in mtp.layers], dtype)
        self.ways: list[type] = []

    @torch.inference_mode()
    def run(self, spans, last_layer: str = "logits") -> list[torch.Tensor]:
        """Logits [requests, V] of every layer behind each request's last row; last_layer: what the third one does."""
        states = [self.reference.hidden_before_norm(ids)[first:end] for _, ids, first, end in spans]
        ends = torch.tensor([end - first for _, _, first, end in spans]).cumsum(0)
        with self.host.planned(spans) as batch:
            layers = self.model.start_pass(batch.positions, torch.cat(states).to(self.dtype), ends - 1, batch)
            self.ways.append(type(layers))
            found = [layers.logits(0, self._tokens(spans, 0))]
            found.append(layers.logits(1, self._tokens(spans, 1)))
            out = getattr(layers, last_layer)(2, self._tokens(spans, 2))
        return found if out is None else [*found, out]

    def _tokens(self, spans, layer: int) -> torch.Tensor:
        return torch.tensor([ids[t + 1 + layer] for _, ids, first, end in spans for t in range(first, end)])

    def expected(self, spans) -> list[torch.Tensor]:
        rows = [(self.reference.mtp_logits(ids), end - 1) for _, ids, _, end in spans]
        return [torch.stack([logits[layer][row] for logits, row in rows]) for layer in range(LAYERS)]

    def error(self, spans) -> float:
        """Relative to what the first layer's logits are; the deepest layer's."""
        found, expected = self.run(spans), self.expected(spans)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def of_directory(directory, reference, dtype=torch.float32, by_graphs: bool = True) -> Server:
    name = str(dtype).removeprefix("torch.")
    backbone, mtp = (model_host.load(directory, draft=draft, dtype=name) for draft in (False, True))
    return Server(backbone, mtp, reference, dtype, by_graphs)


def rounds(ids: list[list[int]]) -> list[list]:
    """Chunks, rows like those behind a verify step, and single ones, of several requests at a time."""
    a, b, c = ids
    return [
        [(0, a, 0, 16)],
        [(0, a, 16, 20), (1, b, 0, 9)],
        [(2, c, 0, 1), (0, a, 18, 24), (1, b, 9, 10)],
        [(request, own, len(own) - 4, len(own) - 3) for request, own in ((2, c), (1, b), (0, a))],
    ]


def close(found, expected) -> bool:
    return all((a - b).abs().max() < TOLERANCE for a, b in zip(found, expected, strict=False))


def test_against_the_reference(directory, reference, threads):
    server = of_directory(directory, reference)
    for spans in rounds(prompts(28, 14, 5)):
        found = server.run(spans)
        assert len(found) == LAYERS and close(found, server.expected(spans))
    assert server.ways == [GraphedPass] * 4


@pytest.mark.parametrize("last_layer", ["write_kv", "forward"])
def test_keys_and_values_of_rows_without_logits(directory, reference, last_layer):
    server = of_directory(directory, reference)
    *before, last = rounds(prompts(28, 14, 5))
    for spans in before:
        assert len(server.run(spans, last_layer)) == LAYERS - 1
    assert close(server.run(last), server.expected(last))


def test_hidden_states_for_another_pass(directory, reference):
    """As of layer by layer; in the model's type."""
    (ids,) = prompts(20)
    passes, spans = [], [(0, ids, 0, 9)]
    for by_graphs in (True, False):
        server = of_directory(directory, reference, torch.bfloat16, by_graphs)
        hidden = reference.hidden_before_norm(ids)[:9].bfloat16()
        with torch.inference_mode(), server.host.planned(spans) as batch:
            passes.append(server.model.start_pass(batch.positions, hidden, torch.tensor([8]), batch))
            passes[-1].forward(0, server._tokens(spans, 0))
    assert [type(layers) for layers in passes] == [GraphedPass, LayerPass]
    found, expected = (layers.hidden for layers in passes)
    assert found.dtype is torch.bfloat16
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()


def test_rounding_of_bfloat16(directory, reference):
    """No more than layer by layer, also of what the pools hold."""
    ids, servers = prompts(28, 14, 5), []
    for by_graphs in (True, False):
        torch.manual_seed(0)
        servers.append(of_directory(directory, reference, torch.bfloat16, by_graphs))
    exact = of_directory(directory, reference)
    for spans in rounds(ids):
        one, other = (server.error(spans) for server in servers)
        assert one < 1.1 * other
        exact.run(spans)
    exact_kv = _in_order(exact, ids)
    one, other = ((_in_order(server, ids) - exact_kv).norm() for server in servers)
    assert one < 1.05 * other and one < 0.02 * exact_kv.norm()


def _in_order(server: Server, ids: list[list[int]]) -> torch.Tensor:
    """Keys and values of every layer and position, whatever their slots."""
    places = [server.host.table[request, : len(own) - LAYERS] for request, own in enumerate(ids)]
    slots = server.host.pool.translate_loc_from_full_to_swa(torch.cat(places).long())
    return torch.stack([part[slots].float() for part in server.host.written()])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "K-quants"])
def test_packed_weights(tmp_path, kind):
    shape, quantise = (K_WIDE, k_mix) if kind == "K-quants" else (SMALL, lambda name: Q[kind])
    file, reference = converted(tmp_path, replace(shape, residual=0.1), quantise)
    errors = []
    for by_graphs in (True, False):
        backbone, mtp = (model_host.load_gguf(file, draft=draft, dtype="bfloat16") for draft in (False, True))
        server = Server(backbone, mtp, reference, torch.bfloat16, by_graphs)
        errors.append(max(server.error(spans) for spans in rounds(prompts(28, 14, 5))))
        assert set(server.ways) == {GraphedPass if by_graphs else LayerPass}
    assert errors[0] < max(1.1 * errors[1], 0.03)


def test_new_weights_of_the_backbones_head(tmp_path):
    """MTP layers without a head of their own have no copy of it."""
    directory = make_checkpoint(tmp_path, CheckpointShape(residual=0.1))
    server = of_directory(directory, load_reference(directory))
    for depth in range(LAYERS):
        server.model.tables._used[depth, "head"] = server.model.tables.backbone["head"]
    spans, head = [(0, prompts(12)[0], 0, 8)], server.backbone.lm_head.weight
    before = server.run(spans)
    head.data = -head.data
    assert all(torch.equal(after, -logits) for after, logits in zip(server.run(spans), before, strict=True))
    assert server.ways == [GraphedPass] * 2


def test_a_full_arena(directory, reference, monkeypatch):
    """It is emptied in the middle of a pass."""
    monkeypatch.setattr(ik_library, "ARENA_BYTES", 250_000)
    library = ik_library.Library(ik_library.library_path())
    monkeypatch.setattr(ik_library, "library", lambda: library)
    server = of_directory(directory, reference)
    for spans in rounds(prompts(28, 14, 5)):
        assert close(server.run(spans), server.expected(spans))
    assert server.ways == [GraphedPass] * 4


def test_what_goes_layer_by_layer(directory, reference):
    """More rows than graphs are for, or of a request than the kernel takes; other backends; other activations."""
    (ids,) = prompts(100)
    server = of_directory(directory, reference)
    for first, end in ((0, 70), (70, 90), (90, 97)):
        spans = [(0, ids, first, end)]
        assert close(server.run(spans), server.expected(spans))
    assert server.ways == [LayerPass, LayerPass, GraphedPass]
    one = torch.zeros(1, 64), torch.tensor([0])
    batch = model_host.batch_of([1])
    with torch.inference_mode():
        with forward_context(ForwardContext(attn_backend=model_host.WholeSequence()), forward_batch=batch):
            assert isinstance(server.model.start_pass(batch.positions, *one, batch), LayerPass)
        with server.host.planned([(0, ids, 0, 1)]) as batch:
            assert isinstance(server.model.start_pass(batch.positions, *one, batch), GraphedPass)
            del server.model.graphed._faster  # float32
            assert isinstance(server.model.start_pass(batch.positions, *one, batch), LayerPass)


def test_heads_that_the_library_does_not_read(directory, reference, monkeypatch):
    server = of_directory(directory, reference)
    monkeypatch.setattr("sglang_step35.packed.ik_kernel.reads", lambda part: part.shape[0] != 512)
    spans = [(0, prompts(12)[0], 0, 8)]
    assert close(server.run(spans), server.expected(spans)) and server.ways == [LayerPass]
