"""Whole passes in one graph, attention over real KV pools among its steps, against transformers' logits.

Letters: T rows of a pass, V vocabulary.
"""

from types import SimpleNamespace

import pytest
import torch

from sglang_step35.attention.portable import paged_steps
from sglang_step35.model import graphed_layers
from sglang_step35.packed import ik_check
from tests.support import model_host
from tests.support.paged_host import SLOTS, PagedHost, prompts

TOLERANCE = 1e-4
ROUNDED = 0.05  # relative, of hidden states in bfloat16

pytestmark = pytest.mark.skipif(not ik_check.usable(), reason="the library is not usable here")


class Server:
    """The model over hybrid pools, requests with slots in no order; `passes` says which went through one graph."""

    def __init__(self, directory, dtype=torch.float32, in_one: bool = True):
        self.model = model_host.load(directory, dtype=str(dtype).removeprefix("torch."))
        layers = self.model.model.graphed
        layers.forward = layers.by_graphs
        self.passes: list[bool] = []
        through = layers._in_one if in_one else lambda *operands: False
        layers._in_one = lambda *operands: self.passes.append(through(*operands)) or self.passes[-1]
        self.host = PagedHost([layer.self_attn.attn for layer in self.model.model.layers], dtype)
        self.backend = self.host.backend

    @torch.inference_mode()
    def run(self, spans, slots=None) -> torch.Tensor:
        """Hidden states [T, H] before the final norm; spans, slots: see `PagedHost.planned`."""
        with self.host.planned(spans, slots) as batch:
            return self.model(batch.input_ids, batch.positions, batch).hidden_states.float()


def rounds(ids: list[list[int]]) -> list[list]:
    """Chunks of up to 16 rows, rows like those of a verify step, and single ones, of several requests at a time."""
    a, b, c = ids
    return [
        [(0, a, 0, 16)],
        [(0, a, 16, 20), (1, b, 0, 9)],
        [(2, c, 0, 1), (0, a, 20, 24), (1, b, 9, 10)],
        [(request, own, len(own) - 1, len(own)) for request, own in ((2, c), (1, b), (0, a))],
    ]


def test_against_the_reference(directory, reference, threads):
    server, ids = Server(directory), prompts(25, 11, 2)
    expected = [reference.hidden_before_norm(own) for own in ids]
    for spans in rounds(ids):
        found = server.run(spans)
        wanted = torch.cat([expected[request][first:end] for request, _, first, end in spans])
        assert (found - wanted).abs().max() < TOLERANCE
    assert server.passes == [True] * 4


def test_heads_that_threads_share(directory, reference, threads):
    """Their parts are merged in every pass of the same graph."""
    (ids,) = prompts(150)
    server, expected = Server(directory), reference.hidden_before_norm(ids)
    for first, end in ((0, 50), (50, 100), (100, 147), (147, 148), (148, 149), (149, 150)):
        assert (server.run([(0, ids, first, end)]) - expected[first:end]).abs().max() < TOLERANCE
    assert server.passes == [False] * 3 + [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_layer_by_layer(directory, reference, dtype):
    """The pools, too, hold the same; bfloat16 queries are rounded there, not here."""
    ids = prompts(25, 11, 2)
    torch.manual_seed(0)
    one = Server(directory, dtype)
    torch.manual_seed(0)
    other = Server(directory, dtype, in_one=False)
    for spans in rounds(ids):
        found, expected = one.run(spans), other.run(spans)
        assert (found - expected).norm() < (1e-6 if dtype is torch.float32 else ROUNDED) * expected.norm()
    for found, expected in zip(one.host.written(), other.host.written(), strict=True):
        used = expected.flatten(1).any(-1)
        assert torch.equal(found.flatten(1).any(-1), used) and used.any()
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(found[used], expected[used], rtol=tolerance, atol=tolerance)
    assert all(one.passes) and not any(other.passes)


def test_one_graph_for_all_passes_of_as_many_rows(directory, monkeypatch):
    server, ids = Server(directory), prompts(12, 12, 12)
    built, build = [], graphed_layers.GraphedLayers._build_pass
    monkeypatch.setattr(graphed_layers.GraphedLayers, "_build_pass", lambda *of: built.append(of[1].rows) or build(*of))
    for first in range(0, 9, 3):
        server.run([(request, own, first, first + 3) for request, own in enumerate(ids)])
    server.run([(0, ids[0], 9, 11)])
    assert built == [9, 2]


def test_what_runs_layer_by_layer(directory, reference):
    """More rows of a request than the kernel takes; slots that are none; rows that are padding."""
    (ids,) = prompts(40)
    server = Server(directory)
    expected = reference.hidden_before_norm(ids)
    assert (server.run([(0, ids, 0, 30)]) - expected[:30]).abs().max() < TOLERANCE
    assert (server.run([(0, ids, 30, 31)]) - expected[30]).abs().max() < TOLERANCE
    assert server.passes == [False, True]
    server.run([(0, ids, 31, 32)], slots=torch.tensor([-1]))
    assert server.passes[2:] == [False]
    with pytest.raises(IndexError):
        server.run([(0, ids, 31, 32)], slots=torch.tensor([SLOTS + 5]))
    attention = paged_steps.PagedSteps(server.backend, [server.model.model.layers[0].self_attn.attn], 2, torch.float32)
    assert not attention.plan(SimpleNamespace(out_cache_loc=torch.tensor([1, 2])))  # the backend planned one row


def test_other_backends_and_types(directory, reference):
    server = Server(directory)
    (ids,) = prompts(9)
    assert server.backend.steps([], 1, torch.float16) is None
    found = model_host.run(server.model, ids).hidden_states
    assert (found - reference.hidden_before_norm(ids)).abs().max() < TOLERANCE and server.passes == [False]
